"""
Requests of the OpenAI API, said in the words of an Ollama node.

What Ollama has no word for is refused where the answer would differ (several choices, audio, a biased
vocabulary) and left out where it would not (user names, metadata). `tool_choice` is in between: Ollama cannot
be forced to call, so `required` is taken as `auto`; for a named function only that one is offered. What the
client leaves unset stays unset, so the defaults are those of the model on the node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Raw

from sutazai.core.errors import BadRequest
from sutazai.core.request import Endpoint
from sutazai.dialects import openai_shapes as openai
from sutazai.dialects.complaints import decoded, missing, wrong_type
from sutazai.dialects.from_ollama import RepliesFromOllama

_THINK: Final[dict[str, bool | str]] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}
_SAME_OPTIONS: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repeat_penalty",
)

__all__ = ["RepliesFromOllama", "request_to_ollama"]

_encode = msgspec.json.Encoder().encode
_text = msgspec.json.Decoder(str)
_arguments = msgspec.json.Decoder(dict[str, Raw])
_choice = msgspec.json.Decoder(openai.Tool | str | None)
_raw_tools = msgspec.json.Decoder(list[Raw] | None)
_tool = msgspec.json.Decoder(openai.Tool)


def request_to_ollama(endpoint: Endpoint, body: bytes, *, model: str) -> tuple[Endpoint, bytes]:
    """
    Where to send the request on an Ollama node, and what.

    Args:
        endpoint: one of the OpenAI API.
        body: as the client sent it.
        model: the name that the node has for it.

    Raises:
        BadRequest: `body` is wrong, or asks for what Ollama cannot do.
    """
    if endpoint is Endpoint.OPENAI_CHAT:
        return Endpoint.OLLAMA_CHAT, _encode(_chat(openai.read_chat(body), model))
    if endpoint is Endpoint.OPENAI_COMPLETION:
        return Endpoint.OLLAMA_GENERATE, _encode(_generate(openai.read_completion(body), model))
    if endpoint is Endpoint.OPENAI_EMBEDDING:
        return Endpoint.OLLAMA_EMBED, _encode(_embed(openai.read_embedding(body), model))
    raise ValueError(f"{endpoint.path} is Ollama's already.")


def _chat(chat: openai.Chat, model: str) -> dict[str, object]:
    if chat.functions:
        raise _refused("functions", "functions is the old form of tools; send tools.")
    newer = chat.max_completion_tokens
    request: dict[str, object] = {
        "model": model,
        "messages": _messages(chat.messages),
        **_common(chat, chat.max_tokens if newer is None else newer),
    }
    if tools := _tools(chat):
        request["tools"] = tools
    if chat.logprobs is not None:
        request["logprobs"] = chat.logprobs
    if chat.top_logprobs is not None:
        request["top_logprobs"] = chat.top_logprobs
    if chat.reasoning_effort is not None:
        request["think"] = _think(chat.reasoning_effort)
    return request


def _generate(asked: openai.Completion, model: str) -> dict[str, object]:
    """A completion: without a template, unless there is a suffix, which only a template can place."""
    if asked.echo:
        raise _refused("echo", "echo was asked for, but an Ollama node does not repeat the prompt; leave it out.")
    if asked.best_of is not None and asked.best_of > 1:
        raise _refused("best_of", "best_of was above 1, but an Ollama node answers once; leave it out.")
    request: dict[str, object] = {
        "model": model,
        "prompt": _single_prompt(asked.prompt),
        **_common(asked, asked.max_tokens),
    }
    if asked.suffix:
        request["suffix"] = asked.suffix
    else:
        request["raw"] = True
    if asked.logprobs is not None:
        request |= {"logprobs": True, "top_logprobs": asked.logprobs}
    return request


def _embed(asked: openai.Embedding, model: str) -> dict[str, object]:
    if memoryview(asked.input)[0] != openai.QUOTE:
        _only_strings(openai.texts_of(asked.input, "input"), "input")
    request: dict[str, object] = {"model": model, "input": asked.input}
    if asked.dimensions is not None:
        request["dimensions"] = asked.dimensions
    if asked.options:
        request["options"] = asked.options
    if asked.keep_alive is not None:
        request["keep_alive"] = asked.keep_alive
    return request


def _common(asked: openai.Sampling, max_tokens: int | None) -> dict[str, object]:
    """What chat and generate share: everything but what is to be answered."""
    if asked.n is not None and asked.n > 1:
        raise _refused("n", "n was above 1, but an Ollama node answers one choice; ask again for another.")
    if asked.logit_bias:
        raise _refused("logit_bias", "logit_bias was set, but an Ollama node has no such option; leave it out.")
    # OpenAI streams when asked to, Ollama unless asked not to: so always say.
    request: dict[str, object] = {"stream": asked.stream is True}
    if options := _options(asked, max_tokens):
        request["options"] = options
    if asked.response_format is not None and asked.response_format.type != "text":
        request["format"] = _format(asked.response_format)
    if asked.keep_alive is not None:
        request["keep_alive"] = asked.keep_alive
    return request


def _options(asked: openai.Sampling, max_tokens: int | None) -> dict[str, object]:
    options: dict[str, object] = dict(asked.options or {})
    if asked.repetition_penalty is not None:
        options["repeat_penalty"] = asked.repetition_penalty
    for name in _SAME_OPTIONS:
        value = getattr(asked, name)
        if value is not None:
            options[name] = value
    if asked.stop is not None:
        options["stop"] = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    if max_tokens is not None:
        # To Ollama, 0 is no limit at all.
        if max_tokens == 0:
            raise _refused("max_tokens", "max_tokens was 0, but an Ollama node answers at least one; send 1 or more.")
        options["num_predict"] = max_tokens
    return options


def _format(wanted: openai.ResponseFormat) -> str | Raw:
    if wanted.type == "json_object":
        return "json"
    if wanted.type != "json_schema":
        raise _refused(
            "response_format.type",
            "response_format.type must be text, json_object or json_schema on an Ollama node.",
        )
    place = "response_format.json_schema"
    if wanted.json_schema is None:
        raise missing(place)
    schema = wanted.json_schema.schema
    if not schema or memoryview(schema)[0] != openai.BRACE:
        raise wrong_type(f"{place}.schema", "an object", schema)
    return schema


def _think(effort: str) -> bool | str:
    if effort not in _THINK:
        raise _refused("reasoning_effort", f"reasoning_effort must be one of {', '.join(_THINK)}.")
    return _THINK[effort]


def _tools(chat: openai.Chat) -> list[Raw]:
    """The tools to offer, as they came."""
    tools = (decoded(_raw_tools, chat.tools, under="tools") or []) if chat.tools else []
    choice = decoded(_choice, chat.tool_choice, under="tool_choice") if chat.tool_choice else None
    if choice == "none":
        return []
    if isinstance(choice, openai.Tool) and choice.function is not None:
        name = choice.function.name
        named = [tool for tool in tools if (called := _tool.decode(tool).function) and called.name == name]
        if not named:
            raise _refused("tool_choice", f"tool_choice names {name!r}, which is not among the tools.")
        return named
    return tools


def _messages(messages: Sequence[openai.Message]) -> list[dict[str, object]]:
    names: dict[str, str] = {}
    """Tool by the id of its call: OpenAI's answers of tools name the call, Ollama's the tool."""
    translated = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        for call in message.tool_calls or ():
            if call.id is not None and call.function is not None:
                names[call.id] = call.function.name
        translated.append(_message(message, names, place))
    return translated


def _message(message: openai.Message, names: dict[str, str], place: str) -> dict[str, object]:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    turn: dict[str, object] = {"role": role, **_content(message.content, f"{place}.content")}
    thinking = message.reasoning_content or message.reasoning
    if role == "assistant" and thinking and memoryview(thinking)[0] == openai.QUOTE:
        turn["thinking"] = thinking
    if calls := _calls(message, place):
        turn["tool_calls"] = calls
    if role == "tool":
        name = message.name or names.get(message.tool_call_id or "")
        if name:
            turn["tool_name"] = name
        if message.tool_call_id:
            turn["tool_call_id"] = message.tool_call_id
    return turn


def _content(content: Raw, place: str) -> dict[str, object]:
    """The fields `content` and `images`."""
    if not content or memoryview(content)[0] == openai.NULL:
        return {"content": ""}
    if memoryview(content)[0] == openai.QUOTE:
        return {"content": content}
    texts: list[str] = []
    images: list[str] = []
    for index, part in enumerate(openai.parts_of(content, place)):
        where = f"{place}[{index}]"
        if part.type == "text":
            texts.append(decoded(_text, part.text, under=f"{where}.text"))
        elif part.type == "refusal":
            texts.append(decoded(_text, part.refusal, under=f"{where}.refusal"))
        elif part.type == "image_url":
            images.append(_image(openai.image_of(part, f"{where}.image_url"), f"{where}.image_url"))
        else:
            raise _refused(f"{where}.type", f"{where} is of type {part.type!r}; an Ollama node takes text and images.")
    fields: dict[str, object] = {"content": "\n".join(texts)}
    return fields | {"images": images} if images else fields


def _image(url: str, where: str) -> str:
    """The base64 in a data URL."""
    head, comma, image = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        shown = url[:60]
        raise _refused(where, f"{where} must be a data URL in base64 (data:image/png;base64,...), not {shown!r}.")
    return image


def _calls(message: openai.Message, place: str) -> list[dict[str, object]]:
    calls = [
        _call(call.function, call.id, f"{place}.tool_calls[{index}].function")
        for index, call in enumerate(message.tool_calls or ())
    ]
    if message.function_call is not None:
        calls.append(_call(message.function_call, None, f"{place}.function_call"))
    return calls


def _call(called: openai.CalledFunction | None, call_id: str | None, place: str) -> dict[str, object]:
    if called is None:
        raise missing(place)
    function = {"name": called.name, "arguments": _arguments_of(called, f"{place}.arguments")}
    return {"function": function} if call_id is None else {"id": call_id, "function": function}


def _arguments_of(called: openai.CalledFunction, where: str) -> dict[str, Raw]:
    """The arguments as an object; OpenAI has them as JSON inside a string."""
    written = called.arguments
    if not written:
        return {}
    if memoryview(written)[0] == openai.QUOTE:
        text = decoded(_text, written, under=where)
        return decoded(_arguments, text.encode(), under=where) if text.strip() else {}
    return decoded(_arguments, written, under=where)


def _single_prompt(prompt: Raw) -> str:
    if memoryview(prompt)[0] == openai.QUOTE:
        text = decoded(_text, prompt, under="prompt")
    else:
        texts = _only_strings(openai.texts_of(prompt, "prompt"), "prompt")
        if len(texts) > 1:
            raise _refused(
                "prompt",
                "prompt holds several texts, but an Ollama node takes one; send one request for each.",
            )
        text = texts[0]
    # To Ollama, a request without a prompt means: load the model.
    if not text:
        raise _refused("prompt", "prompt is empty; an Ollama node needs some text.")
    return text


def _only_strings(texts: list[str | int | list[int]], where: str) -> list[str]:
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) < len(texts):
        raise _refused(where, f"{where} holds tokens, but an Ollama node takes text; send strings.")
    return strings


def _refused(where: str, message: str) -> BadRequest:
    return BadRequest(message, where=where)
