"""
Requests of the Ollama API, said in the words of an OpenAI node (vLLM, llama.cpp and their like).

Options that only one of these servers knows are sent to all: each skips what it does not know. `num_ctx` and
the other options of loading, `keep_alive` and `context` are left out, because such a node decides about them
itself. Every stream is asked to tell its tokens, since Ollama's always does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from msgspec import Raw

from sutazai.core.errors import BadRequest
from sutazai.core.request import Endpoint
from sutazai.dialects import ollama_shapes as ollama
from sutazai.dialects.complaints import decoded
from sutazai.dialects.from_openai import RepliesFromOpenAI, load_reply
from sutazai.dialects.openai_shapes import QUOTE

_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "temperature": ("temperature",),
    "top_p": ("top_p",),
    "top_k": ("top_k",),
    "min_p": ("min_p",),
    "typical_p": ("typical_p",),
    "seed": ("seed",),
    "repeat_penalty": ("repeat_penalty", "repetition_penalty"),
    "repeat_last_n": ("repeat_last_n",),
    "presence_penalty": ("presence_penalty",),
    "frequency_penalty": ("frequency_penalty",),
    "mirostat": ("mirostat",),
    "mirostat_tau": ("mirostat_tau",),
    "mirostat_eta": ("mirostat_eta",),
    "num_keep": ("n_keep",),
    "stop": ("stop",),
}
"""Ollama's name, and the names of the same at the others: llama.cpp's and vLLM's where they differ."""
_WHOLE: Final = ("top_k", "seed", "repeat_last_n", "mirostat", "num_keep")
"""Options that Ollama cuts to whole numbers."""

_IMAGE_KINDS: Final = {"iVBORw0KGgo": "png", "/9j/": "jpeg", "UklGR": "webp", "R0lGOD": "gif"}
"""How images of each kind begin, in base64."""

_EFFORTS: Final = {"low": "low", "medium": "medium", "high": "high", "max": "high"}

__all__ = ["RepliesFromOpenAI", "load_reply", "request_to_openai"]

_encode = msgspec.json.Encoder().encode
_text = msgspec.json.Decoder(str)
_texts = msgspec.json.Decoder(str | list[str])
_raw_tools = msgspec.json.Decoder(list[Raw] | None)
_format_name = msgspec.json.Decoder(str | None)


def request_to_openai(endpoint: Endpoint, body: bytes, *, model: str) -> tuple[Endpoint, bytes]:
    """
    Where to send the request on an OpenAI node, and what.

    A request that only loads a model (`reading.is_load_request`) has no such form: answer it with
    `from_openai.load_reply`.

    Args:
        endpoint: one of the Ollama API.
        body: as the client sent it.
        model: the name that the node has for it.

    Raises:
        BadRequest: `body` is wrong, or asks for what such a node cannot do.
    """
    if endpoint is Endpoint.OLLAMA_CHAT:
        return Endpoint.OPENAI_CHAT, _encode(_chat(ollama.read_chat(body), model))
    if endpoint is Endpoint.OLLAMA_GENERATE:
        return _generate(ollama.read_generate(body), model)
    if endpoint is Endpoint.OLLAMA_EMBED:
        return Endpoint.OPENAI_EMBEDDING, _encode(_embed(ollama.read_embed(body), model))
    if endpoint is Endpoint.OLLAMA_EMBEDDINGS:
        prompt = ollama.read_embeddings(body).prompt
        return Endpoint.OPENAI_EMBEDDING, _encode(_embedding(model, _some(prompt, "prompt")))
    raise ValueError(f"{endpoint.path} is OpenAI's already.")


def _chat(chat: ollama.Chat, model: str) -> dict[str, object]:
    if not chat.messages:
        raise BadRequest("messages is empty; send at least one.", where="messages")
    request: dict[str, object] = {
        "model": model,
        "messages": _messages(chat.messages),
        **_common(chat),
        **_chat_logprobs(chat),
        **_thinking(chat.think),
    }
    if chat.tools and (tools := decoded(_raw_tools, chat.tools, under="tools")):
        request["tools"] = tools
    return request


def _generate(asked: ollama.Generate, model: str) -> tuple[Endpoint, bytes]:
    """As a chat, because the node has the template; as a completion for raw text or to fill a gap."""
    prompt = _some(asked.prompt, "prompt")
    if asked.template:
        raise _refused("template", "template was sent, but this model's node has its own; leave it out or send raw.")
    if not asked.raw and not asked.suffix:
        request = {
            "model": model,
            "messages": _as_messages(asked, prompt),
            **_common(asked),
            **_chat_logprobs(asked),
            **_thinking(asked.think),
        }
        return Endpoint.OPENAI_CHAT, _encode(request)
    for name, value in (("images", asked.images), ("system", not ollama.is_blank(asked.system))):
        if value:
            raise _refused(name, f"{name} does not go with raw or suffix; leave one of them out.")
    completion = {"model": model, "prompt": prompt, **_common(asked), **_completion_logprobs(asked)}
    if asked.suffix:
        completion["suffix"] = asked.suffix
    return Endpoint.OPENAI_COMPLETION, _encode(completion)


def _as_messages(asked: ollama.Generate, prompt: Raw) -> list[dict[str, object]]:
    user = {"role": "user", "content": _content(prompt, asked.images, "prompt")}
    return [user] if ollama.is_blank(asked.system) else [{"role": "system", "content": asked.system}, user]


def _embed(asked: ollama.Embed, model: str) -> dict[str, object]:
    request = _embedding(model, _some(asked.input, "input"))
    if asked.dimensions is not None:
        request["dimensions"] = asked.dimensions
    if asked.truncate:
        # vLLM's way to say it: cut to what the model takes.
        request["truncate_prompt_tokens"] = -1
    return request


def _embedding(model: str, text: Raw) -> dict[str, object]:
    return {"model": model, "input": text, "encoding_format": "float"}


def _common(asked: ollama.Answering) -> dict[str, object]:
    """What chat and generate share: how to answer, not what."""
    request: dict[str, object] = {"stream": asked.stream is not False}
    if request["stream"]:
        request["stream_options"] = {"include_usage": True}
    if asked.options is not None:
        request |= _parameters(asked.options)
    if not ollama.is_blank(asked.format):
        request["response_format"] = _response_format(asked.format)
    return request


def _parameters(options: ollama.Options) -> dict[str, object]:
    parameters: dict[str, object] = {}
    for option, names in _OPTIONS.items():
        value = getattr(options, option)
        if value is not None:
            parameters |= dict.fromkeys(names, int(value) if option in _WHOLE else value)
    # Ollama takes 0 and less as "no limit", which the others say by leaving it out.
    if options.num_predict is not None and options.num_predict >= 1:
        parameters["max_tokens"] = int(options.num_predict)
    return parameters


def _response_format(wanted: Raw) -> dict[str, object]:
    if memoryview(wanted)[0] != QUOTE:
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted}}
    if decoded(_format_name, wanted, under="format") != "json":
        raise _refused("format", 'format must be "json" or a JSON schema.')
    return {"type": "json_object"}


def _chat_logprobs(asked: ollama.Answering) -> dict[str, object]:
    fields = {"logprobs": asked.logprobs, "top_logprobs": asked.top_logprobs if asked.logprobs else None}
    return {name: value for name, value in fields.items() if value is not None}


def _completion_logprobs(asked: ollama.Answering) -> dict[str, object]:
    # llama.cpp takes 0 as "none at all", so at least one.
    return {"logprobs": max(asked.top_logprobs or 0, 1)} if asked.logprobs else {}


def _thinking(think: bool | str | None) -> dict[str, object]:
    """A template's own switch, and for a level also OpenAI's word."""
    if think is None:
        return {}
    if isinstance(think, bool):
        return {"chat_template_kwargs": {"enable_thinking": think}}
    if think not in _EFFORTS:
        raise _refused("think", f"think must be true, false or one of {', '.join(_EFFORTS)}.")
    return {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": _EFFORTS[think]}


def _messages(messages: Sequence[ollama.Message]) -> list[dict[str, object]]:
    open_calls: list[tuple[str, str]] = []
    """Name and id of calls not yet answered: Ollama's answers name the tool, OpenAI's the call."""
    translated = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        turn: dict[str, object] = {"role": "system" if message.role == "control" else message.role}
        turn["content"] = _content(message.content, message.images, f"{place}.content")
        if message.thinking and memoryview(message.thinking)[0] == QUOTE:
            turn["reasoning_content"] = message.thinking
        if message.tool_calls:
            ids = [call.id or f"call_{index}_{at}" for at, call in enumerate(message.tool_calls)]
            turn["tool_calls"] = list(map(_call, message.tool_calls, ids))
            open_calls.extend((call.function.name, made) for call, made in zip(message.tool_calls, ids, strict=True))
        if message.role == "tool":
            turn["tool_call_id"] = _answered(open_calls, message) or f"call_{index}"
            if message.tool_name:
                turn["name"] = message.tool_name
        translated.append(turn)
    return translated


def _answered(open_calls: list[tuple[str, str]], answer: ollama.Message) -> str | None:
    """The call that a tool answers: the one it names, or the first of its name that is open."""
    for at, (name, call_id) in enumerate(open_calls):
        if call_id == answer.tool_call_id or (not answer.tool_call_id and answer.tool_name in {None, name}):
            del open_calls[at]
            return call_id
    return answer.tool_call_id


def _call(call: ollama.ToolCall, call_id: str) -> dict[str, object]:
    arguments = bytes(call.function.arguments or b"{}").decode(errors="replace")
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def _content(content: Raw, images: Sequence[Raw] | None, where: str) -> object:
    """A string, or parts where there are images."""
    text: Raw | str = "" if ollama.is_blank(content) else content
    if not images:
        return text
    pictures = [{"type": "image_url", "image_url": {"url": _data_url(image, where)}} for image in images]
    return [{"type": "text", "text": text}, *pictures] if text else pictures


def _data_url(image: Raw, where: str) -> str:
    written = decoded(_text, image, under=where)
    kind = next((kind for start, kind in _IMAGE_KINDS.items() if written.startswith(start)), "png")
    return f"data:image/{kind};base64,{written}"


def _some(value: Raw, where: str) -> Raw:
    if ollama.is_blank(value):
        raise BadRequest(f"{where} is empty; send some text.", where=where)
    return value


def _refused(where: str, message: str) -> BadRequest:
    return BadRequest(message, where=where)
