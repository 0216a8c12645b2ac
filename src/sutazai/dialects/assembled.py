"""
The stream of an OpenAI node put together again: the one object that the same request without `stream` would have given.

For llama.cpp, which notices that a client left only while it streams to it: see `for_llamacpp`. The forms are those
that its server has for whole answers; where OpenAI's differ, they are said.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from sutazai.core.request import Endpoint, Operation, Usage
from sutazai.dialects.complaints import FAULTS
from sutazai.dialects.errors import error_message
from sutazai.dialects.framing import MAX_REPLY_BYTES, Events, Untranslatable
from sutazai.dialects.from_ollama import usage_in_words
from sutazai.dialects.from_openai import RepliesFromOpenAI
from sutazai.dialects.openai_answers import CalledFunction, Counts

_OBJECTS: Final = {Operation.CHAT: "chat.completion", Operation.COMPLETION: "text_completion"}
_NULL: Final = Raw(b"null")
_TOKEN_BYTES: Final = 128
_ENTRY_BYTES: Final = 1024
"""What a token with its probability, and a choice, a call or a field, count against the limit beside their text."""


class ToolCallPiece(msgspec.Struct, frozen=True):
    """A call of a tool, or a piece of one; pieces of one call have one index."""

    index: int | None = None
    id: str | None = None
    type: str | None = None
    function: CalledFunction | None = None


class Delta(msgspec.Struct, frozen=True):
    """A piece of a message. A text that is null is told apart from one that is missing."""

    role: str | None = None
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    refusal: str | UnsetType | None = UNSET
    tool_calls: list[ToolCallPiece] | None = None


Logprobs = dict[str, list[Raw] | None]
"""Lists that run along the tokens: `content` and `refusal`, or the four of a completion."""


class ChoicePiece(msgspec.Struct, frozen=True):
    """A piece of one of the answers."""

    index: int = 0
    delta: Delta | None = None
    text: str | None = None
    logprobs: Logprobs | UnsetType | None = UNSET
    finish_reason: str | None = None


_fields = msgspec.json.Decoder(dict[str, Raw] | None)
_choices = msgspec.json.Decoder(list[ChoicePiece] | None)
_counts = msgspec.json.Decoder(Counts | None)
_encode = msgspec.json.Encoder().encode


class Assembled:
    """
    Puts one answer together; `feed` its events as they come, then `finish`.

    Both raise `Untranslatable`: for an error among the events with its message, and for a stream that broke off, grew
    too large or was none.
    """

    content_type = b"application/json; charset=utf-8"
    usage: Usage | None
    """Tokens the answer took; None until the end, or where the node did not tell."""

    def __init__(self, endpoint: Endpoint, *, limit_bytes: int = MAX_REPLY_BYTES) -> None:
        """
        Args:
            endpoint: the chat or the completion of the OpenAI API that was asked.
            limit_bytes: how much of an answer is kept; characters of text count as one.
        """
        self.usage = None
        self._endpoint = endpoint
        self._events = Events(limit_bytes)
        self._fields: dict[str, Raw] = {}
        """All beside the choices, from the last event that had it."""
        self._choices: dict[int, _Choice] = {}
        self._room = _Room(limit_bytes)
        self._ended = False
        self._is_counted_by_choice = False
        """Whether the last count of tokens came with a choice: it is of that one alone."""

    def feed(self, data: bytes) -> bytes:
        """The next piece of the node's body, split anywhere. Nothing can be sent before the end."""
        for event in self._events.feed(data):
            self._take(event)
        return b""

    def finish(self) -> bytes:
        """The node's body is complete: the whole answer."""
        for event in self._events.rest():
            self._take(event)
        if not self._fields and not self._ended:
            raise Untranslatable("The answer was no stream of events.")
        if not self._ended or not all(choice.is_finished for choice in self._choices.values()):
            raise Untranslatable("The answer broke off before its end.")
        if not self._choices:
            raise Untranslatable("The answer had no choices.")
        self.usage = _usage(self._fields.get("usage"))
        is_chat = self._endpoint.operation is Operation.CHAT
        choices = [self._choices[index].whole(index, is_chat=is_chat) for index in sorted(self._choices)]
        fields = {**self._fields, "object": _OBJECTS[self._endpoint.operation], "choices": choices}
        return _encode(fields | self._sum(choices) if self._is_counted_by_choice and not is_chat else fields)

    def _take(self, event: bytes) -> None:
        if self._ended:
            return
        if event.strip() == b"[DONE]":
            self._ended = True
            return
        fields, choices = _read(event)
        if fields.get("error", _NULL) != _NULL or ("message" in fields and not choices):
            raise Untranslatable(error_message(event))
        self._keep(fields)
        for piece in choices:
            choice = self._choices.get(piece.index)
            if choice is None:
                self._room.take(_ENTRY_BYTES)
                choice = self._choices[piece.index] = _Choice(self._room)
            choice.add(piece)
        if (usage := fields.get("usage", _NULL)) != _NULL:
            self._is_counted_by_choice = bool(choices)
            for piece in choices:
                self._choices[piece.index].usage = usage

    def _sum(self, choices: Sequence[dict[str, object]]) -> dict[str, object]:
        """
        The tokens of all prompts of a completion, of which llama.cpp counts each for itself.

        Each choice keeps its own count beside it: see `batches`.
        """
        counts = [_usage(self._choices[index].usage) for index in sorted(self._choices)]
        if len(counts) < 2 or None in counts:
            return {}
        for choice, index in zip(choices, sorted(self._choices), strict=True):
            choice["usage"] = self._choices[index].usage
        told = [count for count in counts if count is not None]
        self.usage = Usage(sum(one.input_tokens for one in told), sum(one.output_tokens for one in told))
        return {"usage": usage_in_words(self.usage)}

    def _keep(self, fields: Mapping[str, Raw]) -> None:
        known = len(self._fields)
        for name, value in fields.items():
            # OpenAI sends a usage of null until it knows
            if value != _NULL or name not in self._fields:
                self._fields[name] = value
        self._room.take(_ENTRY_BYTES * (len(self._fields) - known))


class AssembledForOllama:
    """
    Puts an answer together and says it in the words of the Ollama API: `Assembled`, then `RepliesFromOpenAI`.

    `feed` and `finish` raise `Untranslatable`.
    """

    content_type: bytes
    usage: Usage | None
    """Tokens the answer took; None until the end."""

    def __init__(self, endpoint: Endpoint, replies: RepliesFromOpenAI) -> None:
        """`endpoint` is what the node was asked; `replies` makes an answer that does not stream."""
        self.content_type = replies.content_type
        self.usage = None
        self._assembled = Assembled(endpoint)
        self._replies = replies
        self.feed = self._assembled.feed

    def finish(self) -> bytes:
        """The node's body is complete: the whole answer."""
        self._replies.feed(self._assembled.finish())
        body = self._replies.finish()
        self.usage = self._replies.usage
        return body


class _Room:
    """How much more of an answer may be kept."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._left_bytes = limit_bytes

    def take(self, size_bytes: int) -> None:
        """Raises `Untranslatable` where it is used up."""
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            raise Untranslatable(f"The answer was larger than {self._limit_bytes} bytes; ask for a stream.")


class _Choice:
    """One of the answers, as far as it has come."""

    def __init__(self, room: _Room) -> None:
        self._room = room
        self._role = "assistant"
        self._texts: dict[str, io.StringIO | None] = {}
        """By field of the message, `text` for a completion; None where only a null has come."""
        self._calls: dict[int, _Call] = {}
        self._logprobs: Logprobs | UnsetType | None = UNSET
        self._finish_reason: str | None = None
        self.usage: Raw | None = None
        """What the node counted for this choice alone, if it did."""

    @property
    def is_finished(self) -> bool:
        """Whether the node told why it stopped."""
        return self._finish_reason is not None

    def add(self, piece: ChoicePiece) -> None:
        """The next piece."""
        delta = piece.delta
        if delta is not None:
            self._role = delta.role or self._role
            self._write("content", delta.content)
            self._write("reasoning_content", delta.reasoning_content)
            self._write("refusal", delta.refusal)
            for place, call in enumerate(delta.tool_calls or ()):
                self._call(place if call.index is None else call.index, call)
        elif piece.text:
            self._write("text", piece.text)
        if piece.logprobs is not UNSET:
            self._like(piece.logprobs)
        if piece.finish_reason is not None:
            self._finish_reason = piece.finish_reason

    def whole(self, index: int, *, is_chat: bool) -> dict[str, object]:
        """The choice as a whole answer has it."""
        texts = {name: None if text is None else text.getvalue() for name, text in self._texts.items()}
        said: dict[str, object]
        if is_chat:
            # llama.cpp begins with a null and then means an empty text; OpenAI leaves the null beside tool calls
            message: dict[str, object] = {"role": self._role, **texts, "content": texts.get("content") or ""}
            if self._calls:
                message["tool_calls"] = [self._calls[number].whole() for number in sorted(self._calls)]
            said = {"message": message}
        else:
            said = {"text": texts.get("text", ""), "logprobs": None}
        if self._logprobs is not UNSET:
            said["logprobs"] = self._logprobs
        return {"index": index, **said, "finish_reason": self._finish_reason}

    def _write(self, field: str, text: str | UnsetType | None) -> None:
        if isinstance(text, str):
            self._room.take(len(text))
            written = self._texts.get(field)
            if written is None:
                written = self._texts[field] = io.StringIO()
            written.write(text)
        elif text is None:
            self._texts.setdefault(field, None)

    def _call(self, index: int, piece: ToolCallPiece) -> None:
        call = self._calls.get(index)
        if call is None:
            self._room.take(_ENTRY_BYTES)
            call = self._calls[index] = _Call()
        self._room.take(call.add(piece))

    def _like(self, logprobs: Logprobs | UnsetType | None) -> None:
        """How likely the tokens of a piece were; null in pieces without any."""
        if not isinstance(logprobs, dict):
            if self._logprobs is UNSET:
                self._logprobs = None
            return
        if not isinstance(self._logprobs, dict):
            self._logprobs = {}
        for name, entries in logprobs.items():
            known = self._logprobs.setdefault(name, None)
            if entries is None:
                continue
            self._room.take(sum(_TOKEN_BYTES + memoryview(entry).nbytes for entry in entries))
            if known is None:
                self._logprobs[name] = entries
            else:
                known.extend(entries)


class _Call:
    """One call of a tool, as far as it has come."""

    def __init__(self) -> None:
        self._id = ""
        self._type = "function"
        self._name = ""
        self._arguments = io.StringIO()

    def add(self, piece: ToolCallPiece) -> int:
        """The next piece, and how many characters it has. llama.cpp repeats a name that grew, from its beginning."""
        self._id = piece.id or self._id
        self._type = piece.type or self._type
        if piece.function is None:
            return 0
        self._name = piece.function.name or self._name
        return self._arguments.write(piece.function.arguments or "")

    def whole(self) -> dict[str, object]:
        """The call as a whole answer has it: without its index, and without an id where none was told."""
        function = {"name": self._name, "arguments": self._arguments.getvalue()}
        call: dict[str, object] = {"type": self._type, "function": function}
        return call | {"id": self._id} if self._id else call


def _read(event: bytes) -> tuple[dict[str, Raw], list[ChoicePiece]]:
    """What an event says beside its choices, and those; llama.cpp begins the stream of some prompts with a null."""
    try:
        fields = _fields.decode(event) or {}
        choices = fields.pop("choices", _NULL)
        return fields, _choices.decode(choices) or []
    except FAULTS as error:
        raise Untranslatable(f"The answer could not be read: {error}") from error


def _usage(counts: Raw | None) -> Usage | None:
    if counts is None:
        return None
    try:
        told = _counts.decode(counts)
    except FAULTS:
        return None
    return None if told is None else Usage(max(0, told.prompt_tokens or 0), max(0, told.completion_tokens or 0))
