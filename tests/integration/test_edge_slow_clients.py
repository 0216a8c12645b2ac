"""Clients that dawdle: hundreds at once cost others nothing, and nothing of them is left."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from typing import TYPE_CHECKING

import pytest
from tests.conftest import Wire

from sutazai.core.node import NodeKind
from sutazai.settings.model import NodeSettings, Server
from sutazai.testing import Answer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.conftest import Dial, StartGateway, StartNode

    from sutazai.testing import FakeNode

CROWD = 800
PATIENCE_S = 5.0
"""In which everybody else is answered, on a machine that is shared by the crowd. Whoever had to wait for the crowd
itself would wait for twice as long."""
HEAD = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000\r\n"
LONG = {"model": "llama3", "prompt": "long", "stream": True}
SHORT = {"model": "llama3", "prompt": "short", "stream": False}


@pytest.fixture
def many_files() -> Iterator[None]:
    """Both ends of each connection are files of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
async def slow_dial() -> AsyncIterator[Dial]:
    """A function that connects with so small a buffer that the kernel takes little for a client that does not read."""
    opened: list[Wire] = []

    async def connected(port: int, *, limit_bytes: int = 1024) -> Wire:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
        wire = Wire(*await asyncio.open_connection(sock=raw, limit=limit_bytes))
        opened.append(wire)
        return wire

    yield connected
    for wire in opened:
        wire.writer.close()


async def served_meanwhile(dial: Dial, port: int, crowd: asyncio.Task[None]) -> list[float]:
    """Seconds that each ordinary request took, one after the other, while the crowd was there."""
    wire = await dial(port)
    took: list[float] = []
    while not crowd.done():
        began_at = time.monotonic()
        wire.post("/api/generate", SHORT)
        assert (await wire.answer()).json["response"] == "Hello"
        took.append(time.monotonic() - began_at)
        await asyncio.sleep(0.01)
    await crowd
    wire.writer.close()
    return took


async def nothing_left(wire: Wire) -> None:
    """Wait until the gateway holds nothing for anybody but this connection."""
    async with asyncio.timeout(5):
        for name, left in (("connections", 1), ("buffered_bytes", 0), ("in_flight", 0)):
            while await wire.gauge(f"sutazai_{name}") > left:
                await asyncio.sleep(0.05)


async def trickled(wires: list[Wire], first: bytes, more: bytes, *, every_s: float) -> list[int]:
    """Send the beginning, then bytes now and then until each is answered; returns the statuses."""

    async def one(wire: Wire) -> int:
        wire.send(first)
        answer = asyncio.create_task(wire.answer())
        while not (await asyncio.wait([answer], timeout=every_s))[0]:
            wire.send(more)
        return (await answer).status

    return await asyncio.gather(*map(one, wires))


@pytest.mark.alone
@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize(
    ("first", "more"), [(HEAD + b"X: ", b"y"), (HEAD + b"\r\n" + b" " * 10_000, b" ")], ids=["heads", "bodies"]
)
async def test_slow_senders_are_cut_off_and_nobody_else_notices(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, first: bytes, more: bytes
) -> None:
    gateway = await gateways(await fake_nodes(), server=Server(head_timeout_s=1.5, body_timeout_s=1.5))
    wires = await asyncio.gather(*(dial(gateway.port) for _ in range(CROWD)))
    statuses: list[int] = []

    async def crowd() -> None:
        statuses.extend(await trickled(wires, first, more, every_s=0.2))

    took = await served_meanwhile(dial, gateway.port, asyncio.create_task(crowd()))

    assert statuses == [408] * CROWD
    assert len(took) > 10
    assert max(took) < PATIENCE_S
    for wire in wires:
        wire.writer.close()
    await nothing_left(await dial(gateway.port))


@pytest.mark.alone
@pytest.mark.deadline(120)
@pytest.mark.usefixtures("many_files")
async def test_clients_that_never_read_hold_up_their_own_streams_alone(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, slow_dial: Dial
) -> None:
    node = await fake_nodes(slots=2 * CROWD)
    long = Answer(tokens=("x" * 65536,) * 20, between_s=0.25)
    node.default = lambda received: long if received.json["prompt"] == "long" else Answer()
    gateway = await gateways(NodeSettings(url=node.url, slots=2 * CROWD), server=Server(write_timeout_s=2 * PATIENCE_S))
    wires = await asyncio.gather(*(slow_dial(gateway.port) for _ in range(CROWD)))

    async def crowd() -> None:
        for wire in wires:
            wire.post("/api/generate", LONG)
            await asyncio.sleep(0)
        watcher = await dial(gateway.port)
        while await watcher.gauge("sutazai_in_flight") < CROWD:
            await asyncio.sleep(0.05)
        while await watcher.gauge("sutazai_in_flight") > 1:
            await asyncio.sleep(0.05)
        watcher.writer.close()

    took = await served_meanwhile(dial, gateway.port, asyncio.create_task(crowd()))

    assert max(took) < PATIENCE_S
    assert not [wire for wire in wires if (await wire.rest()).endswith(b"0\r\n\r\n")]
    await nothing_left(await dial(gateway.port))


@pytest.mark.parametrize("kind", list(NodeKind))
async def test_a_stream_stands_still_while_nobody_reads_it_and_is_complete_in_the_end(
    gateways: StartGateway, fake_nodes: StartNode, slow_dial: Dial, kind: NodeKind
) -> None:
    node = await fake_nodes(kind)
    node.default = Answer(tokens=("0123456789abcdef" * 1024,) * 2000)
    gateway = await gateways(node)
    wire = await slow_dial(gateway.port)
    wire.post(
        "/v1/chat/completions", {"model": "llama3", "messages": [{"role": "user", "content": "x"}], "stream": True}
    )
    await node.wait_for(1)
    sent = await standing_still(node)
    answer = await wire.answer()

    assert sent < 2000
    assert answer.body.count(b"0123456789abcdef") == 2000 * 1024
    assert answer.body.endswith(b"data: [DONE]\n\n")


async def standing_still(node: FakeNode) -> int:
    """The tokens that were sent once no more are."""
    sent = -1
    async with asyncio.timeout(10):
        while node.inferences[0].tokens_sent != sent or sent == 0:
            sent = node.inferences[0].tokens_sent
            await asyncio.sleep(0.3)
    return sent


@pytest.mark.parametrize("size", range(400_000, 1_200_000, 50_000))
async def test_a_node_connection_is_usable_after_a_client_that_read_slowly(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, slow_dial: Dial, size: int
) -> None:
    """The end of an answer may be read from the node while its client has not caught up."""
    node = await fake_nodes()
    node.default = lambda received: Answer(tokens=("x" * size if received.json["prompt"] == "long" else "Hello",))
    gateway = await gateways(node)
    slow = await slow_dial(gateway.port)
    slow.post("/api/generate", LONG)
    await node.wait_for(1)
    await node.until(lambda: node.inferences[0].finished)
    long = await slow.answer()
    other = await dial(gateway.port)
    other.post("/api/generate", SHORT)
    async with asyncio.timeout(2):
        answer = await other.answer()

    assert answer.json["response"] == "Hello"
    assert long.body.count(b"x") >= size


async def test_a_client_that_never_reads_is_cut_off(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, slow_dial: Dial
) -> None:
    node = await fake_nodes()
    node.default = Answer(tokens=("x" * 16384,) * 10_000)
    gateway = await gateways(node, server=Server(write_timeout_s=0.5))
    wire = await slow_dial(gateway.port)
    wire.post("/api/generate", LONG)
    await node.wait_for(1)
    began_at = time.monotonic()
    await node.wait_idle(within_s=5)

    assert time.monotonic() - began_at >= 0.5
    wire.writer.close()
    await nothing_left(await dial(gateway.port))


async def test_an_idle_connection_is_closed(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    gateway = await gateways(await fake_nodes(), server=Server(keep_alive_s=0.3))
    fresh, used = await dial(gateway.port), await dial(gateway.port)
    used.get("/healthz")
    await used.answer()

    async with asyncio.timeout(2):
        assert [await fresh.rest(), await used.rest()] == [b"", b""]


async def test_bodies_in_memory_are_bounded_in_all(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    gateway = await gateways(await fake_nodes(), server=Server(max_buffered_bytes=100_000, body_timeout_s=1))
    holding = [await dial(gateway.port) for _ in range(2)]
    for wire in holding:
        wire.send(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000\r\n\r\n", b" " * 45_000)
    watcher, late = await dial(gateway.port), await dial(gateway.port)
    while await watcher.gauge("sutazai_buffered_bytes") < 90_000:
        await asyncio.sleep(0.01)
    late.post("/api/generate", SHORT | {"prompt": "x" * 20_000})
    refused = await late.answer()

    assert refused.status == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert "come back later" in refused.json["error"]
    for wire in holding:
        assert (await wire.answer()).status == 408
        wire.writer.close()
    late.writer.close()
    await nothing_left(watcher)
