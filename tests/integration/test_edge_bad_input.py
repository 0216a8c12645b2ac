"""What a client gets wrong is told to it in its own dialect, as a sentence, and never as a failure of the gateway."""

from __future__ import annotations

import asyncio
import gzip
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sutazai.core.node import NodeKind
from sutazai.core.request import Dialect, Endpoint
from sutazai.settings.model import Server

if TYPE_CHECKING:
    from tests.conftest import Answered, Dial, StartGateway, StartNode, Wire

ALL_ENDPOINTS = pytest.mark.parametrize("endpoint", list(Endpoint), ids=lambda endpoint: endpoint.path)
BODIES: dict[Endpoint, dict[str, object]] = {
    Endpoint.OPENAI_CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    Endpoint.OPENAI_COMPLETION: {"prompt": "hi"},
    Endpoint.OPENAI_EMBEDDING: {"input": "hi"},
    Endpoint.OLLAMA_CHAT: {"messages": [{"role": "user", "content": "hi"}], "stream": False},
    Endpoint.OLLAMA_GENERATE: {"prompt": "hi", "stream": False},
    Endpoint.OLLAMA_EMBED: {"input": "hi"},
    Endpoint.OLLAMA_EMBEDDINGS: {"prompt": "hi"},
}
WRONG = [
    (b"", "is empty"),
    (b"   ", "is empty"),
    (b"hello", "is not JSON"),
    (b'{"model": "llama3"', "ends in the middle"),
    (b"{'model': 'llama3'}", "is not JSON"),
    (b'{"model": "\xff"}', "is not UTF-8"),
    (b'\xef\xbb\xbf{"model": "llama3"}', "byte order mark"),
    ("{}".encode("utf-16"), "is not UTF-8"),
    (b'{"x": ' + b"[" * 100_000, "is nested too deeply"),
    (b"[]", "must be a JSON object"),
    (b"null", "must be a JSON object"),
    (b'"text"', "must be a JSON object"),
    (b"{}", "model is missing"),
    (b'{"model": 5}', "model must be a string"),
    (b'{"model": null}', "model"),
]


@pytest.fixture
async def wire(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> Wire:
    """A connection to a gateway with a node of each kind, each with a model of its own."""
    nodes = [await fake_nodes(kind, (name,)) for kind, name in zip(NodeKind, ("llama3", "qwen3", "phi4"), strict=True)]
    gateway = await gateways(*nodes, server=Server(max_body_bytes=200_000))
    return await dial(gateway.port)


def complaint(endpoint: Endpoint, answer: Answered) -> str:
    """The sentence of an error, which has the form of the dialect."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = answer.json["error"]
    if endpoint.dialect is Dialect.OLLAMA:
        assert list(answer.json) == ["error"]
        sentence: str = error
    else:
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == str(answer.status)
        sentence = error["message"]
    assert sentence[-1] in ".?"
    return sentence


@ALL_ENDPOINTS
async def test_bodies_that_are_no_request_are_told_what_they_are(wire: Wire, endpoint: Endpoint) -> None:
    for body, words in WRONG:
        wire.post(endpoint.path, body)
        answer = await wire.answer()

        assert answer.status == 400, body[:40]
        assert words in complaint(endpoint, answer), body[:40]


@ALL_ENDPOINTS
async def test_a_request_that_is_almost_right_is_told_what_is_missing(wire: Wire, endpoint: Endpoint) -> None:
    right = {"model": "llama3"} | BODIES[endpoint]
    for body, words in (
        (msgspec.json.encode(right) + b" more", "is not JSON"),
        (msgspec.json.encode(right | {"model": ""}), "model is empty"),
        (msgspec.json.encode(right | {"model": "x" * 257}), "at most 256"),
        (msgspec.json.encode(right | {"model": "x\ny"}), "control characters"),
        (msgspec.json.encode(right).replace(b"hi", b"\\ud800"), "surrogate"),
    ):
        wire.post(endpoint.path, body)
        answer = await wire.answer()

        assert answer.status == 400, body
        assert words in complaint(endpoint, answer), body


@pytest.mark.parametrize(
    ("endpoint", "field", "value", "words"),
    [
        (Endpoint.OPENAI_CHAT, "messages", "hi", "messages must be a list"),
        (Endpoint.OPENAI_CHAT, "messages", [5], "messages[0] must be an object"),
        (Endpoint.OPENAI_CHAT, "messages", [{"content": "x"}], "role"),
        (Endpoint.OPENAI_CHAT, "stream", "yes", "stream must be true or false"),
        (Endpoint.OPENAI_CHAT, "temperature", "hot", "temperature must be a number"),
        (Endpoint.OPENAI_COMPLETION, "prompt", {}, "prompt"),
        (Endpoint.OPENAI_EMBEDDING, "input", None, "input"),
        (Endpoint.OLLAMA_CHAT, "messages", {}, "messages must be a list"),
        (Endpoint.OLLAMA_CHAT, "options", [], "options must be an object"),
        (Endpoint.OLLAMA_GENERATE, "prompt", 5, "prompt must be a string"),
        (Endpoint.OLLAMA_GENERATE, "stream", 1, "stream must be true or false"),
    ],
    ids=lambda value: value.path if isinstance(value, Endpoint) else str(value)[:20],
)
async def test_a_field_of_the_wrong_type_is_named(
    wire: Wire, endpoint: Endpoint, field: str, value: object, words: str
) -> None:
    wire.post(endpoint.path, {"model": "llama3"} | BODIES[endpoint] | {field: value})
    answer = await wire.answer()

    assert answer.status == 400
    assert words in complaint(endpoint, answer)
    if endpoint.dialect is Dialect.OPENAI:
        assert answer.json["error"]["param"].startswith(field)


@ALL_ENDPOINTS
async def test_an_unknown_model_is_a_404_with_the_nearest_names(wire: Wire, endpoint: Endpoint) -> None:
    wire.post(endpoint.path, {"model": "lama3"} | BODIES[endpoint])
    answer = await wire.answer()

    assert answer.status == 404
    assert "'lama3' is on no node. Did you mean llama3" in complaint(endpoint, answer)


@ALL_ENDPOINTS
async def test_the_wrong_method_is_told_the_right_one(wire: Wire, endpoint: Endpoint) -> None:
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH"):
        wire.get(endpoint.path, method=method)
        answer = await wire.answer()

        assert answer.status == 405, method
        assert answer.headers["allow"] == "POST"
        assert "POST" in complaint(endpoint, answer)


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [("/v1/models", "POST", "GET"), ("/api/pull", "GET", "POST"), ("/api/delete", "POST", "DELETE")],
)
async def test_other_addresses_know_their_methods_too(wire: Wire, path: str, method: str, allowed: str) -> None:
    wire.get(path, method=method)
    answer = await wire.answer()

    assert answer.status == 405
    assert allowed in answer.headers["allow"].split(", ")


async def test_an_address_where_nothing_is_tells_where_to_look(wire: Wire) -> None:
    for path, dialect in (("/v1/chat", Dialect.OPENAI), ("/api/chats", Dialect.OLLAMA), ("/x", Dialect.OPENAI)):
        wire.get(path)
        answer = await wire.answer()

        assert answer.status == 404
        sentence = answer.json["error"]["message"] if dialect is Dialect.OPENAI else answer.json["error"]
        assert "/openapi.json" in sentence


@ALL_ENDPOINTS
async def test_a_body_over_the_limit_is_a_413(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, endpoint: Endpoint
) -> None:
    gateway = await gateways(await fake_nodes(), server=Server(max_body_bytes=1000))
    for framing in ("Content-Length: 1001", "Transfer-Encoding: chunked"):
        wire = await dial(gateway.port)
        wire.send(f"POST {endpoint.path} HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n3e9\r\n".encode(), b" " * 1001)
        answer = await wire.answer()

        assert answer.status == 413
        assert "server.max_body_bytes" in complaint(endpoint, answer)


@ALL_ENDPOINTS
async def test_a_compressed_body_is_a_415(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, endpoint: Endpoint
) -> None:
    gateway = await gateways(await fake_nodes())
    wire = await dial(gateway.port)
    wire.post(endpoint.path, gzip.compress(b"{}"), "Content-Encoding: gzip")
    answer = await wire.answer()

    assert answer.status == 415
    assert "Content-Encoding" in complaint(endpoint, answer)


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", "nonsense", ""]
)
@ALL_ENDPOINTS
async def test_the_content_type_does_not_matter(wire: Wire, endpoint: Endpoint, content_type: str) -> None:
    """`curl -d` says that it sends a form; Ollama does not mind."""
    wire.post(endpoint.path, {"model": "llama3"} | BODIES[endpoint], f"Content-Type: {content_type}")
    answer = await wire.answer()

    assert answer.status == 200
    assert answer.headers["content-type"].startswith("application/json")


async def test_a_model_may_have_any_printable_name(wire: Wire) -> None:
    for name in ("hf.co/some one/model:Q4_K_M", "m\N{LATIN SMALL LETTER O WITH DIAERESIS}del", '"quoted"', "a" * 256):
        wire.post("/api/chat", {"model": name} | BODIES[Endpoint.OLLAMA_CHAT])
        assert (await wire.answer()).status == 404


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        *("messages", "prompt", "input", "stream", "options", "tools", "format", "images", "stream_options", "n"),
        *("response_format", "keep_alive", "think", "max_tokens", "stop", "logprobs", "encoding_format", "raw"),
        *("system", "template", "context", "suffix", "tool_choice", "temperature", "seed", "dimensions", "truncate"),
    ]
)


@st.composite
def almost_right(draw: st.DrawFn) -> tuple[Endpoint, bytes]:
    """A request with some of its fields replaced."""
    endpoint = draw(st.sampled_from(list(Endpoint)))
    model = draw(st.sampled_from(["llama3", "qwen3", "phi4"]))
    body = {"model": model} | BODIES[endpoint] | draw(st.dictionaries(FIELDS, JSON_VALUES, max_size=3))
    return endpoint, msgspec.json.encode(body)


ANY_REQUEST = st.one_of(almost_right(), st.tuples(st.sampled_from(list(Endpoint)), st.binary(max_size=200)))


@pytest.mark.deadline(120)
@given(requests=st.lists(ANY_REQUEST, min_size=1, max_size=4))
@settings(
    deadline=None, max_examples=250, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_no_body_at_all_makes_the_gateway_fail_or_hang(
    wire: Wire, requests: list[tuple[Endpoint, bytes]]
) -> None:
    """Every answer is a success or blames the request; and the connection goes on."""
    for endpoint, body in requests:
        wire.post(endpoint.path, body)
        async with asyncio.timeout(5):
            answer = await wire.answer()

        assert answer.status < 500, (endpoint, body, answer)
        if answer.status >= 400 and not answer.headers["x-sutazai-node"]:  # a node's words are its own
            assert complaint(endpoint, answer)
