"""
What a request of the Ollama API looks like, as far as we know it; the counterpart of `openai_shapes`.

Ollama takes every number of `options` as a float and cuts it where it wants a whole one, so both are accepted
here.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw

from sutazai.core.errors import BadRequest
from sutazai.dialects.complaints import decoded, wrong_type
from sutazai.dialects.openai_shapes import (
    BRACKET,
    NULL,
    QUOTE,
    AnyObject,
    Shape,
    check_tools,
)

LOAD_OPTIONS = (
    "num_ctx",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "use_mmap",
    "use_mlock",
    "low_vram",
    "f16_kv",
    "numa",
    "vocab_only",
)
"""Options that are fixed when a model is loaded: another value of one reloads the model for everybody."""

_NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/=\\]")
_BLANK = re.compile(rb'null|""|\[\s*\]')
_LOOKED_AT = 64
"""Bytes of an image that are checked: enough to see a data URL or a file name."""


class Options(Shape, frozen=True, kw_only=True):
    """The `options` of a request."""

    num_ctx: Annotated[float, Meta(ge=0, le=2_147_483_647)] | None = None
    num_batch: float | None = None
    num_gpu: float | None = None
    main_gpu: float | None = None
    num_thread: float | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    numa: bool | None = None
    vocab_only: bool | None = None
    num_keep: float | None = None
    num_predict: float | None = None
    seed: float | None = None
    temperature: float | None = None
    top_k: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_last_n: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: float | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    stop: list[str] | None = None

    @property
    def context_tokens(self) -> int:
        """The context length asked for; 0 where none is."""
        return int(self.num_ctx or 0)

    @property
    def forces_a_load(self) -> bool:
        """Whether any of `LOAD_OPTIONS` is set; null leaves an option unset."""
        return any(getattr(self, name) is not None for name in LOAD_OPTIONS)


class CalledFunction(Shape, frozen=True):
    """What an assistant called."""

    name: str
    arguments: Raw = Raw()


class ToolCall(Shape, frozen=True):
    """One call of an assistant's message."""

    function: CalledFunction
    id: str | None = None


class Message(Shape, frozen=True):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "control"]
    content: Raw = Raw()
    thinking: Raw = Raw()
    images: list[Raw] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Common(Shape, frozen=True, kw_only=True):
    """What all four requests have in common."""

    model: str
    options: Options | None = None
    keep_alive: str | float | None = None


class Answering(Common, frozen=True, kw_only=True):
    """What chat and generate have in common."""

    stream: bool | None = None
    format: Raw = Raw()
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class Chat(Answering, frozen=True, kw_only=True):
    """The body of `/api/chat`; without messages it only loads the model."""

    messages: list[Message] | None = None
    tools: Raw = Raw()


class Generate(Answering, frozen=True, kw_only=True):
    """The body of `/api/generate`; without a prompt it only loads the model."""

    prompt: Raw = Raw()
    suffix: str | None = None
    system: Raw = Raw()
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[Raw] | None = None


class Embed(Common, frozen=True, kw_only=True):
    """The body of `/api/embed`; without an input it only loads the model."""

    input: Raw = Raw()
    truncate: bool | None = None
    dimensions: int | None = None


class Embeddings(Common, frozen=True, kw_only=True):
    """The body of `/api/embeddings`; without a prompt it only loads the model."""

    prompt: Raw = Raw()


_CHAT = msgspec.json.Decoder(Chat)
_GENERATE = msgspec.json.Decoder(Generate)
_EMBED = msgspec.json.Decoder(Embed)
_EMBEDDINGS = msgspec.json.Decoder(Embeddings)
_TEXTS = msgspec.json.Decoder(list[str])
_FORMAT = msgspec.json.Decoder(str | AnyObject | None)


def read_chat(body: bytes) -> Chat:
    """The chat request in `body`, checked; raises `BadRequest`."""
    chat = decoded(_CHAT, body)
    for index, message in enumerate(chat.messages or ()):
        if message.content and memoryview(message.content)[0] != QUOTE:
            _check_text(message.content, f"messages[{index}].content")
        if message.images:
            _check_images(message.images, f"messages[{index}].images")
    if chat.tools:
        check_tools(chat.tools)
    _check_format(chat.format)
    return chat


def read_generate(body: bytes) -> Generate:
    """The generate request in `body`, checked; raises `BadRequest`."""
    generate = decoded(_GENERATE, body)
    _check_text(generate.prompt, "prompt")
    _check_text(generate.system, "system")
    if generate.images:
        _check_images(generate.images, "images")
    _check_format(generate.format)
    return generate


def read_embed(body: bytes) -> Embed:
    """The embed request in `body`, checked; raises `BadRequest`."""
    embed = decoded(_EMBED, body)
    if embed.input and memoryview(embed.input)[0] == BRACKET:
        decoded(_TEXTS, embed.input, under="input")
    elif embed.input and memoryview(embed.input)[0] not in {QUOTE, NULL}:
        raise wrong_type("input", "a string or a list of strings", embed.input)
    return embed


def read_embeddings(body: bytes) -> Embeddings:
    """The request of the older form of embed in `body`, checked; raises `BadRequest`."""
    embeddings = decoded(_EMBEDDINGS, body)
    _check_text(embeddings.prompt, "prompt")
    return embeddings


def is_blank(value: Raw) -> bool:
    """Whether a text or a list is missing, null or empty."""
    return not value or _BLANK.fullmatch(value) is not None


def _check_text(value: Raw, where: str) -> None:
    if value and memoryview(value)[0] not in {QUOTE, NULL}:
        raise wrong_type(where, "a string", value)


def _check_format(value: Raw) -> None:
    if value:
        decoded(_FORMAT, value, under="format")


def _check_images(images: list[Raw], where: str) -> None:
    for index, image in enumerate(images):
        place = f"{where}[{index}]"
        if memoryview(image)[0] != QUOTE:
            raise wrong_type(place, "a string", image)
        if _NOT_BASE64.search(memoryview(image)[1:-1][:_LOOKED_AT]):
            raise BadRequest(f"{place} must be base64 alone, without a data URL or a file name.", where=place)
