"""What an answer of the Ollama API looks like, whole or line by line; the counterpart of `openai_answers`."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from sutazai.dialects.logprobs import Likely
from sutazai.dialects.openai_shapes import AnyObject


class CalledFunction(msgspec.Struct, frozen=True):
    """What the model calls."""

    name: str
    arguments: Raw = Raw(b"{}")


class ToolCall(msgspec.Struct, frozen=True):
    """One call."""

    function: CalledFunction


class Message(msgspec.Struct, frozen=True):
    """A turn, or a piece of one."""

    content: str | None = None
    thinking: str | None = None
    tool_calls: list[ToolCall] | None = None


class Answer(msgspec.Struct, frozen=True):
    """One line of a stream, or a whole answer, of chat or generate."""

    message: Message | None = None
    response: str | None = None
    thinking: str | None = None
    done: bool = False
    done_reason: str | None = None
    logprobs: list[Likely] | None = None
    prompt_eval_count: int | None = None
    eval_count: int | None = None
    error: str | AnyObject | None = None


class Vectors(msgspec.Struct, frozen=True):
    """The answer of `/api/embed`."""

    embeddings: list[Raw]
    prompt_eval_count: int | None = None
