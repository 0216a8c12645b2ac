"""`sutazai chat`: one question and its answer, or a conversation in the terminal."""

from __future__ import annotations

import os
import readline  # noqa: F401 - importing it gives `input` its line editing
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, TypeAlias

import cyclopts

from sutazai.cli.answer import Measured, Wanted, answer
from sutazai.cli.client import INTERRUPTED, GatewayClient, Url, guarded, run
from sutazai.cli.models import Listed, Tags
from sutazai.cli.printing import complain, fitting
from sutazai.core.errors import BadRequest, UnknownModel
from sutazai.policy.nearest import nearest

app = cyclopts.App(name="chat")

QUOTES = '"""'
COMMANDS = """\
/model NAME   ask another model from now on; without a name, list them
/clear        forget what was said
/bye          leave; Ctrl-D does too
Text between \"\"\" and \"\"\" may have several lines. Ctrl-C stops an answer, or leaves.
"""

Turn: TypeAlias = Callable[["Conversation"], int]


@app.default
def chat(
    model: str | None = None,
    /,
    *prompt: Annotated[str, cyclopts.Parameter(allow_leading_hyphen=True)],
    system: str = "",
    temperature: float | None = None,
    max_tokens: int | None = None,
    stats: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    url: Url = None,
) -> int:
    """
    Ask a model, once or in a conversation.

    With a prompt, or text from a pipe, or both, it prints one answer and ends. Examples: `sutazai chat`,
    `sutazai chat llama3.2 Why is the sky blue?`, `git diff | sutazai chat llama3.2 Explain this`

    Parameters
    ----------
    model
        As in `sutazai models list`. Left out, the first one there that is no embedding model.
    prompt
        The question. It comes before the text from the pipe.
    system
        What the model is told beforehand.
    temperature
        0 for the likeliest words, 1 and more for surprising ones. Left out, the model's own.
    max_tokens
        Where an answer is cut.
    stats
        Say on standard error how long the first token took and how many came in a second.
    """

    def work() -> int:
        wanted = Wanted(model=model or "", temperature=temperature, max_tokens=max_tokens)
        conversation = Conversation(wanted=wanted, system=system, stats=stats, url=url)
        question = "\n\n".join(part for part in (" ".join(prompt), _piped()) if part.strip())
        if not question and not _is_at_terminal():
            raise BadRequest("There was nothing to ask. Give a prompt, or pipe a text in.")
        if not (model and question) and (code := conversation.begin()) != 0:
            return code
        return conversation.ask(question) if question else _converse(conversation)

    return guarded(work)


@dataclass(slots=True)
class Conversation:
    """What was said, and with whom. Each turn has its own connection, so that a pause costs nothing."""

    wanted: Wanted
    system: str
    stats: bool
    url: str | None
    said: list[dict[str, str]] = field(default_factory=list)

    def begin(self) -> int:
        """Choose a model where none was named; an exit code."""

        async def choose(client: GatewayClient) -> int:
            if not self.wanted.model:
                self.wanted = replace(self.wanted, model=first_model(await client.ask("GET", "/api/tags", shape=Tags)))
            return 0

        return run(choose, self.url)

    def ask(self, question: str) -> int:
        """
        Print the answer as it comes; an exit code.

        An answer that was interrupted is remembered as far as it came, one that failed is not, nor its question.
        """
        heard: list[str] = []
        before = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*before, *self.said, {"role": "user", "content": question}]

        async def work(client: GatewayClient) -> int:
            measured = await answer(client, self.wanted, messages, heard)
            if self.stats:
                complain(stats_line(measured))
            return 0

        code = run(work, self.url)
        if code == INTERRUPTED and not heard:
            sys.stdout.write("\n")  # the terminal has written ^C
        if code == 0 or (code == INTERRUPTED and heard):
            self.said += [messages[-1], {"role": "assistant", "content": "".join(heard)}]
        return code

    def switch(self, model: str) -> None:
        """Ask another model from now on, about the same things; without a name, list the models."""

        async def work(client: GatewayClient) -> int:
            listed = [known.name for known in (await client.ask("GET", "/api/tags", shape=Tags)).models]
            if not model:
                sys.stdout.write(fitting("".join(f"{name}\n" for name in listed), sys.stdout))
            elif model in listed or f"{model}:latest" in listed:
                self.wanted = replace(self.wanted, model=model)
            else:
                raise UnknownModel(model, nearest(model, listed))
            return 0

        run(work, self.url)

    def clear(self) -> None:
        """Forget what was said."""
        self.said.clear()


def first_model(tags: Tags) -> str:
    """The first model that can chat, by its name and family. Raises `BadRequest` where the pool has none at all."""
    if not tags.models:
        raise BadRequest("The pool has no model yet. Fetch one with `sutazai models pull llama3.2`.")
    return next((model.name for model in tags.models if not _embeds(model)), tags.models[0].name)


def stats_line(measured: Measured) -> str:
    """What `--stats` says; the rate is of the tokens after the first."""
    words = [
        f"first token {measured.first_token_s:.2f} s",
        f"{measured.tokens} token{'s' if measured.tokens != 1 else ''}",
    ]
    if measured.tokens > 1 and measured.rest_s > 0:
        words.append(f"{(measured.tokens - 1) / measured.rest_s:.1f} tokens/s")
    return ", ".join(words)


def _embeds(model: Listed) -> bool:
    return "embed" in model.name or "bert" in (model.details.family or "")


def _piped() -> str:
    """
    Standard input where it is a pipe or a file, to its end.

    Other things that are no terminal, such as /dev/null or the socket of a service, are left alone.
    """
    if sys.stdin is None:
        return ""
    mode = os.fstat(sys.stdin.fileno()).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return ""
    return sys.stdin.buffer.read().decode(errors="replace").strip()


def _is_at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _converse(conversation: Conversation) -> int:
    """Turns until the user leaves."""
    sys.stdout.write(fitting(f"{conversation.wanted.model} listens. /help says what else there is.\n", sys.stdout))
    while True:
        try:
            text = _read()
        except EOFError:
            sys.stdout.write("\n")
            return 0
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            return INTERRUPTED
        if text == "/bye":
            return 0
        if text.startswith("/"):
            _obey(conversation, text)
        elif text:
            conversation.ask(text)


def _read() -> str:
    """One line, or what stands between triple quotes."""
    line = input(">>> ").strip()
    if not line.startswith(QUOTES):
        return line
    text = line.removeprefix(QUOTES)
    while not text.rstrip().endswith(QUOTES):
        text += "\n" + input("... ")
    return text.rstrip().removesuffix(QUOTES).strip()


def _obey(conversation: Conversation, text: str) -> None:
    command, _, rest = text.partition(" ")
    if command == "/model":
        conversation.switch(rest.strip())
    elif command == "/clear":
        conversation.clear()
    elif command == "/help":
        sys.stdout.write(COMMANDS)
    else:
        complain(f"{command} was not known. /help says what there is.")
