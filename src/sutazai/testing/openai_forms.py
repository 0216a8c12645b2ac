"""
The forms of OpenAI's answers, whole and as events; what servers do differently is in `Flavour`.

Sources: OpenAI's API reference; for llama.cpp what its server in xllamacpp 2026.10 sent; vLLM's and
Ollama's own code.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from sutazai.testing.machine import limited, words
from sutazai.testing.script import Answer, ToolCall
from sutazai.testing.steps import CloseIdle, End, Head, Part, Steps, TakeSlot, document, pause


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """What a server does in its own way."""

    event_type: str
    """The content type of a stream."""
    owner: str
    fingerprint: str | None
    knows_models: bool = True
    """False: it has one model and answers with it, whatever was asked for."""
    head_comes_first: bool = False
    """A stream's head is sent before there is a slot, not with the first token."""
    role_comes_first: bool = True
    """A chunk of its own tells the role; else every chunk repeats it."""
    calls_come_whole: bool = False
    """A tool call comes in one chunk; else its name first, then its arguments."""
    takes_n: bool = True
    thinking_field: str = "reasoning_content"
    closes_after_stream: bool = False
    """The connection is closed after a stream, though its head promised to keep it."""
    closes_after_error: bool = False
    error: Callable[[int, str], object]


def _vllm_error(status: int, message: str) -> object:
    names = {400: "BadRequestError", 404: "NotFoundError"}
    where = "model" if status == 404 else None
    return {"error": {"message": message, "type": names.get(status, "Error"), "param": where, "code": status}}


def _llamacpp_error(status: int, message: str) -> object:
    names = {400: "invalid_request_error", 404: "not_found_error"}
    return {"error": {"code": status, "message": message, "type": names.get(status, "server_error")}}


def _ollama_error(status: int, message: str) -> object:
    names = {400: "invalid_request_error", 404: "not_found_error"}
    return {"error": {"message": message, "type": names.get(status, "api_error"), "param": None, "code": None}}


VLLM = Flavour(
    event_type="text/event-stream; charset=utf-8",
    owner="vllm",
    fingerprint=None,
    head_comes_first=True,
    error=_vllm_error,
)
LLAMACPP = Flavour(
    event_type="text/event-stream",
    owner="llamacpp",
    fingerprint="b0-unknown",
    knows_models=False,
    closes_after_stream=True,
    closes_after_error=True,
    error=_llamacpp_error,
)
OLLAMA = Flavour(
    event_type="text/event-stream",
    owner="library",
    fingerprint="fp_ollama",
    role_comes_first=False,
    calls_come_whole=True,
    takes_n=False,
    thinking_field="reasoning",
    error=_ollama_error,
)


class StreamOptions(msgspec.Struct, frozen=True):
    """How to stream."""

    include_usage: bool | None = False


class Message(msgspec.Struct, frozen=True):
    """One message of a chat; its content may be a list of parts."""

    role: str = ""
    content: str | tuple[Mapping[str, Any], ...] | None = None

    def words(self) -> int:
        """Words in all of its text."""
        if isinstance(self.content, str):
            return words(self.content)
        return sum(words(str(part.get("text", ""))) for part in self.content or ())


class Body(msgspec.Struct, frozen=True):
    """Any inference request; each address has its own few of these fields."""

    model: str = ""
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[Any, ...] = ""
    input: str | tuple[Any, ...] = ""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = 1
    logprobs: bool | int | None = None
    encoding_format: str | None = None

    @property
    def limit(self) -> int | None:
        """Output tokens at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Form(ABC):
    """One chat or completion. Its fragments are choices without their index: all choices are the same."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    id_prefix: ClassVar[str]

    def __init__(
        self,
        flavour: Flavour,
        body: Body,
        model: str,
        number: int,
        answer: Answer,
        prompt_words: int,
        *,
        prompts: int = 1,
    ) -> None:
        self.body = body
        self.model = model
        self._flavour = flavour
        self._answer = answer
        self._prompt_words = prompt_words
        self._choices = range(prompts * ((body.n or 1) if flavour.takes_n else 1))
        self._tokens, self._cut_short = limited(answer, body.limit)
        self._envelope = {"id": f"{self.id_prefix}{number}", "created": int(time.time()), "model": model}
        if flavour.fingerprint:
            self._envelope["system_fingerprint"] = flavour.fingerprint

    @abstractmethod
    def full(self) -> dict[str, Any]:
        """A choice in one piece."""

    @abstractmethod
    def opening(self) -> Iterator[dict[str, Any]]:
        """What comes before the first token."""

    @abstractmethod
    def tokens(self) -> Iterator[dict[str, Any]]:
        """What comes token by token."""

    @abstractmethod
    def closing(self) -> dict[str, Any]:
        """What comes after the last token."""

    def streamed(self, slot: TakeSlot) -> Steps:
        """Events: opening, one for each token of each choice, closing, usage, the end mark."""
        head = Head(200, self._flavour.event_type)
        if self._flavour.head_comes_first:
            yield head
        yield slot
        yield from pause(self._answer.first_token_s)
        if not self._flavour.head_comes_first:
            yield head
        for fragment in self.opening():
            yield from self._events(fragment)
        for number, fragment in enumerate(self.tokens()):
            if number:
                yield from pause(self._answer.between_s)
            yield from self._events(fragment, are_tokens=True)
        yield from self._events(self.closing())
        yield from self._last_words()

    def whole(self, slot: TakeSlot) -> Steps:
        """All in one piece, after the same time."""
        yield slot
        pauses = max(0, self._count() - 1)
        yield from pause(self._answer.first_token_s + self._answer.between_s * pauses)
        full = self.full()
        choices = [{"index": index} | full for index in self._choices]
        answer = self._envelope | {"object": self.kind, "choices": choices}
        yield from document(200, answer | ({"usage": self._usage()} if self._answer.tells_usage else {}))

    def reason(self) -> str:
        """Why it stopped."""
        return "length" if self._cut_short else "stop"

    def _events(self, fragment: dict[str, Any], *, are_tokens: bool = False) -> Steps:
        """The same event for each choice; the first one counts as the token."""
        for index in self._choices:
            yield Part(self._event({"choices": [{"index": index} | fragment]}), are_tokens and index == 0)

    def _last_words(self) -> Steps:
        options = self.body.stream_options
        if self._answer.tells_usage and options is not None and options.include_usage:
            yield Part(self._event({"choices": [], "usage": self._usage()}))
        yield Part(b"data: [DONE]\n\n")
        yield End()
        if self._flavour.closes_after_stream:
            yield CloseIdle(0)

    def _event(self, content: dict[str, Any]) -> bytes:
        event = self._envelope | {"object": self.chunk_kind} | content
        return b"data: " + msgspec.json.encode(event) + b"\n\n"

    def _count(self) -> int:
        return len(self._answer.thinking) + len(self._tokens)

    def _usage(self) -> dict[str, int]:
        told = self._answer.prompt_tokens
        taken = self._prompt_words if told is None else told
        given = self._count() * len(self._choices)
        return {"prompt_tokens": taken, "completion_tokens": given, "total_tokens": taken + given}


class ChatForm(Form):
    """`/v1/chat/completions`."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def full(self) -> dict[str, Any]:
        """A choice in one piece."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._tokens)}
        if self._answer.thinking:
            message[self._flavour.thinking_field] = "".join(self._answer.thinking)
        if self._answer.tool_calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [_call(number, call) for number, call in enumerate(self._answer.tool_calls)]
        return {"message": message, "finish_reason": self.reason()} | self._logprobs(self._tokens)

    def opening(self) -> Iterator[dict[str, Any]]:
        """The role, where it has a chunk of its own."""
        if self._flavour.role_comes_first:
            yield {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def tokens(self) -> Iterator[dict[str, Any]]:
        """Thoughts, tokens, then tool calls."""
        for thought in self._answer.thinking:
            yield self._fragment({self._flavour.thinking_field: thought})
        for token in self._tokens:
            yield self._fragment({"content": token}) | self._logprobs((token,))
        for number, call in enumerate(self._answer.tool_calls):
            for piece in (_call(number, call),) if self._flavour.calls_come_whole else _call_pieces(number, call):
                yield self._fragment({"tool_calls": [piece]})

    def closing(self) -> dict[str, Any]:
        """The reason to stop."""
        return self._fragment({"content": ""}) | {"finish_reason": self.reason()}

    def reason(self) -> str:
        """Why it stopped."""
        return "tool_calls" if self._answer.tool_calls else super().reason()

    def _fragment(self, delta: dict[str, Any]) -> dict[str, Any]:
        role = {} if self._flavour.role_comes_first else {"role": "assistant", "content": ""}
        return {"delta": role | delta, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[str]) -> dict[str, Any]:
        if not self.body.logprobs:
            return {}
        content = [
            {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []} for token in tokens
        ]
        return {"logprobs": {"content": content, "refusal": None}}


class CompletionForm(Form):
    """`/v1/completions`."""

    kind = "text_completion"
    chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def full(self) -> dict[str, Any]:
        """A choice in one piece."""
        return self._fragment(self._tokens, self.reason())

    def opening(self) -> Iterator[dict[str, Any]]:
        """Nothing."""
        return iter(())

    def tokens(self) -> Iterator[dict[str, Any]]:
        """The tokens."""
        return (self._fragment((token,), None) for token in self._tokens)

    def closing(self) -> dict[str, Any]:
        """The reason to stop."""
        return self._fragment((), self.reason())

    def _fragment(self, tokens: Sequence[str], reason: str | None) -> dict[str, Any]:
        return {"text": "".join(tokens), "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[str]) -> dict[str, Any] | None:
        # 0 asks for the chosen tokens alone; false is what chat clients send.
        if self.body.logprobs is None or self.body.logprobs is False:
            return None
        return {
            "tokens": tokens,
            "token_logprobs": [-0.5] * len(tokens),
            "top_logprobs": [{token: -0.5} for token in tokens],
            "text_offset": list(itertools.accumulate((len(token) for token in tokens[:-1]), initial=0)),
        }


def _call(number: int, call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": msgspec.json.encode(call.arguments).decode()}
    return {"index": number, "id": f"call_{number}", "type": "function", "function": function}


def _call_pieces(number: int, call: ToolCall) -> Iterator[dict[str, Any]]:
    """The name, then the arguments in two halves."""
    whole = _call(number, call)
    arguments = whole["function"]["arguments"]
    yield whole | {"function": {"name": call.name, "arguments": ""}}
    half = len(arguments) // 2
    for piece in (arguments[:half], arguments[half:]):
        yield {"index": number, "function": {"arguments": piece}}
