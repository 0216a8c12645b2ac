"""
What a request of the OpenAI API looks like, as far as we know it: the types of its fields, and nothing that
we do not need.

Whatever may be large (a message, a prompt, a list of tools) stays raw JSON, of which only the first byte is
looked at: making a Python string of a prompt costs more than all else that the gateway does with it. Fields
that are not named here are skipped.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw

from sutazai.core.errors import BadRequest
from sutazai.dialects.complaints import decoded, missing, wrong_type

QUOTE, BRACKET, BRACE, NULL = ord('"'), ord("["), ord("{"), ord("n")

Count = Annotated[int, Meta(ge=0)]


class Shape(msgspec.Struct, frozen=True, gc=False):
    """A JSON object with known fields; others are skipped."""


class AnyObject(Shape, frozen=True):
    """A JSON object that nobody looks into."""


class CalledFunction(Shape, frozen=True):
    """What an assistant called."""

    name: str
    arguments: Raw = Raw()
    """A JSON string that holds JSON; some clients send the object itself."""


class ToolCall(Shape, frozen=True):
    """One call of an assistant's message."""

    id: str | None = None
    type: str | None = None
    function: CalledFunction | None = None


class Message(Shape, frozen=True):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Raw = Raw()
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: CalledFunction | None = None
    reasoning_content: Raw = Raw()
    reasoning: Raw = Raw()


class Part(Shape, frozen=True):
    """A piece of a message that is not one string."""

    type: str
    text: Raw = Raw()
    refusal: Raw = Raw()
    image_url: Raw = Raw()


class ImageUrl(Shape, frozen=True):
    """Where an image is."""

    url: str


class ToolFunction(Shape, frozen=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: AnyObject | None = None


class Tool(Shape, frozen=True):
    """One entry of `tools`."""

    type: str | None = None
    function: ToolFunction | None = None


class JsonSchema(Shape, frozen=True):
    """The schema that an answer must follow."""

    name: str | None = None
    schema: Raw = Raw()


class ResponseFormat(Shape, frozen=True):
    """What form the answer must have."""

    type: str
    json_schema: JsonSchema | None = None


class StreamOptions(Shape, frozen=True):
    """How to stream."""

    include_usage: bool | None = None


class Sampling(Shape, frozen=True, kw_only=True):
    """What chat and completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: Count | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    # Not OpenAI's, but understood by vLLM, llama.cpp or Ollama.
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    options: dict[str, Raw] | None = None
    keep_alive: str | float | None = None


class Chat(Sampling, frozen=True, kw_only=True):
    """The body of `/v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Raw = Raw()
    tool_choice: Raw = Raw()
    parallel_tool_calls: bool | None = None
    functions: list[AnyObject] | None = None
    reasoning_effort: str | None = None


class Completion(Sampling, frozen=True, kw_only=True):
    """The body of `/v1/completions`."""

    prompt: Raw = Raw()
    suffix: str | None = None
    echo: bool | None = None
    best_of: Count | None = None
    logprobs: int | None = None


class Embedding(Shape, frozen=True, kw_only=True):
    """The body of `/v1/embeddings`."""

    model: str
    input: Raw = Raw()
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    user: str | None = None
    options: dict[str, Raw] | None = None
    keep_alive: str | float | None = None


_CHAT = msgspec.json.Decoder(Chat)
_COMPLETION = msgspec.json.Decoder(Completion)
_EMBEDDING = msgspec.json.Decoder(Embedding)
_PARTS = msgspec.json.Decoder(list[Part])
_TOOLS = msgspec.json.Decoder(list[Tool] | None)
_IMAGE_URL = msgspec.json.Decoder(ImageUrl | str)
_TEXTS_OR_TOKENS = msgspec.json.Decoder(list[str | int | list[int]])


def read_chat(body: bytes) -> Chat:
    """The chat request in `body`, checked; raises `BadRequest`."""
    chat = decoded(_CHAT, body)
    if not chat.messages:
        raise BadRequest("messages is empty; send at least one.", where="messages")
    for index, message in enumerate(chat.messages):
        if not message.content or memoryview(message.content)[0] != QUOTE:
            _check_content(message, f"messages[{index}].content")
    if chat.tools:
        check_tools(chat.tools)
    if chat.tool_choice and memoryview(chat.tool_choice)[0] not in {QUOTE, BRACE, NULL}:
        raise wrong_type("tool_choice", "a string or an object", chat.tool_choice)
    return chat


def read_completion(body: bytes) -> Completion:
    """The completion request in `body`, checked; raises `BadRequest`."""
    completion = decoded(_COMPLETION, body)
    check_texts(completion.prompt, "prompt")
    return completion


def read_embedding(body: bytes) -> Embedding:
    """The embedding request in `body`, checked; raises `BadRequest`."""
    embedding = decoded(_EMBEDDING, body)
    check_texts(embedding.input, "input")
    return embedding


def check_texts(value: Raw, where: str) -> None:
    """Raise `BadRequest` unless `value` is a string, or a list with strings, tokens or lists of tokens."""
    if value and memoryview(value)[0] == QUOTE:
        return
    texts_of(value, where)


def texts_of(value: Raw, where: str) -> list[str | int | list[int]]:
    """The entries of a prompt or input that is a list; raises `BadRequest` for whatever is none."""
    if not value or memoryview(value)[0] != BRACKET:
        raise wrong_type(where, "a string or a list", value)
    texts = decoded(_TEXTS_OR_TOKENS, value, under=where)
    if not texts:
        raise BadRequest(f"{where} is empty; send at least one text.", where=where)
    for index, text in enumerate(texts):
        if text == []:
            raise BadRequest(f"{where}[{index}] is empty; send at least one token.", where=f"{where}[{index}]")
    return texts


def parts_of(content: Raw, where: str) -> list[Part]:
    """The parts of a content that is a list, checked; raises `BadRequest`."""
    parts = decoded(_PARTS, content, under=where)
    for index, part in enumerate(parts):
        place = f"{where}[{index}]"
        if part.type == "text" and (not part.text or memoryview(part.text)[0] != QUOTE):
            raise wrong_type(f"{place}.text", "a string", part.text)
        if part.type == "image_url":
            image_of(part, f"{place}.image_url")
    return parts


def image_of(part: Part, where: str) -> str:
    """The address of an image part; raises `BadRequest` where there is none."""
    if not part.image_url:
        raise missing(where)
    image = decoded(_IMAGE_URL, part.image_url, under=where)
    return image if isinstance(image, str) else image.url


def _check_content(message: Message, where: str) -> None:
    """A content that is not simply a string."""
    content = message.content
    may_be_null = message.role in {"assistant", "function"}
    if may_be_null and (not content or memoryview(content)[0] == NULL):
        return
    if not content or memoryview(content)[0] != BRACKET:
        raise wrong_type(where, "a string or a list of parts", content)
    if not parts_of(content, where) and not may_be_null:
        raise BadRequest(f"{where} is empty; send a string or at least one part.", where=where)


def check_tools(tools: Raw) -> None:
    """Raise `BadRequest` unless `tools` is null or a list of tools; both dialects have the same form of them."""
    for index, tool in enumerate(decoded(_TOOLS, tools, under="tools") or ()):
        if tool.function is None and tool.type in {None, "function"}:
            raise missing(f"tools[{index}].function")
