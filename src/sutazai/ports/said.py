"""The way of a question through the port `Models`: the body that is sent, and what is read out of the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from sutazai.core.errors import BadRequest, NodeFault
from sutazai.ports.agent import EMBEDDING, Answer, Said

ANY_MODEL = "auto"
"""What is asked for where the agent named no model."""


def asked_in(endpoint: str, body: Mapping[str, Any]) -> bytes:
    """The body to send: answered whole, by any model where none is named. Raises `BadRequest` for what is no JSON."""
    whole = {} if endpoint == EMBEDDING else {"stream": False}  # which strict servers do not know of embeddings
    try:
        return msgspec.json.encode({**body, "model": body.get("model") or ANY_MODEL, **whole})
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"The question could not be written as JSON: {error}.") from error


def answer_in(body: bytes, *, node: str) -> Answer:
    """An answer of any address, with what it took. Raises `NodeFault` naming `node`."""
    try:
        usage = _ANY_DECODER.decode(body).usage or _Usage()
        line = msgspec.json.format(body, indent=-1)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NodeFault(f"The answer was not in OpenAI's form: {error}. Ask again.", node=node) from error
    return Answer(body=line, input_tokens=usage.prompt_tokens or 0, output_tokens=usage.completion_tokens or 0)


def said_in(body: bytes, *, node: str) -> Said:
    """What an answer of `/v1/chat/completions` says. Raises `NodeFault` naming `node`."""
    try:
        answer, whole = _DECODER.decode(body), msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NodeFault(f"The answer was no chat completion: {error}. Ask again.", node=node) from error
    if not answer.choices:
        raise NodeFault("The answer held no choice. Ask again.", node=node)
    message = answer.choices[0].message
    content, calls = message.get("content"), message.get("tool_calls")
    return Said(
        text=content if isinstance(content, str) else "",
        tool_calls=[call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else (),
        message=message,
        model=answer.model,
        input_tokens=(answer.usage or _Usage()).prompt_tokens or 0,
        output_tokens=(answer.usage or _Usage()).completion_tokens or 0,
        body=whole,
    )


class _Choice(msgspec.Struct):
    message: dict[str, Any]


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    model: str = ""
    usage: _Usage | None = None


class _AnyAnswer(msgspec.Struct):
    usage: _Usage | None = None


_ANY_DECODER = msgspec.json.Decoder(_AnyAnswer)
_DECODER = msgspec.json.Decoder(_Answer)
