"""Ollama clients on OpenAI nodes: requests there, answers back."""

from __future__ import annotations

import base64
import itertools
import json
import struct
from typing import Any

import pytest

from sutazai.core.errors import BadRequest
from sutazai.core.request import Endpoint, Usage
from sutazai.dialects.framing import Untranslatable
from sutazai.dialects.to_openai import RepliesFromOpenAI, load_reply, request_to_openai

CREATED_AT = "2023-08-04T19:22:45.499127Z"
PNG, JPEG, WEBP, GIF = "iVBORw0KGgoAAAA=", "/9j/4AAQSkZJRg==", "UklGRiIAAABXRUJQ", "R0lGODlhAQABAAAA"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "maximum": 1.5}}}


def translated(endpoint: Endpoint, **fields: object) -> tuple[Endpoint, dict[str, Any]]:
    request = json.dumps({"model": "qwen3"} | fields).encode()
    target, body = request_to_openai(endpoint, request, model="Qwen/Qwen3-8B")
    return target, json.loads(body)


def chat(**fields: object) -> dict[str, Any]:
    return translated(Endpoint.OLLAMA_CHAT, **({"messages": [{"role": "user", "content": "Hi"}]} | fields))[1]


def replies(
    endpoint: Endpoint = Endpoint.OLLAMA_CHAT, *, stream: bool = True, step_s: float = 0.5
) -> RepliesFromOpenAI:
    """A translator with a clock that goes on by `step_s` each time that it is looked at."""
    ticks = itertools.count()
    return RepliesFromOpenAI(
        endpoint, model="qwen3", stream=stream, now=lambda: next(ticks) * step_s, clock=lambda: CREATED_AT
    )


def events(*chunks: dict[str, Any], done: bool = True) -> bytes:
    body = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    return body + b"data: [DONE]\n\n" if done else body


def delta(reason: str | None = None, **fields: object) -> dict[str, Any]:
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": fields, "finish_reason": reason}],
    }


def parsed(sent: bytes) -> list[dict[str, Any]]:
    assert sent.endswith(b"\n")
    return [json.loads(line) for line in sent.splitlines()]


def said(endpoint: Endpoint, body: bytes, *, stream: bool = True) -> list[dict[str, Any]]:
    reply = replies(endpoint, stream=stream)
    sent = reply.feed(body) + reply.finish()
    return parsed(sent) if stream else [json.loads(sent)]


def all_of(reply: RepliesFromOpenAI, body: bytes) -> bytes:
    return reply.feed(body) + reply.finish()


def test_a_chat_is_said_in_openais_words() -> None:
    found = chat(
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        tools=[TOOL],
        keep_alive="5m",
        options={
            "num_ctx": 8192,
            "num_gpu": 1,
            "num_predict": 64,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 20.0,
            "min_p": 0.05,
            "seed": 7,
            "typical_p": 0.8,
            "repeat_penalty": 1.1,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.2,
            "stop": ["a", "b"],
        },
    )

    assert found == {
        "model": "Qwen/Qwen3-8B",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [TOOL],
        "max_tokens": 64,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "seed": 7,
        "typical_p": 0.8,
        "repeat_penalty": 1.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "stop": ["a", "b"],
    }


def test_what_is_not_to_stream_asks_for_no_options_of_streams() -> None:
    found = chat(stream=False)

    assert found["stream"] is False
    assert "stream_options" not in found


@pytest.mark.parametrize("limit", [-1, -2, 0, None])
def test_no_limit_is_said_by_leaving_it_out(limit: object) -> None:
    assert "max_tokens" not in chat(options={"num_predict": limit})


@pytest.mark.parametrize(
    ("image", "kind"), [(PNG, "png"), (JPEG, "jpeg"), (WEBP, "webp"), (GIF, "gif"), ("AAAA", "png")]
)
def test_images_become_data_urls_of_their_kind(image: str, kind: str) -> None:
    found = chat(messages=[{"role": "user", "content": "What?", "images": [image]}])

    assert found["messages"][0]["content"] == [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{image}"}},
    ]


def test_an_image_without_text_is_the_only_part() -> None:
    found = chat(messages=[{"role": "user", "images": [PNG]}])

    assert [part["type"] for part in found["messages"][0]["content"]] == ["image_url"]


def test_answers_of_tools_find_their_calls() -> None:
    def call(name: str, **arguments: object) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": arguments}}

    found = chat(
        messages=[
            {"role": "user", "content": "?"},
            {
                "role": "assistant",
                "content": "",
                "thinking": "Ask.",
                "tool_calls": [call("f", a=1), call("g")],
            },
            {"role": "tool", "content": "G", "tool_name": "g"},
            {"role": "tool", "content": "F", "tool_name": "f"},
            {"role": "assistant", "tool_calls": [call("f", a=2), call("f", a=3)]},
            {"role": "tool", "content": "F2", "tool_name": "f"},
            {"role": "tool", "content": "F3"},
        ]
    )["messages"]

    assert found[1]["reasoning_content"] == "Ask."
    assert [(call["id"], json.loads(call["function"]["arguments"])) for call in found[1]["tool_calls"]] == [
        ("call_1_0", {"a": 1}),
        ("call_1_1", {}),
    ]
    assert [(turn["tool_call_id"], turn["content"]) for turn in found if turn["role"] == "tool"] == [
        ("call_1_1", "G"),
        ("call_1_0", "F"),
        ("call_4_0", "F2"),
        ("call_4_1", "F3"),
    ]


def test_ids_of_calls_are_kept_where_the_client_has_them() -> None:
    found = chat(
        messages=[
            {"role": "assistant", "tool_calls": [{"id": "x1", "function": {"name": "f", "arguments": {}}}]},
            {"role": "tool", "content": "F", "tool_call_id": "x1"},
        ]
    )["messages"]

    assert found[0]["tool_calls"][0]["id"] == found[1]["tool_call_id"] == "x1"


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("", None),
        (None, None),
        ("json", {"type": "json_object"}),
        (
            {"type": "array"},
            {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "array"}}},
        ),
    ],
)
def test_the_form_of_an_answer_is_asked_for(form: object, wanted: object) -> None:
    assert chat(format=form).get("response_format") == wanted


def test_thinking_is_a_switch_of_the_template_and_a_level_of_effort() -> None:
    assert chat(think=False)["chat_template_kwargs"] == {"enable_thinking": False}
    assert "reasoning_effort" not in chat(think=True)
    assert chat(think="high")["reasoning_effort"] == "high"
    assert chat(think="high")["chat_template_kwargs"] == {"enable_thinking": True}
    assert "chat_template_kwargs" not in chat()


def test_a_prompt_becomes_a_chat_because_the_node_has_the_template() -> None:
    target, found = translated(
        Endpoint.OLLAMA_GENERATE,
        prompt="Why?",
        system="Be brief.",
        images=[PNG],
        context=[1, 2],
        logprobs=True,
    )

    assert target is Endpoint.OPENAI_CHAT
    assert [turn["role"] for turn in found["messages"]] == ["system", "user"]
    assert found["messages"][1]["content"][0] == {"type": "text", "text": "Why?"}
    assert found["logprobs"] is True
    assert "context" not in found


def test_a_raw_prompt_becomes_a_completion() -> None:
    target, found = translated(
        Endpoint.OLLAMA_GENERATE, prompt="The sky", raw=True, stream=False, logprobs=True, top_logprobs=3
    )

    assert target is Endpoint.OPENAI_COMPLETION
    assert found == {"model": "Qwen/Qwen3-8B", "prompt": "The sky", "stream": False, "logprobs": 3}


def test_a_gap_to_fill_becomes_a_completion_with_a_suffix() -> None:
    target, found = translated(Endpoint.OLLAMA_GENERATE, prompt="def f():", suffix="return 1")

    assert (target, found["suffix"]) == (Endpoint.OPENAI_COMPLETION, "return 1")


def test_both_forms_of_embedding_become_one() -> None:
    new = translated(Endpoint.OLLAMA_EMBED, input=["a", "b"], truncate=True, dimensions=4)
    old = translated(Endpoint.OLLAMA_EMBEDDINGS, prompt="a")

    assert new == (
        Endpoint.OPENAI_EMBEDDING,
        {
            "model": "Qwen/Qwen3-8B",
            "input": ["a", "b"],
            "encoding_format": "float",
            "dimensions": 4,
            "truncate_prompt_tokens": -1,
        },
    )
    assert old == (
        Endpoint.OPENAI_EMBEDDING,
        {"model": "Qwen/Qwen3-8B", "input": "a", "encoding_format": "float"},
    )


@pytest.mark.parametrize(
    ("endpoint", "fields", "where"),
    [
        (Endpoint.OLLAMA_CHAT, {"messages": []}, "messages"),
        (Endpoint.OLLAMA_CHAT, {"format": "xml"}, "format"),
        (Endpoint.OLLAMA_CHAT, {"think": "deeply"}, "think"),
        (Endpoint.OLLAMA_GENERATE, {"prompt": ""}, "prompt"),
        (Endpoint.OLLAMA_GENERATE, {"template": "{{ .Prompt }}"}, "template"),
        (Endpoint.OLLAMA_GENERATE, {"raw": True, "images": [PNG]}, "images"),
        (Endpoint.OLLAMA_GENERATE, {"raw": True, "system": "Be brief."}, "system"),
        (Endpoint.OLLAMA_EMBED, {"input": []}, "input"),
        (Endpoint.OLLAMA_EMBEDDINGS, {"prompt": None}, "prompt"),
    ],
)
def test_what_such_a_node_cannot_do_is_refused_by_name(endpoint: Endpoint, fields: dict[str, Any], where: str) -> None:
    well = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x"}
    with pytest.raises(BadRequest) as caught:
        translated(endpoint, **(well | fields))

    assert caught.value.where == where


STREAM = b": waiting\r\n\r\n" + events(
    delta(role="assistant", content=""),
    delta(reasoning_content="Hm."),
    delta(content="The"),
    delta(content=" sky é\n"),
    delta("length"),
    {
        "object": "chat.completion.chunk",
        "choices": [],
        "usage": {"prompt_tokens": 26, "completion_tokens": 3},
    },
)


def test_a_stream_becomes_lines() -> None:
    reply = replies()
    *lines, last = parsed(reply.feed(STREAM) + reply.finish())

    assert reply.content_type == b"application/x-ndjson"
    assert lines == [
        {
            "model": "qwen3",
            "created_at": CREATED_AT,
            "message": {"role": "assistant", "content": content, **thinking},
            "done": False,
        }
        for content, thinking in [("", {"thinking": "Hm."}), ("The", {}), (" sky é\n", {})]
    ]
    assert last == {
        "model": "qwen3",
        "created_at": CREATED_AT,
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "length",
        "total_duration": 1_500_000_000,
        "load_duration": 0,
        "prompt_eval_count": 26,
        "prompt_eval_duration": 500_000_000,
        "eval_count": 3,
        "eval_duration": 500_000_000,
    }
    assert reply.usage == Usage(26, 3)


@pytest.mark.parametrize("stream", [STREAM, STREAM.replace(b"\n", b"\r\n"), STREAM.removesuffix(b"\n")])
def test_a_stream_split_at_any_byte_becomes_the_same_bytes(stream: bytes) -> None:
    def output(*pieces: bytes) -> bytes:
        reply = replies(step_s=0)
        return b"".join(map(reply.feed, pieces)) + reply.finish()

    whole = output(STREAM)

    assert all(output(stream[:at], stream[at:]) == whole for at in range(len(stream)))
    assert output(*(stream[at : at + 1] for at in range(len(stream)))) == whole


def test_what_can_be_sent_is_sent_at_once() -> None:
    reply = replies()

    assert b"The" in reply.feed(events(delta(content="The"), done=False))


def test_tool_calls_are_sent_once_they_are_complete() -> None:
    def piece(index: int, arguments: str, **named: object) -> dict[str, Any]:
        return delta(tool_calls=[{"index": index, **named, "function": {"arguments": arguments} | named}])

    body = events(
        piece(0, "", id="a", name="f"),
        piece(0, '{"city": "Bo'),
        piece(1, "", id="b", name="g"),
        piece(0, 'nn", "n": 1.0}'),
        delta("tool_calls"),
    )

    calling, last = said(Endpoint.OLLAMA_CHAT, body)

    assert calling["message"]["tool_calls"] == [
        {"function": {"index": 0, "name": "f", "arguments": {"city": "Bonn", "n": 1.0}}},
        {"function": {"index": 1, "name": "g", "arguments": {}}},
    ]
    assert (calling["done"], last["done"], last["done_reason"]) == (False, True, "stop")


def test_a_call_that_was_cut_by_the_limit_is_dropped() -> None:
    body = events(delta(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": '{"a'}}]), delta("length"))

    (last,) = said(Endpoint.OLLAMA_CHAT, body)

    assert last["done_reason"] == "length"


def test_the_measurements_of_llama_cpp_are_preferred() -> None:
    timings = {"prompt_n": 4, "cache_n": 6, "prompt_ms": 12.5, "predicted_n": 3, "predicted_ms": 30.25}
    (last,) = said(Endpoint.OLLAMA_CHAT, events(delta("stop") | {"timings": timings}))

    assert (last["prompt_eval_count"], last["prompt_eval_duration"]) == (10, 12_500_000)
    assert (last["eval_count"], last["eval_duration"]) == (3, 30_250_000)


@pytest.mark.parametrize("body", [events(delta(content="A"), delta("stop"), done=False), events(delta(content="A"))])
def test_a_reason_or_a_mark_is_end_enough(body: bytes) -> None:
    line, last = said(Endpoint.OLLAMA_CHAT, body)

    assert (line["message"]["content"], last["done"], last["done_reason"]) == ("A", True, "stop")


@pytest.mark.parametrize(
    "error",
    [
        b'data: {"error":{"message":"out of memory","type":"server_error","code":500}}\n\n',
        b'error: {"code":500,"message":"out of memory","type":"server_error"}\n\n',
        b'data: {"object":"error","message":"out of memory","code":400}\n\n',
        b'event: error\ndata: {"error":"out of memory"}\n\n',
    ],
)
def test_an_error_in_a_stream_is_its_last_line(error: bytes) -> None:
    reply = replies()
    sent = reply.feed(events(delta(content="A"), done=False) + error + events(delta(content="B")))

    assert parsed(sent)[1:] == [{"error": "out of memory"}]
    assert reply.finish() == b""


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "broke off"),
        (events(delta(content="A"), done=False), "broke off"),
        (b"data: <html>\n\n", "could not be read"),
        (b'data: {"choices":[{"delta":5}]}\n\n', "could not be read"),
        (
            events(delta("tool_calls", tool_calls=[{"index": 0, "function": {"name": "f", "arguments": "{"}}])),
            "arguments of a call of 'f' were not JSON",
        ),
    ],
)
def test_a_stream_that_is_none_is_not_translated(body: bytes, sentence: str) -> None:
    with pytest.raises(Untranslatable, match=sentence):
        all_of(replies(stream=True), body)


WHOLE = {
    "id": "chatcmpl-123",
    "object": "chat.completion",
    "created": 1677652288,
    "model": "gpt-4o-mini",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Hello there!",
                "reasoning": "Greet.",
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
                    {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
                ],
            },
            "logprobs": None,
            "finish_reason": "tool_calls",
        }
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21},
}


def test_an_answer_in_one_piece_becomes_one_object() -> None:
    reply = replies(stream=False)

    assert reply.feed(json.dumps(WHOLE).encode()) == b""
    assert reply.content_type == b"application/json; charset=utf-8"
    assert json.loads(reply.finish()) == {
        "model": "qwen3",
        "created_at": CREATED_AT,
        "message": {
            "role": "assistant",
            "content": "Hello there!",
            "thinking": "Greet.",
            "tool_calls": [
                {"function": {"index": 0, "name": "f", "arguments": {"a": 1}}},
                {"function": {"index": 1, "name": "g", "arguments": {}}},
            ],
        },
        "done": True,
        "done_reason": "stop",
        "total_duration": 1_000_000_000,
        "load_duration": 0,
        "prompt_eval_count": 9,
        "prompt_eval_duration": 0,
        "eval_count": 12,
        "eval_duration": 500_000_000,
    }


@pytest.mark.parametrize(
    "choice",
    [{"text": " blue", "finish_reason": "stop"}, {"message": {"content": " blue"}, "finish_reason": "stop"}],
)
def test_a_prompt_is_answered_whichever_way_it_was_asked(choice: dict[str, Any]) -> None:
    (answer,) = said(Endpoint.OLLAMA_GENERATE, json.dumps({"choices": [choice]}).encode(), stream=False)

    assert answer["response"] == " blue"
    assert "message" not in answer


def test_a_streamed_completion_becomes_responses() -> None:
    found = said(
        Endpoint.OLLAMA_GENERATE,
        events({"choices": [{"text": " blue"}]}, {"choices": [{"text": "", "finish_reason": "stop"}]}),
    )

    assert [line["response"] for line in found] == [" blue", ""]


@pytest.mark.parametrize(
    "logprobs",
    [
        {"tokens": ["Hi"], "token_logprobs": [-0.5], "top_logprobs": [{"Ho": -1.5}], "text_offset": [0]},
        {"content": [{"token": "Hi", "logprob": -0.5, "top_logprobs": [{"token": "Ho", "logprob": -1.5}]}]},
    ],
)
def test_both_forms_of_logprobs_become_ollamas(logprobs: dict[str, Any]) -> None:
    choice = {"text": "Hi", "logprobs": logprobs, "finish_reason": "stop"}

    streamed, _ = said(Endpoint.OLLAMA_GENERATE, events({"choices": [choice]}))
    (whole,) = said(Endpoint.OLLAMA_GENERATE, json.dumps({"choices": [choice]}).encode(), stream=False)

    assert streamed["logprobs"] == whole["logprobs"]
    assert whole["logprobs"] == [
        {
            "token": "Hi",
            "logprob": -0.5,
            "bytes": [72, 105],
            "top_logprobs": [{"token": "Ho", "logprob": -1.5, "bytes": [72, 111]}],
        }
    ]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "could not be read"),
        (b'{"choices":[]}', "had no choices"),
        (b'{"error":{"message":"out of memory"}}', "out of memory"),
    ],
)
def test_an_answer_that_is_none_is_not_translated(body: bytes, sentence: str) -> None:
    reply = replies(stream=False)
    reply.feed(body)
    with pytest.raises(Untranslatable, match=sentence):
        reply.finish()


PACKED = base64.b64encode(struct.pack("<2f", 0.5, -2)).decode()


def test_embeddings_are_put_in_order() -> None:
    data = [{"index": 1, "embedding": PACKED}, {"index": 0, "embedding": [1.5, 2]}]
    reply = replies(Endpoint.OLLAMA_EMBED, stream=False)
    reply.feed(json.dumps({"data": data, "usage": {"prompt_tokens": 8, "total_tokens": 8}}).encode())

    assert json.loads(reply.finish()) == {
        "model": "qwen3",
        "embeddings": [[1.5, 2], [0.5, -2]],
        "total_duration": 500_000_000,
        "load_duration": 0,
        "prompt_eval_count": 8,
    }
    assert reply.usage == Usage(8, 0)


def test_the_older_form_of_embedding_gets_one_vector() -> None:
    (answer,) = said(Endpoint.OLLAMA_EMBEDDINGS, b'{"data":[{"index":0,"embedding":[0.25]}]}', stream=False)

    assert answer == {"embedding": [0.25]}


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"data":[]}', b'{"data":[{"embedding":"%"}]}', b'{"data":[{"embedding":"AAA="}]}']
)
def test_embeddings_that_are_none_are_not_translated(body: bytes) -> None:
    reply = replies(Endpoint.OLLAMA_EMBEDDINGS, stream=False)
    reply.feed(body)
    with pytest.raises(Untranslatable):
        reply.finish()


@pytest.mark.parametrize(
    ("endpoint", "answer"),
    [
        (Endpoint.OLLAMA_CHAT, {"message": {"role": "assistant", "content": ""}}),
        (Endpoint.OLLAMA_GENERATE, {"response": ""}),
    ],
)
def test_a_request_to_load_is_answered_as_ollama_does(endpoint: Endpoint, answer: dict[str, object]) -> None:
    head = {"model": "qwen3", "created_at": CREATED_AT, "done": True, "done_reason": "load"}

    assert json.loads(load_reply(endpoint, "qwen3", CREATED_AT)) == head | answer


def test_a_request_to_load_an_embedder_gets_no_vectors() -> None:
    assert load_reply(Endpoint.OLLAMA_EMBED, "m", CREATED_AT) == b'{"model":"m","embeddings":[]}'
    assert load_reply(Endpoint.OLLAMA_EMBEDDINGS, "m", CREATED_AT) == b'{"embedding":[]}'
