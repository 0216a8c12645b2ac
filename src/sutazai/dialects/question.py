"""What is asked, as text: the last words of the user in a request of any form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import msgspec
from msgspec import Raw

from sutazai.core.errors import BadRequest
from sutazai.core.request import Endpoint, Operation, Question
from sutazai.dialects import ollama_shapes, openai_shapes
from sutazai.dialects.complaints import decoded

_TEXT: Final = msgspec.json.Decoder(str)
_ANY_LIST: Final = msgspec.json.Decoder(list[Raw])
_QUOTE: Final = ord('"')
_BRACKET: Final = ord("[")


def question_of(endpoint: Endpoint, body: bytes) -> Question:
    """
    The question in a request that was read before.

    Raises `BadRequest` where there is none (an embedding), and for a text that is no Unicode, which nobody looked at.
    """
    if endpoint.operation is Operation.EMBEDDING:
        raise BadRequest(
            "A model for embeddings is not chosen by the text; name one that `GET /v1/models` lists.", where="model"
        )
    return _READERS[endpoint.path](body)


def _openai_chat(body: bytes) -> Question:
    chat = openai_shapes.read_chat(body)
    contents = [message.content for message in chat.messages if message.role == "user"]
    last = contents[-1] if contents else chat.messages[-1].content
    text, images = _openai_content(last)
    return Question(text=text, turns=len(chat.messages), tools=_count(chat.tools), images=images)


def _openai_content(content: Raw) -> tuple[str, int]:
    if not content or memoryview(content)[0] != _BRACKET:
        return _text(content), 0
    parts = openai_shapes.parts_of(content, "messages")
    texts = [_text(part.text) for part in parts if part.type == "text"]
    return "\n".join(texts), sum(part.type == "image_url" for part in parts)


def _openai_completion(body: bytes) -> Question:
    return Question(text=_text(openai_shapes.read_completion(body).prompt))


def _ollama_chat(body: bytes) -> Question:
    chat = ollama_shapes.read_chat(body)
    asked = [message for message in chat.messages or () if message.role == "user"]
    last = asked[-1] if asked else None
    return Question(
        text=_text(last.content) if last is not None else "",
        turns=len(chat.messages or ()),
        tools=_count(chat.tools),
        images=len(last.images or ()) if last is not None else 0,
    )


def _ollama_generate(body: bytes) -> Question:
    generate = ollama_shapes.read_generate(body)
    return Question(text=_text(generate.prompt), images=len(generate.images or ()))


def _text(value: Raw) -> str:
    """A string, or the strings of a list, or nothing."""
    if not value:
        return ""
    first = memoryview(value)[0]
    if first == _QUOTE:
        return decoded(_TEXT, value)
    return "\n".join(_strings(decoded(_ANY_LIST, value))) if first == _BRACKET else ""


def _strings(values: list[Raw]) -> list[str]:
    return [decoded(_TEXT, value) for value in values if memoryview(value)[0] == _QUOTE]


def _count(tools: Raw) -> int:
    return len(decoded(_ANY_LIST, tools)) if tools and memoryview(tools)[0] == _BRACKET else 0


_READERS: Final[Mapping[str, Callable[[bytes], Question]]] = {
    Endpoint.OPENAI_CHAT.path: _openai_chat,
    Endpoint.OPENAI_COMPLETION.path: _openai_completion,
    Endpoint.OLLAMA_CHAT.path: _ollama_chat,
    Endpoint.OLLAMA_GENERATE.path: _ollama_generate,
}
