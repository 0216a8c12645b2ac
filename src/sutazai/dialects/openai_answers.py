"""What an answer of the OpenAI API looks like, whole or in chunks; the counterpart of `ollama_answers`."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from sutazai.dialects.logprobs import OfCompletion
from sutazai.dialects.openai_shapes import AnyObject


class CalledFunction(msgspec.Struct, frozen=True):
    """What the model calls, or a piece of it."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct, frozen=True):
    """A call, or a piece of one; pieces of one call have one index."""

    index: int | None = None
    function: CalledFunction | None = None


class Message(msgspec.Struct, frozen=True):
    """A turn, or a piece of one."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """The newer name of the same at vLLM."""
    tool_calls: list[ToolCall] | None = None

    @property
    def thinking(self) -> str | None:
        """What the model thought, by either name."""
        return self.reasoning_content or self.reasoning


class Choice(msgspec.Struct, frozen=True):
    """One of the answers, of which we ever ask for one."""

    delta: Message | None = None
    message: Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: OfCompletion | None = None

    @property
    def said(self) -> Message:
        """What this choice adds, whichever field it is in."""
        return self.delta or self.message or Message(content=self.text)


class Counts(msgspec.Struct, frozen=True):
    """Tokens taken."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Timings(msgspec.Struct, frozen=True):
    """What llama.cpp measured itself; `prompt_n` are the tokens that its cache did not have."""

    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0
    cache_n: int = 0


class Answer(msgspec.Struct, frozen=True):
    """A whole answer, or a chunk of one."""

    choices: list[Choice] = []
    usage: Counts | None = None
    timings: Timings | None = None
    error: str | AnyObject | None = None
    message: str | None = None

    @property
    def is_error(self) -> bool:
        """Whether it tells of a failure: under `error`, or by a message in place of choices."""
        return self.error is not None or (self.message is not None and not self.choices)


class Embedding(msgspec.Struct, frozen=True):
    """One vector: a list of numbers, or base64."""

    embedding: Raw
    index: int = 0


class Embeddings(msgspec.Struct, frozen=True):
    """The answer of `/v1/embeddings`."""

    data: list[Embedding]
    usage: Counts | None = None
