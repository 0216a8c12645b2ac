"""
Requests of the OpenAI API as llama.cpp's server serves them best.

Its server notices that a client left only while it streams to it: an answer that does not stream is worked out to its
end for nobody (llama.cpp issue 24496). So the gateway asks for a stream, and `assembled` makes one answer of it.
"""

from __future__ import annotations

import msgspec
from msgspec import Raw

from sutazai.core.errors import BadRequest
from sutazai.dialects.complaints import decoded
from sutazai.dialects.openai_shapes import BRACE, Shape, Tool


class Turn(Shape, frozen=True):
    """Whose turn a message is."""

    role: str


class Conversation(Shape, frozen=True):
    """The messages of a chat."""

    messages: list[Turn]


_fields = msgspec.json.Decoder(dict[str, Raw])
_options = msgspec.json.Decoder(dict[str, Raw] | None)
_raws = msgspec.json.Decoder(list[Raw] | None)
_tools = msgspec.json.Decoder(list[Tool] | None)
_choice = msgspec.json.Decoder(Tool)
_conversation = msgspec.json.Decoder(Conversation)
_NULL, _TRUE = Raw(b"null"), Raw(b"true")
_encode = msgspec.json.Encoder().encode


def streamed(body: bytes) -> bytes | None:
    """
    The same chat or completion as a stream that tells its tokens; all other values are copied byte for byte.

    None for a chat that asks how likely its tokens were: the stream of one leaves out the tokens that llama.cpp held
    back (the beginning of what may become a stop string) or did not show, and beside tools it is refused. Raises
    `BadRequest` where `body` is no object.
    """
    fields = decoded(_fields, body)
    if fields.get("logprobs") == _TRUE:
        return None
    options = decoded(_options, fields.get("stream_options", _NULL), under="stream_options") or {}
    return _encode({**fields, "stream": True, "stream_options": {**options, "include_usage": True}})


def continues_a_turn(body: bytes) -> bool:
    """
    Whether the last message of a chat is the assistant's own, to be continued.

    A whole answer of llama.cpp repeats that message before what follows it, a stream does not; so one cannot be made
    of the other. Raises `BadRequest`.
    """
    if b'"assistant"' not in body:
        return False
    messages = decoded(_conversation, body).messages
    return bool(messages) and messages[-1].role == "assistant"


def with_forced_tool(body: bytes) -> bytes:
    """
    The same chat with a tool that `tool_choice` names as the only one, and required.

    llama.cpp takes a named tool as `auto`. A chat that names none is given back as it is. Raises `BadRequest` where
    the name is not among the tools.
    """
    if b'"tool_choice"' not in body:
        return body
    fields = decoded(_fields, body)
    wanted = fields.get("tool_choice")
    if wanted is None or memoryview(wanted)[0] != BRACE:
        return body
    function = decoded(_choice, wanted, under="tool_choice").function
    if function is None:
        return body
    tools = fields.get("tools", _NULL)
    offered = decoded(_tools, tools, under="tools") or []
    copied = decoded(_raws, tools, under="tools") or []
    named = [
        raw
        for raw, tool in zip(copied, offered, strict=True)
        if tool.function is not None and tool.function.name == function.name
    ]
    if not named:
        message = f"tool_choice names {function.name[:200]!r}, which is not among the tools."
        raise BadRequest(message, where="tool_choice")
    return _encode({**fields, "tools": named, "tool_choice": "required"})
