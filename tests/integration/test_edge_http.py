"""The gateway as an HTTP/1.1 server on a real socket: framing, keep-alive, and the older version."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import pytest

from sutazai.settings.model import Server
from sutazai.testing import Answer

if TYPE_CHECKING:
    from tests.conftest import Dial, StartGateway, StartNode, Wire

GENERATE = {"model": "llama3", "prompt": "hi"}
WHOLE = GENERATE | {"stream": False}


@pytest.fixture
async def wire(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> Wire:
    """A connection to a gateway with one node."""
    gateway = await gateways(await fake_nodes())
    return await dial(gateway.port)


def written(body: object, *, version: str = "1.1", headers: str = "") -> bytes:
    encoded = msgspec.json.encode(body)
    head = f"POST /api/generate HTTP/{version}\r\nHost: localhost\r\n{headers}Content-Length: {len(encoded)}\r\n\r\n"
    return head.encode() + encoded


def words_of(ndjson: bytes) -> str:
    return "".join(msgspec.json.decode(line)["response"] for line in ndjson.splitlines())


async def test_a_request_may_come_byte_by_byte(wire: Wire) -> None:
    for byte in written(WHOLE):
        wire.send(bytes([byte]))
        await asyncio.sleep(0)
    answer = await wire.answer()

    assert answer.status == 200
    assert answer.json["response"] == "Hello"


async def test_a_connection_serves_one_request_after_another(wire: Wire) -> None:
    for number in range(50):
        wire.post("/api/generate", WHOLE | {"prompt": "x" * (number + 1)})
        assert (await wire.answer()).json["response"] == "Hello"

    assert await wire.gauge("sutazai_connections") == 1


async def test_five_requests_sent_at_once_are_answered_in_order(wire: Wire) -> None:
    wire.get("/healthz")
    wire.post("/api/generate", WHOLE)
    wire.get("/nowhere")
    wire.post(
        "/v1/chat/completions", {"model": "llama3", "messages": [{"role": "user", "content": "x"}], "stream": True}
    )
    wire.get("/api/version")
    answers = [await wire.answer() for _ in range(5)]

    assert [answer.status for answer in answers] == [200, 200, 404, 200, 200]
    assert answers[0].json == {"status": "ok"}
    assert answers[3].body.endswith(b"data: [DONE]\n\n")
    assert answers[4].json == {"version": "0.11.0"}


async def test_a_large_body_in_one_chunk_for_each_byte_is_understood(wire: Wire) -> None:
    body = msgspec.json.encode(WHOLE | {"prompt": "x" * 5000})
    wire.send(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    wire.send(*(b"1\r\n%c\r\n" % byte for byte in body), b"0\r\n\r\n")

    assert (await wire.answer()).json["response"] == "Hello"


async def test_a_client_that_asks_first_is_told_to_go_on(wire: Wire) -> None:
    head, separator, body = written(WHOLE, headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    wire.send(head, separator)
    first = await wire.answer()
    wire.send(body)
    second = await wire.answer()

    assert first.status == 100
    assert second.json["response"] == "Hello"


async def test_a_body_that_is_too_large_is_refused_before_it_is_sent(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    gateway = await gateways(await fake_nodes(), server=Server(max_body_bytes=1000))
    wire = await dial(gateway.port)
    wire.send(written(WHOLE | {"prompt": "x" * 1000}, headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")[0])
    wire.send(b"\r\n\r\n")

    answer = await wire.answer()
    assert answer.status == 413
    assert answer.headers["connection"] == "close"
    assert "1000 bytes" in answer.json["error"]


async def test_head_tells_the_length_of_what_get_would_send(wire: Wire) -> None:
    wire.get("/v1/models", method="HEAD")
    head = await wire.answer(has_body=False)
    wire.get("/v1/models")
    answer = await wire.answer()

    assert head.status == answer.status == 200
    assert head.headers["content-length"] == answer.headers["content-length"] == str(len(answer.body))


async def test_a_connection_is_closed_when_the_client_says_so(wire: Wire) -> None:
    wire.post("/api/generate", WHOLE, "Connection: close")
    answer = await wire.answer()

    assert answer.headers["connection"] == "close"
    assert answer.json["response"] == "Hello"
    assert await wire.rest() == b""


@pytest.mark.parametrize("body", [WHOLE, GENERATE], ids=["whole", "stream"])
async def test_http_1_0_gets_its_answer_and_the_end_of_the_connection(wire: Wire, body: dict[str, object]) -> None:
    wire.send(written(body, version="1.0"))
    answer = await wire.answer()

    assert "transfer-encoding" not in answer.headers
    assert words_of(answer.body) == "Hello"
    assert await wire.rest() == b""


async def test_http_1_0_may_ask_to_keep_the_connection(wire: Wire) -> None:
    for _ in range(2):
        wire.send(written(WHOLE, version="1.0", headers="Connection: keep-alive\r\n"))
        answer = await wire.answer()

        assert answer.headers["connection"] == "keep-alive"
        assert words_of(answer.body) == "Hello"


async def test_more_connections_than_allowed_are_closed_at_once(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    gateway = await gateways(await fake_nodes(), server=Server(max_connections=2))
    first, second = await dial(gateway.port), await dial(gateway.port)
    for wire in (first, second):
        wire.get("/healthz")
        assert (await wire.answer()).status == 200
    third = await dial(gateway.port)

    assert await third.rest() == b""
    first.get("/healthz")
    assert (await first.answer()).status == 200


async def test_a_long_line_of_requests_is_read_only_as_it_is_answered(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """A client that sends without reading cannot fill the memory."""
    node = await fake_nodes()
    node.default = Answer(first_token_s=0.3)
    gateway = await gateways(node)
    wire, watcher = await dial(gateway.port), await dial(gateway.port)
    request = written(WHOLE | {"prompt": "x" * 60_000})
    wire.send(request * 400)
    await node.wait_for(1)

    assert await watcher.gauge("sutazai_buffered_bytes") < 8 * 2**20
    assert (await wire.answer()).json["response"] == "Hello"
