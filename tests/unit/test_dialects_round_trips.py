"""There and back again: nothing that a model or a client would see is lost, and the official clients can read it."""

from __future__ import annotations

import json
from typing import Any

import ollama
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from sutazai.core.errors import BadRequest
from sutazai.core.request import Dialect, Endpoint, Operation, Usage
from sutazai.dialects.framing import Untranslatable
from sutazai.dialects.reading import read
from sutazai.dialects.to_ollama import RepliesFromOllama, request_to_ollama
from sutazai.dialects.to_openai import RepliesFromOpenAI, load_reply, request_to_openai

CREATED_AT = "2023-08-04T19:22:45.499127Z"

TEXTS = st.text('aZ0"\\ \n\0é\u2028\U0001f600{}[],:', max_size=12)
NAMES = st.text("abc_", min_size=1, max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=3)
IMAGES = st.sampled_from(["iVBORw0KGgoAAAA=", "/9j/4AAQSkZJRg==", "UklGRiIAAABX", "R0lGODlhAQAB"])


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Chats of OpenAI's form in which every tool call is answered."""
    messages: list[dict[str, Any]] = []
    for turn in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["system", "developer", "user", "picture", "assistant", "tools"]))
        if kind == "tools":
            calls = draw(st.lists(st.tuples(NAMES, OBJECTS), min_size=1, max_size=3))
            ids = [f"call_{turn}{at}" for at in range(len(calls))]
            messages.append({"role": "assistant", "content": None, "tool_calls": list(map(_call, ids, calls))})
            messages.extend(
                {"role": "tool", "tool_call_id": call_id, "content": draw(TEXTS)}
                for call_id in draw(st.permutations(ids))
            )
        elif kind == "picture":
            url = {"url": f"data:image/png;base64,{draw(IMAGES)}"}
            parts = [{"type": "text", "text": draw(TEXTS)}, {"type": "image_url", "image_url": url}]
            messages.append({"role": "user", "content": parts})
        else:
            messages.append({"role": kind, "content": draw(TEXTS)})
    return messages


def _call(call_id: str, called: tuple[str, dict[str, object]]) -> dict[str, Any]:
    function = {"name": called[0], "arguments": json.dumps(called[1])}
    return {"id": call_id, "type": "function", "function": function}


@st.composite
def chats(draw: st.DrawFn) -> dict[str, Any]:
    """Requests of OpenAI's form that Ollama can fulfil."""
    optional: dict[str, st.SearchStrategy[Any]] = {
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1),
        "seed": st.integers(0, 2**31),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "max_tokens": st.integers(1, 10_000),
        "stop": st.lists(TEXTS, min_size=1, max_size=4),
        "stream": st.booleans(),
        "tools": st.lists(st.tuples(NAMES, OBJECTS).map(_tool), min_size=1, max_size=2),
        "response_format": st.just({"type": "json_object"}),
    }
    fields = draw(st.lists(st.sampled_from(sorted(optional)), unique=True))
    return {"model": "m", "messages": draw(conversations())} | {name: draw(optional[name]) for name in fields}


def _tool(tool: tuple[str, dict[str, object]]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool[0], "parameters": tool[1]}}


def seen(message: dict[str, Any]) -> tuple[object, ...]:
    """What a model sees of a message of either form."""
    content = message.get("content") or ""
    parts: list[dict[str, Any]] = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part["text"] for part in parts if part["type"] == "text" and part["text"]]
    images = [part["image_url"]["url"].partition(",")[2] for part in parts if part["type"] == "image_url"]
    calls = [call["function"] for call in message.get("tool_calls") or []]
    role = str(message["role"])
    return (
        {"developer": "system"}.get(role, role),
        texts,
        images + message.get("images", []),
        [(call["name"], _object(call["arguments"])) for call in calls],
        message.get("tool_call_id"),
    )


def _object(arguments: object) -> object:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


@given(chats())
def test_a_chat_of_openai_is_the_same_on_an_ollama_node_and_when_it_returns(request: dict[str, Any]) -> None:
    there, through = request_to_ollama(Endpoint.OPENAI_CHAT, json.dumps(request).encode(), model="m")
    back, returned = request_to_openai(there, through, model="m")
    middle, end = json.loads(through), json.loads(returned)

    assert (there, back) == (Endpoint.OLLAMA_CHAT, Endpoint.OPENAI_CHAT)
    for translated in (middle, end):
        assert list(map(seen, translated["messages"])) == list(map(seen, request["messages"]))
        assert translated.get("tools") == request.get("tools")
        assert translated["stream"] is request.get("stream", False)
    assert middle.get("options", {}).get("num_predict") == request.get("max_tokens")
    assert middle.get("format") == ("json" if "response_format" in request else None)
    for name in ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "stop"):
        assert middle.get("options", {}).get(name) == request.get(name) == end.get(name)
    assert end.get("max_tokens") == request.get("max_tokens")
    assert end.get("response_format") == request.get("response_format")


@given(chats())
def test_a_translated_chat_is_a_good_request_of_its_dialect(request: dict[str, Any]) -> None:
    there, through = request_to_ollama(Endpoint.OPENAI_CHAT, json.dumps(request).encode(), model="n")
    back, returned = request_to_openai(there, through, model="o")

    assert (read(there, through).model, read(back, returned).model) == ("n", "o")
    assert read(there, through).stream is read(back, returned).stream is request.get("stream", False)


STREAM_PIECES = st.lists(TEXTS, max_size=5)
CALLS = st.lists(st.tuples(NAMES, OBJECTS), max_size=3)
SPLITS = st.lists(st.integers(0, 5000), max_size=8)


def in_pieces(body: bytes, at: list[int]) -> list[bytes]:
    places = sorted(place % (len(body) + 1) for place in at)
    return [body[start:end] for start, end in zip([0, *places], [*places, len(body)], strict=True)]


def ollama_stream(texts: list[str], calls: list[tuple[str, dict[str, object]]], reason: str) -> bytes:
    messages: list[dict[str, Any]] = [{"role": "assistant", "content": text} for text in texts]
    if calls:
        listed = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
        messages.append({"role": "assistant", "content": "", "tool_calls": listed})
    answers = [{"model": "m", "message": message, "done": False} for message in messages]
    last = {"message": {"content": ""}, "done": True, "done_reason": reason, "prompt_eval_count": 5, "eval_count": 3}
    return b"".join(json.dumps(answer).encode() + b"\n" for answer in [*answers, last])


def to_openai_client(body: bytes, at: list[int], *, stream: bool = True) -> bytes:
    reply = RepliesFromOllama(
        Endpoint.OPENAI_CHAT, model="m", request_id="r", created=1, stream=stream, include_usage=True
    )
    return b"".join(map(reply.feed, in_pieces(body, at))) + reply.finish()


def to_ollama_client(body: bytes, at: list[int]) -> tuple[bytes, Usage | None]:
    reply = RepliesFromOpenAI(Endpoint.OLLAMA_CHAT, model="m", stream=True, now=lambda: 0.0, clock=lambda: CREATED_AT)
    return b"".join(map(reply.feed, in_pieces(body, at))) + reply.finish(), reply.usage


@given(STREAM_PIECES, CALLS, st.sampled_from(["stop", "length"]), SPLITS, SPLITS)
def test_a_streamed_answer_is_the_same_when_it_returns_however_it_is_split(
    texts: list[str], calls: list[tuple[str, dict[str, object]]], reason: str, first: list[int], second: list[int]
) -> None:
    events = to_openai_client(ollama_stream(texts, calls, reason), first)
    returned, usage = to_ollama_client(events, second)
    *answers, last = [ollama.ChatResponse.model_validate_json(line) for line in returned.splitlines()]
    called = [call.function for answer in answers for call in answer.message.tool_calls or []]

    assert "".join(answer.message.content or "" for answer in answers) == "".join(texts)
    assert [(call.name, dict(call.arguments)) for call in called] == calls
    assert (last.done, last.done_reason) == (True, reason)
    assert (last.prompt_eval_count, last.eval_count) == (5, 3)
    assert usage == Usage(5, 3)


@given(STREAM_PIECES, CALLS, SPLITS)
def test_the_official_client_of_openai_can_read_a_translated_stream(
    texts: list[str], calls: list[tuple[str, dict[str, object]]], at: list[int]
) -> None:
    *events, done = to_openai_client(ollama_stream(texts, calls, "stop"), at).decode().split("\n\n")[:-1]
    chunks = [ChatCompletionChunk.model_validate_json(event.removeprefix("data: ")) for event in events]
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]

    assert done == "data: [DONE]"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert reasons == ["tool_calls" if calls else "stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 8


@given(TEXTS, CALLS)
def test_the_official_client_of_openai_can_read_a_translated_answer(
    text: str, calls: list[tuple[str, dict[str, object]]]
) -> None:
    listed = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    body = json.dumps({"message": {"content": text, "tool_calls": listed}, "done": True}).encode()

    answer = ChatCompletion.model_validate_json(to_openai_client(body, [], stream=False))
    message = answer.choices[0].message

    assert (message.content or "") == text
    assert [call.to_dict()["function"] for call in message.tool_calls or []] == [
        {"name": name, "arguments": json.dumps(arguments)} for name, arguments in calls
    ]


def test_the_official_clients_can_read_all_other_answers() -> None:
    def openai_client(endpoint: Endpoint, body: bytes, *, in_base64: bool = False) -> bytes:
        reply = RepliesFromOllama(endpoint, model="m", request_id="r", created=1, stream=False, in_base64=in_base64)
        return reply.feed(body) + reply.finish()

    def ollama_client(endpoint: Endpoint, body: bytes) -> bytes:
        reply = RepliesFromOpenAI(endpoint, model="m", stream=False, now=lambda: 0.0, clock=lambda: CREATED_AT)
        return reply.feed(body) + reply.finish()

    completed = openai_client(Endpoint.OPENAI_COMPLETION, b'{"response":"blue","done":true}')
    embedded = openai_client(Endpoint.OPENAI_EMBEDDING, b'{"embeddings":[[0.5]]}')
    generated = ollama_client(Endpoint.OLLAMA_GENERATE, b'{"choices":[{"text":"blue","finish_reason":"stop"}]}')
    vectors = ollama_client(Endpoint.OLLAMA_EMBED, b'{"data":[{"index":0,"embedding":[0.5]}]}')
    vector = ollama_client(Endpoint.OLLAMA_EMBEDDINGS, b'{"data":[{"index":0,"embedding":[0.5]}]}')

    assert Completion.model_validate_json(completed).choices[0].text == "blue"
    assert CreateEmbeddingResponse.model_validate_json(embedded).data[0].embedding == [0.5]
    assert ollama.GenerateResponse.model_validate_json(generated).response == "blue"
    assert ollama.EmbedResponse.model_validate_json(vectors).embeddings == [[0.5]]
    assert ollama.EmbeddingsResponse.model_validate_json(vector).embedding == [0.5]
    assert ollama.ChatResponse.model_validate_json(load_reply(Endpoint.OLLAMA_CHAT, "m", CREATED_AT)).done


JSON_TEXTS = (
    st.sampled_from(
        ["role", "content", "type", "text", "image_url", "url", "tool_calls", "function", "name", "arguments", "id"]
    )
    | TEXTS
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_TEXTS, inner, max_size=3),
    max_leaves=10,
)
REQUEST_FIELDS = st.sampled_from(
    [
        "messages",
        "prompt",
        "input",
        "stream",
        "tools",
        "tool_choice",
        "response_format",
        "format",
        "options",
        "images",
        "think",
        "stop",
        "logprobs",
        "suffix",
        "raw",
        "system",
        "template",
        "dimensions",
        "max_tokens",
        "functions",
        "reasoning_effort",
        "keep_alive",
    ]
)
WELL_FORMED: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "x"}],
    "prompt": "x",
    "input": "x",
}


@given(st.sampled_from(list(Endpoint)), st.dictionaries(REQUEST_FIELDS, ANY_JSON, max_size=3))
def test_any_request_is_translated_or_refused(endpoint: Endpoint, fields: dict[str, object]) -> None:
    body = json.dumps(WELL_FORMED | fields).encode()

    assert model_or_complaint(endpoint, body)


def model_or_complaint(endpoint: Endpoint, body: bytes) -> str:
    """The model that the translated request is for, or why there is none."""
    translate = request_to_ollama if endpoint.dialect is Dialect.OPENAI else request_to_openai
    try:
        target, through = translate(endpoint, body, model="n")
    except BadRequest as error:
        return error.message
    return read(target, through).model


ANSWER_FIELDS = st.sampled_from(
    [
        "message",
        "response",
        "done",
        "done_reason",
        "error",
        "choices",
        "usage",
        "timings",
        "delta",
        "embeddings",
        "data",
        "logprobs",
        "object",
    ]
)


@given(
    st.sampled_from(list(Endpoint)),
    st.booleans(),
    st.binary(max_size=20)
    | st.dictionaries(ANSWER_FIELDS, ANY_JSON, max_size=4).map(lambda it: json.dumps(it).encode()),
)
def test_any_answer_is_translated_or_said_to_be_none(endpoint: Endpoint, stream: bool, answer: bytes) -> None:
    streams = stream and endpoint.operation is not Operation.EMBEDDING

    assert isinstance(answer_or_complaint(endpoint, answer, stream=streams), bytes)


def answer_or_complaint(endpoint: Endpoint, answer: bytes, *, stream: bool) -> bytes:
    reply: RepliesFromOllama | RepliesFromOpenAI
    if endpoint.dialect is Dialect.OPENAI:
        reply = RepliesFromOllama(endpoint, model="m", request_id="r", created=1, stream=stream)
        body = answer + b"\n"
    else:
        reply = RepliesFromOpenAI(endpoint, model="m", stream=stream, now=lambda: 0.0, clock=lambda: CREATED_AT)
        body = b"data: " + answer + b"\n\n" if stream else answer
    try:
        return reply.feed(body) + reply.finish()
    except Untranslatable as error:
        return str(error).encode()
