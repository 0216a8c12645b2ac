"""What is read of a request, and what is said about a wrong one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.errors import BadRequest
from sutazai.core.request import Dialect, Endpoint
from sutazai.dialects.reading import Asked, is_load_request, read

CHAT = {"model": "llama3.2", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
COMPLETION = {"model": "llama3.2", "prompt": "The sky is"}
EMBEDDING = {"model": "nomic", "input": "blue"}

WELL_FORMED: dict[Endpoint, dict[str, Any]] = {
    Endpoint.OPENAI_CHAT: CHAT,
    Endpoint.OPENAI_COMPLETION: COMPLETION,
    Endpoint.OPENAI_EMBEDDING: EMBEDDING,
    Endpoint.OLLAMA_CHAT: CHAT,
    Endpoint.OLLAMA_GENERATE: COMPLETION,
    Endpoint.OLLAMA_EMBED: EMBEDDING,
    Endpoint.OLLAMA_EMBEDDINGS: COMPLETION,
}
ENDPOINTS = list(Endpoint)
OPENAI = [endpoint for endpoint in Endpoint if endpoint.dialect is Dialect.OPENAI]
OLLAMA = [endpoint for endpoint in Endpoint if endpoint.dialect is Dialect.OLLAMA]


def asked(endpoint: Endpoint, **fields: object) -> Asked:
    return read(endpoint, json.dumps(WELL_FORMED[endpoint] | fields).encode())


def refused(endpoint: Endpoint, body: bytes | dict[str, Any]) -> BadRequest:
    written = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(BadRequest) as caught:
        read(endpoint, written)
    return caught.value


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_model_is_read(endpoint: Endpoint) -> None:
    assert asked(endpoint, model="qwen3:8b").model == "qwen3:8b"


@pytest.mark.parametrize(
    ("endpoint", "streams"),
    [
        (Endpoint.OPENAI_CHAT, False),
        (Endpoint.OPENAI_COMPLETION, False),
        (Endpoint.OPENAI_EMBEDDING, False),
        (Endpoint.OLLAMA_CHAT, True),
        (Endpoint.OLLAMA_GENERATE, True),
        (Endpoint.OLLAMA_EMBED, False),
        (Endpoint.OLLAMA_EMBEDDINGS, False),
    ],
)
def test_each_dialect_has_its_own_default_of_streaming(endpoint: Endpoint, streams: bool) -> None:
    assert asked(endpoint).stream is streams
    assert asked(endpoint, stream=None).stream is streams


@pytest.mark.parametrize(
    "endpoint",
    [
        Endpoint.OPENAI_CHAT,
        Endpoint.OPENAI_COMPLETION,
        Endpoint.OLLAMA_CHAT,
        Endpoint.OLLAMA_GENERATE,
    ],
)
def test_a_client_may_choose_to_stream_or_not(endpoint: Endpoint) -> None:
    assert asked(endpoint, stream=True).stream is True
    assert asked(endpoint, stream=False).stream is False


@pytest.mark.parametrize("endpoint", [Endpoint.OPENAI_EMBEDDING, Endpoint.OLLAMA_EMBED, Endpoint.OLLAMA_EMBEDDINGS])
def test_embeddings_never_stream(endpoint: Endpoint) -> None:
    assert asked(endpoint, stream=True).stream is False


@pytest.mark.parametrize("endpoint", OLLAMA)
def test_the_context_length_is_read_and_is_a_load_option(endpoint: Endpoint) -> None:
    found = asked(endpoint, options={"num_ctx": 8192})

    assert (found.context_tokens, found.has_load_options) == (8192, True)


def test_a_context_length_with_a_fraction_is_cut_as_ollama_does() -> None:
    assert asked(Endpoint.OLLAMA_CHAT, options={"num_ctx": 4096.9}).context_tokens == 4096


@pytest.mark.parametrize(
    "name",
    ["num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock", "low_vram", "f16_kv", "numa"],
)
def test_options_that_reload_a_model_are_seen(name: str) -> None:
    value = name in {"use_mmap", "use_mlock", "low_vram", "f16_kv", "numa"} or 1

    assert asked(Endpoint.OLLAMA_GENERATE, options={name: value}).has_load_options


@pytest.mark.parametrize("options", [{}, None, {"num_keep": 4, "temperature": 0.1}, {"num_ctx": None}])
def test_other_options_reload_nothing(options: object) -> None:
    found = asked(Endpoint.OLLAMA_CHAT, options=options)

    assert (found.context_tokens, found.has_load_options) == (0, False)


def test_the_wish_for_usage_in_a_stream_is_read() -> None:
    assert asked(Endpoint.OPENAI_CHAT, stream=True, stream_options={"include_usage": True}).include_usage
    assert not asked(Endpoint.OPENAI_CHAT, stream=True, stream_options={"include_usage": None}).include_usage
    assert not asked(Endpoint.OPENAI_COMPLETION, stream=True, stream_options=None).include_usage


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (Endpoint.OLLAMA_CHAT, {"model": "m"}),
        (Endpoint.OLLAMA_CHAT, {"model": "m", "messages": []}),
        (Endpoint.OLLAMA_GENERATE, {"model": "m"}),
        (Endpoint.OLLAMA_GENERATE, {"model": "m", "prompt": ""}),
        (Endpoint.OLLAMA_GENERATE, {"model": "m", "prompt": None}),
        (Endpoint.OLLAMA_EMBED, {"model": "m", "input": []}),
        (Endpoint.OLLAMA_EMBEDDINGS, {"model": "m", "prompt": ""}),
    ],
)
def test_an_ollama_request_without_text_only_loads_the_model(endpoint: Endpoint, body: dict[str, object]) -> None:
    assert is_load_request(endpoint, json.dumps(body).encode())


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_request_with_text_does_not_only_load(endpoint: Endpoint) -> None:
    assert not asked(endpoint).loads_only
    assert not is_load_request(endpoint, json.dumps(WELL_FORMED[endpoint]).encode())


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (
            Endpoint.OPENAI_CHAT,
            {"messages": [{"role": "developer", "content": [{"type": "text", "text": "Hi"}]}]},
        ),
        (Endpoint.OPENAI_CHAT, {"messages": [{"role": "assistant", "content": None}]}),
        (Endpoint.OPENAI_CHAT, {"messages": [{"role": "assistant"}]}),
        (Endpoint.OPENAI_CHAT, {"messages": [{"role": "tool", "tool_call_id": "a", "content": "4"}]}),
        (
            Endpoint.OPENAI_CHAT,
            {"temperature": None, "max_tokens": None, "stop": None, "tools": None, "n": None},
        ),
        (Endpoint.OPENAI_CHAT, {"temperature": 1, "seed": 2**80, "stop": ["a", "b"], "n": 128}),
        (
            Endpoint.OPENAI_CHAT,
            {"tool_choice": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]},
        ),
        (Endpoint.OPENAI_CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
        (Endpoint.OPENAI_CHAT, {"something_new": [{}, 1e300]}),
        (Endpoint.OPENAI_COMPLETION, {"prompt": ["a", "b"], "logprobs": 3}),
        (Endpoint.OPENAI_COMPLETION, {"prompt": [1, 2]}),
        (Endpoint.OPENAI_COMPLETION, {"prompt": [[1, 2], [3]]}),
        (Endpoint.OPENAI_EMBEDDING, {"input": [[1, 2], [3]], "encoding_format": "base64", "dimensions": 4}),
        (Endpoint.OLLAMA_CHAT, {"messages": [{"role": "user", "content": "Hi", "images": ["iVBORw0KGgo="]}]}),
        (Endpoint.OLLAMA_CHAT, {"format": "", "keep_alive": "5m", "think": "high"}),
        (
            Endpoint.OLLAMA_CHAT,
            {"format": {"type": "object"}, "keep_alive": -1, "think": False, "logprobs": True},
        ),
        (
            Endpoint.OLLAMA_GENERATE,
            {"context": [1, 2], "raw": True, "options": {"top_k": 20.0, "stop": ["x"]}},
        ),
    ],
)
def test_all_that_the_apis_allow_is_let_through(endpoint: Endpoint, fields: dict[str, object]) -> None:
    assert asked(endpoint, **fields).model == WELL_FORMED[endpoint]["model"]


@pytest.mark.parametrize(
    ("endpoint", "fields", "where", "sentence"),
    [
        (
            Endpoint.OPENAI_CHAT,
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "messages[0].content must be a string or a list of parts, not a number.",
        ),
        (
            Endpoint.OPENAI_CHAT,
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content",
            "messages[0].content must be a string or a list of parts, not null.",
        ),
        (
            Endpoint.OPENAI_CHAT,
            {"messages": [{"role": "robot", "content": "Hi"}]},
            "messages[0].role",
            "messages[0].role must be system, user, assistant or tool, not 'robot'.",
        ),
        (
            Endpoint.OPENAI_CHAT,
            {"messages": [{"content": "Hi"}]},
            "messages[0].role",
            "messages[0].role is missing",
        ),
        (Endpoint.OPENAI_CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        (Endpoint.OPENAI_CHAT, {"messages": []}, "messages", "messages is empty"),
        (Endpoint.OPENAI_CHAT, {"messages": "Hi"}, "messages", "messages must be a list, not a string."),
        (
            Endpoint.OPENAI_CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text",
            "must be a string, not a number.",
        ),
        (
            Endpoint.OPENAI_CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].image_url.url",
            "is missing",
        ),
        (
            Endpoint.OPENAI_CHAT,
            {"messages": [{"role": "user", "content": []}]},
            "messages[0].content",
            "is empty",
        ),
        (
            Endpoint.OPENAI_CHAT,
            {"temperature": "hot"},
            "temperature",
            "temperature must be a number, not a string.",
        ),
        (Endpoint.OPENAI_CHAT, {"max_tokens": -1}, "max_tokens", "max_tokens must be at least 0."),
        (
            Endpoint.OPENAI_CHAT,
            {"max_tokens": 1.5},
            "max_tokens",
            "must be a whole number, not a number with a decimal point.",
        ),
        (Endpoint.OPENAI_CHAT, {"n": 129}, "n", "n must be at most 128."),
        (Endpoint.OPENAI_CHAT, {"n": 0}, "n", "n must be at least 1."),
        (Endpoint.OPENAI_CHAT, {"stop": [1]}, "stop[0]", "stop[0] must be a string, not a number."),
        (Endpoint.OPENAI_CHAT, {"stop": 1}, "stop", "stop must be a string or a list, not a number."),
        (Endpoint.OPENAI_CHAT, {"stream": "yes"}, "stream", "stream must be true or false, not a string."),
        (Endpoint.OPENAI_CHAT, {"tools": {}}, "tools", "tools must be a list, not an object."),
        (Endpoint.OPENAI_CHAT, {"tools": [1]}, "tools[0]", "tools[0] must be an object, not a number."),
        (Endpoint.OPENAI_CHAT, {"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        (
            Endpoint.OPENAI_CHAT,
            {"tool_choice": 3},
            "tool_choice",
            "must be a string or an object, not a number.",
        ),
        (
            Endpoint.OPENAI_CHAT,
            {"response_format": "json"},
            "response_format",
            "must be an object, not a string.",
        ),
        (Endpoint.OPENAI_CHAT, {"logprobs": 2}, "logprobs", "must be true or false, not a number."),
        (
            Endpoint.OPENAI_COMPLETION,
            {"logprobs": True},
            "logprobs",
            "must be a whole number, not true or false.",
        ),
        (Endpoint.OPENAI_COMPLETION, {"prompt": {}}, "prompt", "must be a string or a list, not an object."),
        (Endpoint.OPENAI_COMPLETION, {"prompt": []}, "prompt", "prompt is empty"),
        (Endpoint.OPENAI_COMPLETION, {"prompt": [[1], []]}, "prompt[1]", "prompt[1] is empty"),
        (Endpoint.OPENAI_EMBEDDING, {"input": None}, "input", "must be a string or a list, not null."),
        (Endpoint.OPENAI_EMBEDDING, {"input": [1.5]}, "input[0]", "not a number with a decimal point"),
        (Endpoint.OPENAI_EMBEDDING, {"encoding_format": "hex"}, "encoding_format", "must be float or base64"),
        (Endpoint.OLLAMA_CHAT, {"options": []}, "options", "options must be an object, not a list."),
        (
            Endpoint.OLLAMA_CHAT,
            {"options": {"num_ctx": "4k"}},
            "options.num_ctx",
            "must be a number, not a string.",
        ),
        (Endpoint.OLLAMA_CHAT, {"options": {"num_ctx": -1}}, "options.num_ctx", "must be at least 0."),
        (Endpoint.OLLAMA_CHAT, {"options": {"stop": "x"}}, "options.stop", "must be a list, not a string."),
        (
            Endpoint.OLLAMA_CHAT,
            {"messages": [{"role": "user", "content": ["a"]}]},
            "messages[0].content",
            "must be a string, not a list.",
        ),
        (
            Endpoint.OLLAMA_CHAT,
            {"messages": [{"role": "user", "images": ["data:image/png;base64,AAAA"]}]},
            "messages[0].images[0]",
            "must be base64 alone",
        ),
        (Endpoint.OLLAMA_GENERATE, {"images": [7]}, "images[0]", "must be a string, not a number."),
        (
            Endpoint.OLLAMA_GENERATE,
            {"format": 7},
            "format",
            "format must be a string or an object, not a number.",
        ),
        (Endpoint.OLLAMA_GENERATE, {"prompt": ["a"]}, "prompt", "must be a string, not a list."),
        (Endpoint.OLLAMA_EMBED, {"input": [1]}, "input[0]", "input[0] must be a string, not a number."),
        (
            Endpoint.OLLAMA_EMBED,
            {"input": 1},
            "input",
            "must be a string or a list of strings, not a number.",
        ),
        (Endpoint.OLLAMA_EMBEDDINGS, {"prompt": 1}, "prompt", "must be a string, not a number."),
    ],
)
def test_a_wrong_field_is_named_with_what_it_must_be(
    endpoint: Endpoint, fields: dict[str, object], where: str, sentence: str
) -> None:
    error = refused(endpoint, WELL_FORMED[endpoint] | fields)

    assert error.where == where
    assert sentence in error.message


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "The body is empty; send a JSON object."),
        (b" \n", "The body is empty; send a JSON object."),
        (b"[]", "The body must be a JSON object, not a list."),
        (b'"model"', "The body must be a JSON object, not a string."),
        (b'{"model" 1}', "The body is not JSON: expected ':' (byte 9)."),
        (b'{"model": "m",', "The body is not JSON: it ends in the middle, after 14 bytes."),
        (
            b'{"model":"m","messages":[{"role":"user","content":"x"}],"prompt":"x","input":"x"} {}',
            "trailing characters",
        ),
        (b'{"model": "\xff"}', "The body is not UTF-8: byte 11 cannot be read."),
        (b"\x1f\x8b\x08", "The body is not UTF-8: byte 1 cannot be read."),
        (b"\xef\xbb\xbf{}", "The body starts with a byte order mark"),
        (
            b'{"model": "\\ud800"}',
            "The body holds half of a surrogate pair at byte 11: \\ud800 stands alone.",
        ),
        (b'{"x": ' + b"[" * 100_000, "The body is nested too deeply"),
        (b'{"x": ' + b'{"a": ' * 100_000, "The body is nested too deeply"),
        (b"{}", "model is missing"),
        (b'{"model": 7}', "model must be a string, not a number."),
    ],
)
def test_a_body_that_is_no_request_is_told_so(endpoint: Endpoint, body: bytes, sentence: str) -> None:
    assert sentence in refused(endpoint, body).message


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("model", ["", "a" * 257, "two\nlines", "nul\0", "\x1b[31m"])
def test_a_name_that_no_model_can_have_is_refused(endpoint: Endpoint, model: str) -> None:
    error = refused(endpoint, WELL_FORMED[endpoint] | {"model": model})

    assert error.where == "model"


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 5000, "9" * 400 + ".5"])
def test_a_number_too_large_is_refused_where_we_read_it(number: str) -> None:
    body = b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": %b}' % number.encode()

    assert refused(Endpoint.OPENAI_CHAT, body).where == "temperature"


def test_of_a_field_that_comes_twice_the_last_counts() -> None:
    body = b'{"model": "a", "model": "b", "messages": [{"role": "user", "content": "x"}]}'

    assert read(Endpoint.OPENAI_CHAT, body).model == "b"


TEXTS = st.text('aZ0"\\ \0é\U0001f600\ud800', max_size=8)
FIELDS = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "input",
        "stream",
        "stream_options",
        "temperature",
        "max_tokens",
        "n",
        "stop",
        "seed",
        "tools",
        "tool_choice",
        "role",
        "type",
        "response_format",
        "options",
        "images",
        "format",
        "keep_alive",
        "think",
        "logprobs",
        "suffix",
        "system",
        "context",
        "encoding_format",
        "content",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "num_ctx",
        "image_url",
        "url",
        "text",
    ]
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | TEXTS, inner, max_size=3),
    max_leaves=8,
)


def model_or_complaint(endpoint: Endpoint, body: bytes) -> str:
    try:
        return read(endpoint, body).model
    except BadRequest as error:
        return error.message


@given(endpoint=st.sampled_from(ENDPOINTS), body=st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(endpoint: Endpoint, body: bytes) -> None:
    assert model_or_complaint(endpoint, body)


@given(
    endpoint=st.sampled_from(ENDPOINTS),
    fields=st.dictionaries(FIELDS, JSON_VALUES, max_size=4),
    cut=st.integers(0, 40),
)
def test_any_fields_are_read_or_refused(endpoint: Endpoint, fields: dict[str, object], cut: int) -> None:
    body = json.dumps(WELL_FORMED[endpoint] | fields).encode()

    assert model_or_complaint(endpoint, body)
    assert model_or_complaint(endpoint, body[:-cut])
