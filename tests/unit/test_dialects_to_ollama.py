"""OpenAI clients on Ollama nodes: requests there, answers back."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest

from sutazai.core.errors import BadRequest
from sutazai.core.request import Endpoint, Usage
from sutazai.dialects.framing import Untranslatable
from sutazai.dialects.to_ollama import RepliesFromOllama, request_to_ollama

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}},
}
PNG = "iVBORw0KGgoAAAANSUhEUg=="


def translated(endpoint: Endpoint, request: dict[str, Any]) -> dict[str, Any]:
    _, body = request_to_ollama(endpoint, json.dumps({"model": "llama3.2"} | request).encode(), model="llama3.2:3b")
    found: dict[str, Any] = json.loads(body)
    return found


def chat(**fields: object) -> dict[str, Any]:
    return translated(Endpoint.OPENAI_CHAT, {"messages": [{"role": "user", "content": "Hi"}]} | fields)


def completion(**fields: object) -> dict[str, Any]:
    return translated(Endpoint.OPENAI_COMPLETION, {"prompt": "The sky is"} | fields)


def replies(endpoint: Endpoint = Endpoint.OPENAI_CHAT, **asked: Any) -> RepliesFromOllama:
    defaults: dict[str, Any] = {
        "model": "llama3.2",
        "request_id": "r7",
        "created": 1700000000,
        "stream": False,
    }
    return RepliesFromOllama(endpoint, **(defaults | asked))


def lines(*answers: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(answer).encode() + b"\n" for answer in answers)


def chunks(stream: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream that is complete."""
    *events, last, empty = stream.decode().split("\n\n")
    assert (last, empty) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def all_of(reply: RepliesFromOllama, body: bytes) -> bytes:
    return reply.feed(body) + reply.finish()


@pytest.mark.parametrize(
    ("endpoint", "target"),
    [
        (Endpoint.OPENAI_CHAT, Endpoint.OLLAMA_CHAT),
        (Endpoint.OPENAI_COMPLETION, Endpoint.OLLAMA_GENERATE),
        (Endpoint.OPENAI_EMBEDDING, Endpoint.OLLAMA_EMBED),
    ],
)
def test_each_endpoint_has_its_counterpart(endpoint: Endpoint, target: Endpoint) -> None:
    request = b'{"model":"m","messages":[{"role":"user","content":"x"}],"prompt":"x","input":"x"}'

    assert request_to_ollama(endpoint, request, model="m")[0] is target


def test_a_chat_is_said_in_ollamas_words() -> None:
    found = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "this?"}],
            },
        ],
        temperature=0.5,
        top_p=0.9,
        top_k=20,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        seed=7,
        stop="END",
        max_tokens=99,
        max_completion_tokens=64,
        stream=True,
        keep_alive="10m",
        options={"num_ctx": 8192},
        user="somebody",
        logprobs=True,
        top_logprobs=2,
    )

    assert found == {
        "model": "llama3.2:3b",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is\nthis?"},
        ],
        "stream": True,
        "keep_alive": "10m",
        "logprobs": True,
        "top_logprobs": 2,
        "options": {
            "num_ctx": 8192,
            "repeat_penalty": 1.1,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 20,
            "min_p": 0.05,
            "seed": 7,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.2,
            "stop": ["END"],
            "num_predict": 64,
        },
    }


def test_what_is_not_to_stream_says_so_because_ollama_streams_unasked() -> None:
    assert chat()["stream"] is False
    assert completion(stream=None)["stream"] is False


def test_images_become_base64_beside_the_text() -> None:
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
    ]

    found = chat(messages=[{"role": "user", "content": parts}])

    assert found["messages"] == [{"role": "user", "content": "What is this?", "images": [PNG]}]


def test_tool_calls_and_their_answers_are_named_the_way_ollama_does() -> None:
    call = {
        "id": "call_9",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Bonn"}'},
    }

    found = chat(
        messages=[
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Ask."},
            {"role": "tool", "tool_call_id": "call_9", "content": "rain"},
        ],
        tools=[WEATHER],
    )

    assert found["tools"] == [WEATHER]
    assert found["messages"][1:] == [
        {
            "role": "assistant",
            "content": "",
            "thinking": "Ask.",
            "tool_calls": [{"id": "call_9", "function": {"name": "get_weather", "arguments": {"city": "Bonn"}}}],
        },
        {"role": "tool", "content": "rain", "tool_name": "get_weather", "tool_call_id": "call_9"},
    ]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("none", None),
        ("auto", ["get_weather", "get_time"]),
        ("required", ["get_weather", "get_time"]),
        (None, ["get_weather", "get_time"]),
        ({"type": "function", "function": {"name": "get_time"}}, ["get_time"]),
    ],
)
def test_the_choice_of_tools_decides_which_are_offered(choice: object, names: list[str] | None) -> None:
    found = chat(tools=[WEATHER, CLOCK], tool_choice=choice).get("tools")

    assert (found and [tool["function"]["name"] for tool in found]) == names


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, "json"),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}},
            {"type": "array"},
        ),
    ],
)
def test_the_form_of_an_answer_is_asked_for(form: dict[str, object], wanted: object) -> None:
    assert chat(response_format=form).get("format") == wanted


@pytest.mark.parametrize(
    ("effort", "think"),
    [("none", False), ("minimal", "low"), ("low", "low"), ("medium", "medium"), ("xhigh", "high")],
)
def test_effort_becomes_thinking(effort: str, think: object) -> None:
    assert chat(reasoning_effort=effort)["think"] == think


def test_numbers_of_a_tool_keep_their_form() -> None:
    tool = b'{"type":"function","function":{"name":"f","parameters":{"maximum":1.0e2}}}'
    request = b'{"model":"m","messages":[{"role":"user","content":"a\\/b"}],"tools":[' + tool + b"]}"

    body = request_to_ollama(Endpoint.OPENAI_CHAT, request, model="m")[1]

    assert b'"maximum":1.0e2' in body
    assert b'"content":"a\\/b"' in body


def test_a_completion_takes_no_template() -> None:
    found = completion(prompt=["The sky is"], max_tokens=5, logprobs=2)

    assert found == {
        "model": "llama3.2:3b",
        "prompt": "The sky is",
        "stream": False,
        "options": {"num_predict": 5},
        "raw": True,
        "logprobs": True,
        "top_logprobs": 2,
    }


def test_a_completion_with_a_suffix_leaves_the_gap_to_the_template() -> None:
    found = completion(suffix="}")

    assert found["suffix"] == "}"
    assert "raw" not in found


def test_an_embedding_is_asked_for_as_it_came() -> None:
    found = translated(Endpoint.OPENAI_EMBEDDING, {"input": ["a", "b"], "dimensions": 4, "encoding_format": "base64"})

    assert found == {"model": "llama3.2:3b", "input": ["a", "b"], "dimensions": 4}


@pytest.mark.parametrize(
    ("endpoint", "fields", "where"),
    [
        (Endpoint.OPENAI_CHAT, {"n": 2}, "n"),
        (Endpoint.OPENAI_CHAT, {"logit_bias": {"5": 1}}, "logit_bias"),
        (Endpoint.OPENAI_CHAT, {"max_tokens": 0}, "max_tokens"),
        (Endpoint.OPENAI_CHAT, {"max_completion_tokens": 0, "max_tokens": 5}, "max_tokens"),
        (Endpoint.OPENAI_CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (Endpoint.OPENAI_CHAT, {"reasoning_effort": "enormous"}, "reasoning_effort"),
        (Endpoint.OPENAI_CHAT, {"response_format": {"type": "grammar"}}, "response_format.type"),
        (Endpoint.OPENAI_CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            Endpoint.OPENAI_CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
        ),
        (
            Endpoint.OPENAI_CHAT,
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        (Endpoint.OPENAI_CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (Endpoint.OPENAI_COMPLETION, {"n": 2}, "n"),
        (Endpoint.OPENAI_COMPLETION, {"best_of": 2}, "best_of"),
        (Endpoint.OPENAI_COMPLETION, {"echo": True}, "echo"),
        (Endpoint.OPENAI_COMPLETION, {"prompt": ["a", "b"]}, "prompt"),
        (Endpoint.OPENAI_COMPLETION, {"prompt": [1, 2]}, "prompt"),
        (Endpoint.OPENAI_COMPLETION, {"prompt": ""}, "prompt"),
        (Endpoint.OPENAI_EMBEDDING, {"input": [1, 2]}, "input"),
        (Endpoint.OPENAI_EMBEDDING, {"input": [[1, 2]]}, "input"),
    ],
)
def test_what_ollama_cannot_do_is_refused_by_name(endpoint: Endpoint, fields: dict[str, Any], where: str) -> None:
    with pytest.raises(BadRequest) as caught:
        translated(endpoint, {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x"} | fields)

    assert caught.value.where == where


@pytest.mark.parametrize(
    ("part", "where", "sentence"),
    [
        (
            {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
            "messages[0].content[0].image_url",
            "must be a data URL",
        ),
        (
            {"type": "image_url", "image_url": "data:image/png,notbase64"},
            "messages[0].content[0].image_url",
            "must be a data URL",
        ),
        ({"type": "input_audio", "input_audio": {}}, "messages[0].content[0].type", "takes text and images"),
        ({"type": "file", "file": {}}, "messages[0].content[0].type", "takes text and images"),
    ],
)
def test_parts_that_ollama_cannot_take_are_refused_by_name(part: dict[str, Any], where: str, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence) as caught:
        chat(messages=[{"role": "user", "content": [part]}])

    assert caught.value.where == where


@pytest.mark.parametrize("arguments", ["{", "[]", "5", '{"a":' * 5000])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(BadRequest) as caught:
        chat(messages=[{"role": "assistant", "tool_calls": [call]}])

    assert caught.value.where == "messages[0].tool_calls[0].function.arguments"


def test_an_answer_in_one_piece_becomes_a_completion_of_a_chat() -> None:
    answer = {
        "model": "llama3.2",
        "created_at": "2023-12-12T14:13:43.416799Z",
        "message": {"role": "assistant", "content": "Hello! How are you today?", "thinking": "Greet."},
        "done": True,
        "done_reason": "stop",
        "total_duration": 5191566416,
        "prompt_eval_count": 26,
        "eval_count": 298,
    }
    reply = replies()

    assert reply.feed(lines(answer)) == b""
    assert reply.content_type == b"application/json"
    assert json.loads(reply.finish()) == {
        "id": "chatcmpl-r7",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "llama3.2",
        "system_fingerprint": "fp_ollama",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello! How are you today?",
                    "reasoning_content": "Greet.",
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 26, "completion_tokens": 298, "total_tokens": 324},
    }
    assert reply.usage == Usage(26, 298)


def test_tool_calls_in_an_answer_get_ids_of_the_request() -> None:
    calls = [
        {"function": {"name": "get_weather", "arguments": {"city": "Bonn"}}},
        {"function": {"name": "get_time"}},
    ]
    reply = replies()
    reply.feed(lines({"message": {"role": "assistant", "content": "", "tool_calls": calls}, "done": True}))

    choice = json.loads(reply.finish())["choices"][0]

    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert [(call["id"], call["function"]["name"]) for call in choice["message"]["tool_calls"]] == [
        ("call_r7_0", "get_weather"),
        ("call_r7_1", "get_time"),
    ]
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Bonn"}
    assert choice["message"]["tool_calls"][1]["function"]["arguments"] == "{}"


STREAM = lines(
    {"model": "llama3.2", "message": {"role": "assistant", "thinking": "Hm."}, "done": False},
    {"model": "llama3.2", "message": {"role": "assistant", "content": "The"}, "done": False},
    {"model": "llama3.2", "message": {"role": "assistant", "content": " sky é\n"}, "done": False},
    {
        "model": "llama3.2",
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "length",
        "prompt_eval_count": 26,
        "eval_count": 3,
    },
)


def test_a_stream_becomes_chunks_with_the_role_first_and_done_last() -> None:
    reply = replies(stream=True)

    found = chunks(reply.feed(STREAM) + reply.finish())

    assert reply.content_type == b"text/event-stream"
    assert [chunk["choices"][0]["delta"] for chunk in found] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm."},
        {"content": "The"},
        {"content": " sky é\n"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in found] == [None] * 4 + ["length"]
    assert {(chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in found} == {
        ("chatcmpl-r7", "chat.completion.chunk", 1700000000, "llama3.2")
    }
    assert not any("usage" in chunk for chunk in found)
    assert reply.usage == Usage(26, 3)


def test_a_stream_tells_its_tokens_last_where_that_was_asked_for() -> None:
    reply = replies(stream=True, include_usage=True)

    *others, last = chunks(reply.feed(STREAM) + reply.finish())

    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 26, "completion_tokens": 3, "total_tokens": 29}
    assert all(chunk["usage"] is None for chunk in others)


def test_tool_calls_in_a_stream_are_counted_on() -> None:
    def calling(name: str) -> dict[str, Any]:
        return {"message": {"content": "", "tool_calls": [{"function": {"name": name, "arguments": {"a": 1}}}]}}

    reply = replies(stream=True)

    found = chunks(reply.feed(lines(calling("f"), calling("g"), {"message": {}, "done": True, "done_reason": "stop"})))

    assert [chunk["choices"][0]["delta"].get("tool_calls") for chunk in found[1:3]] == [
        [
            {
                "index": 0,
                "id": "call_r7_0",
                "type": "function",
                "function": {"name": "f", "arguments": '{"a": 1}'},
            }
        ],
        [
            {
                "index": 1,
                "id": "call_r7_1",
                "type": "function",
                "function": {"name": "g", "arguments": '{"a": 1}'},
            }
        ],
    ]
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream_split_at_any_byte_becomes_the_same_bytes(include_usage: bool) -> None:
    def output(*pieces: bytes) -> bytes:
        reply = replies(stream=True, include_usage=include_usage)
        return b"".join(map(reply.feed, pieces)) + reply.finish()

    whole = output(STREAM)

    assert all(output(STREAM[:at], STREAM[at:]) == whole for at in range(len(STREAM)))
    assert output(*(STREAM[at : at + 1] for at in range(len(STREAM)))) == whole
    assert output(STREAM[:-1]) == whole


def test_what_can_be_sent_is_sent_at_once() -> None:
    reply = replies(stream=True)
    first, second, *_ = STREAM.splitlines(keepends=True)

    assert b"Hm." in reply.feed(first + second[:-1])
    assert b"The" in reply.feed(second[-1:])


def test_an_error_in_a_stream_is_its_last_event() -> None:
    reply = replies(stream=True)
    sent = reply.feed(lines({"message": {"content": "The"}}, {"error": "out of memory"}, {"message": {"content": "x"}}))

    last = sent.decode().split("\n\n")[-2]

    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "out of memory"
    assert b'"x"' not in sent
    assert reply.finish() == b""


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "broke off"),
        (b'{"message":{"content":"The"},"done":false}\n', "broke off"),
        (b"<html>\n", "could not be read"),
        (b'{"message":5}\n', "could not be read"),
        (b"[" * 10_000 + b"\n", "could not be read"),
    ],
)
def test_a_stream_that_is_none_is_not_translated(body: bytes, sentence: str) -> None:
    with pytest.raises(Untranslatable, match=sentence):
        all_of(replies(stream=True), body)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "could not be read"),
        (b'{"message":{"content":"The"},"done":false}', "not complete"),
        (b'{"error":"out of memory"}', "out of memory"),
        (
            b'{"message":{"tool_calls":[{"function":{"name":"f","arguments":{"a":"\xff"}}}]},"done":true}',
            "arguments",
        ),
    ],
)
def test_an_answer_that_is_none_is_not_translated(body: bytes, sentence: str) -> None:
    reply = replies()
    reply.feed(body)
    with pytest.raises(Untranslatable, match=sentence):
        reply.finish()


LIKELY = {
    "token": "Hi",
    "logprob": -0.5,
    "bytes": [72, 105],
    "top_logprobs": [{"token": "Hi", "logprob": -0.5}, {"token": "é", "logprob": -1.5}],
}


def test_a_chat_tells_how_likely_its_tokens_were() -> None:
    reply = replies()
    reply.feed(lines({"message": {"content": "Hi"}, "done": True, "logprobs": [LIKELY]}))

    assert json.loads(reply.finish())["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "Hi",
                "logprob": -0.5,
                "bytes": [72, 105],
                "top_logprobs": [
                    {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]},
                    {"token": "é", "logprob": -1.5, "bytes": [195, 169]},
                ],
            }
        ],
        "refusal": None,
    }


def test_a_streamed_completion_counts_characters_for_its_logprobs() -> None:
    reply = replies(Endpoint.OPENAI_COMPLETION, stream=True)

    found = chunks(
        reply.feed(
            lines(
                {"response": "Hi", "logprobs": [LIKELY]},
                {"response": "Hi", "logprobs": [LIKELY]},
                {"response": "", "done": True, "done_reason": "stop"},
            )
        )
    )

    assert [chunk["choices"][0]["text"] for chunk in found] == ["Hi", "Hi", ""]
    assert [chunk["choices"][0]["logprobs"] for chunk in found] == [
        {
            "tokens": ["Hi"],
            "token_logprobs": [-0.5],
            "top_logprobs": [{"Hi": -0.5, "é": -1.5}],
            "text_offset": [offset],
        }
        for offset in (0, 2)
    ] + [None]
    assert found[-1]["choices"][0]["finish_reason"] == "stop"
    assert found[0]["object"] == "text_completion"


def test_an_answer_in_one_piece_becomes_a_text_completion() -> None:
    reply = replies(Endpoint.OPENAI_COMPLETION)
    reply.feed(lines({"response": " blue", "done": True, "prompt_eval_count": 4, "eval_count": 1}))

    assert json.loads(reply.finish()) == {
        "id": "cmpl-r7",
        "object": "text_completion",
        "created": 1700000000,
        "model": "llama3.2",
        "system_fingerprint": "fp_ollama",
        "choices": [{"index": 0, "text": " blue", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5},
    }


def test_embeddings_become_a_list() -> None:
    reply = replies(Endpoint.OPENAI_EMBEDDING)
    reply.feed(b'{"model":"m","embeddings":[[0.010071029,-1e-3],[1,2]],"total_duration":1,"prompt_eval_count":8}')

    assert json.loads(reply.finish()) == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.010071029, -1e-3]},
            {"object": "embedding", "index": 1, "embedding": [1, 2]},
        ],
        "model": "llama3.2",
        "usage": {"prompt_tokens": 8, "total_tokens": 8},
    }
    assert reply.usage == Usage(8, 0)


def test_embeddings_are_packed_where_the_client_wants_base64() -> None:
    request = b'{"model":"m","input":"x","encoding_format":"base64"}'
    reply = RepliesFromOllama.for_request(Endpoint.OPENAI_EMBEDDING, request, model="m", request_id="r", created=1)
    reply.feed(b'{"embeddings":[[0.5,-2,3.25]]}')

    packed = json.loads(reply.finish())["data"][0]["embedding"]

    assert struct.unpack("<3f", base64.b64decode(packed)) == (0.5, -2.0, 3.25)


@pytest.mark.parametrize("body", [b"{}", b"", b'{"embeddings":[["a"]]}', b'{"embeddings":[[1e300]]}'])
def test_embeddings_that_are_none_are_not_translated(body: bytes) -> None:
    reply = replies(Endpoint.OPENAI_EMBEDDING, in_base64=True)
    reply.feed(body)
    with pytest.raises(Untranslatable):
        reply.finish()


@pytest.mark.parametrize("endpoint", [Endpoint.OPENAI_CHAT, Endpoint.OPENAI_COMPLETION])
def test_how_to_answer_is_read_from_the_request(endpoint: Endpoint) -> None:
    request = {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "prompt": "x",
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    reply = RepliesFromOllama.for_request(endpoint, json.dumps(request).encode(), model="m", request_id="r", created=1)

    sent = chunks(reply.feed(lines({"done": True, "prompt_eval_count": 1, "eval_count": 2})))

    assert sent[-1]["usage"]["total_tokens"] == 3
