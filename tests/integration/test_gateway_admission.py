"""Waiting over real sockets: fair turns, told places, deadlines, and early refusals."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from sutazai.adapters.postgres.stores import open_stores
from sutazai.core.identity import Role
from sutazai.core.node import NodeKind
from sutazai.settings.model import Auth, Database, NodeSettings, Queue, Routing, Timeouts
from sutazai.testing import Answer, FakeNode, Fault

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Dial, StartGateway, StartNode, Wire

    from sutazai.adapters.postgres.stores import Stores
    from sutazai.bootstrap import Gateway

CHAT = "/v1/chat/completions"
ASKED = {"model": "llama3", "messages": [{"role": "user", "content": "hello"}]}
OPENAI = NodeKind.OPENAI
KEYS_NEEDED = Auth(required=True)
NO_HEAD_START = Routing(head_start=0)


@pytest.fixture
async def stores(data_dir: Path) -> AsyncIterator[Stores]:
    """The same database as the gateway's."""
    async with open_stores(Database(), data_dir) as opened:
        yield opened


async def key_of(stores: Stores, tenant: str, role: Role = Role.USER) -> str:
    """A header with a new key of the tenant."""
    _, key = await stores.keys.create(name=f"test {time.monotonic_ns()}", tenant=tenant, role=role)
    return f"x-api-key: {key}"


def one_slot(node: FakeNode) -> NodeSettings:
    return NodeSettings(url=node.url, kind=node.kind.value, slots=1)


async def arrived(gateway: Gateway, node: FakeNode, waiting: int, wire: Wire, *headers: str) -> None:
    """Wait until one request is at the node and so many wait."""
    while True:
        wire.get("/metrics", *headers)
        page = (await wire.answer()).body.decode()
        if f"\nsutazai_waiting {waiting}" in page and len(node.inferences):
            return
        await asyncio.sleep(0.005)


async def test_a_modest_tenant_is_served_among_the_requests_of_a_greedy_one(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, stores: Stores
) -> None:
    """Forty wait before it came; it goes after one or two of them, and so do its next ones."""
    greedy, modest = await key_of(stores, "greedy"), await key_of(stores, "modest")
    admin = await key_of(stores, "operators", Role.ADMIN)
    node = await fake_nodes(OPENAI)
    node.default = Answer(first_token_s=0.02)
    node.script.append(Answer(first_token_s=1.0))
    gateway = await gateways(one_slot(node), auth=KEYS_NEEDED, routing=NO_HEAD_START)
    crowd = [await dial(gateway.port) for _ in range(41)]
    for wire in crowd:
        wire.post(CHAT, ASKED | {"user": "greedy"}, greedy)
    await arrived(gateway, node, 40, await dial(gateway.port), admin)
    wire = await dial(gateway.port)
    for _ in range(5):
        wire.post(CHAT, ASKED | {"user": "modest"}, modest)
        answer = await wire.answer()
        assert answer.status == 200
    order = [received.json["user"] for received in node.inferences]
    places = [number for number, user in enumerate(order) if user == "modest"]
    answers = await asyncio.gather(*(each.answer() for each in crowd))

    assert places[0] <= 2
    assert places[-1] <= 12
    assert all(each.status == 200 for each in answers)


async def test_a_greedy_tenant_loses_its_newest_when_the_line_is_full(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, stores: Stores
) -> None:
    greedy, modest = await key_of(stores, "greedy"), await key_of(stores, "modest")
    admin = await key_of(stores, "operators", Role.ADMIN)
    node = await fake_nodes(OPENAI)
    node.script.append(Answer(first_token_s=0.5))
    gateway = await gateways(
        one_slot(node), auth=KEYS_NEEDED, routing=NO_HEAD_START, queue=Queue(max_waiting=3, max_wait_s=20.0)
    )
    crowd = [await dial(gateway.port) for _ in range(4)]
    for waiting, wire in enumerate(crowd):
        wire.post(CHAT, ASKED, greedy)
        await arrived(gateway, node, waiting, await dial(gateway.port), admin)
    wire = await dial(gateway.port)
    wire.post(CHAT, ASKED, modest)
    shed = await crowd[3].answer()
    served = await wire.answer()

    assert shed.status == 429
    assert "most of them are yours" in shed.json["error"]["message"]
    assert 1 <= int(shed.headers["retry-after"]) <= 30
    assert shed.headers["x-sutazai-queue-position"] == "3"
    assert served.status == 200
    assert [(await each.answer()).status for each in crowd[:3]] == [200, 200, 200]


async def test_who_waited_is_told_where_it_stood(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    node = await fake_nodes(OPENAI)
    node.default = Answer(first_token_s=0.1)
    gateway = await gateways(one_slot(node), routing=NO_HEAD_START)
    wires = [await dial(gateway.port) for _ in range(3)]
    for waiting, wire in enumerate(wires):
        wire.post(CHAT, ASKED)
        await arrived(gateway, node, waiting, await dial(gateway.port))
    answers = [await wire.answer() for wire in wires]

    assert [each.headers.get("x-sutazai-queue-position") for each in answers] == [None, "1", "2"]


async def test_a_stream_that_waits_hears_of_its_place(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(OPENAI)
    node.script.append(Answer(first_token_s=1.5))
    gateway = await gateways(one_slot(node), routing=NO_HEAD_START, timeouts=Timeouts(keep_alive_s=0.3))
    first, second = await dial(gateway.port), await dial(gateway.port)
    first.post(CHAT, ASKED)
    await arrived(gateway, node, 0, await dial(gateway.port))
    second.post(CHAT, ASKED | {"stream": True})
    answer = await second.answer()

    assert answer.headers["x-sutazai-queue-position"] == "1"
    assert b": waiting, position 1" in answer.body
    assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_urgent_requests_overtake_those_that_are_not(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(OPENAI)
    node.script.append(Answer(first_token_s=0.5))
    gateway = await gateways(one_slot(node), routing=NO_HEAD_START)
    wires = [await dial(gateway.port) for _ in range(4)]
    for number, (wire, priority) in enumerate(zip(wires, ("normal", "low", "low", "normal"), strict=True)):
        wire.post(CHAT, ASKED | {"seed": number}, f"x-sutazai-priority: {priority}")
        await arrived(gateway, node, number, await dial(gateway.port))
    await asyncio.gather(*(wire.answer() for wire in wires))

    assert [received.json["seed"] for received in node.inferences] == [0, 3, 1, 2]


async def test_a_deadline_that_passes_in_line_is_answered_and_never_run(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(OPENAI)
    node.default = Fault.stall_before_head()
    gateway = await gateways(one_slot(node), routing=NO_HEAD_START)
    first, second = await dial(gateway.port), await dial(gateway.port)
    first.post(CHAT, ASKED)
    await arrived(gateway, node, 0, await dial(gateway.port))
    second.post(CHAT, ASKED, "x-sutazai-deadline-s: 0.3")
    answer = await second.answer()

    assert answer.status == 503
    assert "No slot became free before the deadline" in answer.json["error"]["message"]
    assert int(answer.headers["retry-after"]) >= 1
    assert len(node.inferences) == 1


async def test_a_deadline_ends_what_was_sent(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    node = await fake_nodes(OPENAI)
    node.default = Fault.stall_before_head()
    gateway = await gateways(one_slot(node))
    wire = await dial(gateway.port)
    wire.post(CHAT, ASKED, "x-sutazai-deadline-s: 0.3")
    answer = await wire.answer()

    assert answer.status == 504
    assert "at the deadline of the request, 0.3 s after it came" in answer.json["error"]["message"]


async def test_a_client_that_leaves_leaves_the_line(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    node = await fake_nodes(OPENAI)
    node.script.append(Answer(first_token_s=0.5))
    gateway = await gateways(one_slot(node), routing=NO_HEAD_START)
    wires = [await dial(gateway.port) for _ in range(3)]
    for number, wire in enumerate(wires):
        wire.post(CHAT, ASKED | {"seed": number})
        await arrived(gateway, node, number, await dial(gateway.port))
    wires[1].writer.close()
    await arrived(gateway, node, 1, await dial(gateway.port))
    await wires[2].answer()

    assert [received.json["seed"] for received in node.inferences] == [0, 2]


async def test_two_models_on_a_node_that_holds_one_are_served_in_blocks(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """Forty requests in turn would be forty loads."""
    node = await fake_nodes(models=("llama3", "qwen3"), slots=1)
    node.load("llama3")
    node.default = Answer(first_token_s=0.02)
    gateway = await gateways(one_slot(node), routing=NO_HEAD_START, queue=Queue(swap_patience_s=5.0))
    before = node.loads
    wires = [await dial(gateway.port) for _ in range(40)]
    for number, wire in enumerate(wires):
        wire.post(CHAT, ASKED | {"model": ("llama3", "qwen3")[number % 2]})
    answers = await asyncio.gather(*(wire.answer() for wire in wires))

    assert all(each.status == 200 for each in answers)
    assert node.loads - before <= 4
