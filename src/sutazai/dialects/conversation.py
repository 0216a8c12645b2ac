"""
A turn of a kept conversation in OpenAI's words: the question as it came, the request it becomes, and its answer as a
message for the next one.

Messages stay JSON from end to end; only what decides about them (role, form) is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from sutazai.core.request import Endpoint
from sutazai.dialects import openai_shapes
from sutazai.dialects.complaints import FAULTS, decoded
from sutazai.dialects.framing import Untranslatable
from sutazai.dialects.reading import read

_NULL = Raw(b"null")
_DONE = re.compile(rb"^data: ?\[DONE\]", re.MULTILINE)
_DONE_FORMS = (b"data: [DONE]", b"data:[DONE]")


class Said(msgspec.Struct, frozen=True):
    """A message of an answer, as far as it matters to the next turn; what the model thought does not."""

    content: Raw = _NULL
    refusal: Raw = _NULL
    tool_calls: Raw = _NULL
    function_call: Raw = _NULL


class Choice(msgspec.Struct, frozen=True):
    """One of the answers."""

    message: Said


class WholeAnswer(msgspec.Struct, frozen=True):
    """The body of an answer that did not stream."""

    choices: list[Choice]


class Opened(msgspec.Struct, frozen=True):
    """What is looked at of a message."""

    role: str


_fields = msgspec.json.Decoder(dict[str, Raw])
_messages = msgspec.json.Decoder(list[Raw])
_role = msgspec.json.Decoder(Opened)
_anything: msgspec.json.Decoder[Any] = msgspec.json.Decoder()
_whole = msgspec.json.Decoder(WholeAnswer)
_encode = msgspec.json.Encoder().encode


class Question:
    """The new messages of a turn, and how they want to be answered."""

    def __init__(self, body: bytes, model: str) -> None:
        """
        Read the body of a turn; `model` answers where it names none.

        Raises `BadRequest`.
        """
        self._fields = decoded(_fields, body)
        self._fields.setdefault("model", Raw(_encode(model)))
        whole = _encode(self._fields)  # of a field that came twice, the one that counts is checked
        asked = read(Endpoint.OPENAI_CHAT, whole)
        chat = openai_shapes.read_chat(whole)
        self.model = asked.model
        self.stream = asked.stream
        longest = chat.max_tokens if chat.max_completion_tokens is None else chat.max_completion_tokens
        self.answer_tokens = longest
        """The longest answer that is wanted; None where that was not said."""
        self.tools = bytes(chat.tools)
        """JSON; empty where there are none."""
        self.messages: list[tuple[str, bytes]] = []
        """Roles and messages."""
        messages = decoded(_messages, self._fields["messages"], under="messages")
        for index, message in enumerate(messages):
            text = bytes(message)
            decoded(_anything, text, under=f"messages[{index}]")  # to the last character: it will be sent again
            self.messages.append((_role.decode(text).role, text))

    def among(self, messages: Iterable[bytes]) -> bytes:
        """The body of the request that asks it at the end of a conversation."""
        return _encode(self._fields | {"messages": Raw(b"[%b]" % b",".join(messages))})


def instructions(text: str) -> bytes:
    """The message that tells the model how to behave."""
    return _encode({"role": "system", "content": text})


def remembered(whole: bytes) -> bytes:
    """The message that a complete answer adds to its conversation. Raises `Untranslatable` where there is none."""
    try:
        choices = _whole.decode(whole).choices
    except FAULTS as error:
        raise Untranslatable(f"The answer could not be read: {error}") from error
    if not choices:
        raise Untranslatable("The answer had no choices.")
    said = choices[0].message
    fields: dict[str, object] = {"role": "assistant", "content": said.content}
    for name in ("refusal", "tool_calls", "function_call"):
        value: Raw = getattr(said, name)
        if value != _NULL:
            fields[name] = value
    if said.content == _NULL and len(fields) == 2:
        fields["content"] = ""  # servers refuse a message that says nothing in no way
    return _encode(fields)


def as_list(messages: Sequence[bytes]) -> bytes:
    """Messages as OpenAI lists things."""
    return b'{"object":"list","data":[%b]}' % b",".join(messages)


class UpToDone:
    """Holds back the end of a stream, `[DONE]`, until it may be sent."""

    def __init__(self) -> None:
        self._begun = b""
        """Of a line that may become the end."""
        self._at_line_start = True
        self.rest = b""
        """The end, and what came after it."""

    def pass_on(self, data: bytes) -> bytes:
        """What may be sent of the stream, with the next part of it."""
        if self.rest:
            self.rest += data
            return b""
        data, self._begun = self._begun + data, b""
        from_line = 0 if self._at_line_start else data.find(b"\n") + 1
        found = _DONE.search(data, from_line) if from_line or self._at_line_start else None
        if found is not None:
            self.rest = data[found.start() :]
            return data[: found.start()]
        start = data.rfind(b"\n") + 1
        if not start and not self._at_line_start:
            return data
        line = data[start:]
        if line and any(form.startswith(line) for form in _DONE_FORMS):
            self._begun, data = line, data[:start]
        self._at_line_start = not line or bool(self._begun)
        return data
