"""Where requests go: away from failing nodes, never past a node's slots, in order of arrival."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from sutazai.core.node import Health, NodeKind
from sutazai.gateway.fleet import Fleet
from sutazai.settings.model import HealthSettings, NodeSettings, Queue, Retry, Routing
from sutazai.testing import Answer, FakeNode, Fault

if TYPE_CHECKING:
    from tests.conftest import Answered, Dial, StartGateway, StartNode

    from sutazai.bootstrap import Gateway

CHAT = "/v1/chat/completions"
ASKED = {"model": "llama3", "messages": [{"role": "user", "content": "hello"}]}
OPENAI = NodeKind.OPENAI
AT_ONCE = Retry(backoff_s=0.001, backoff_max_s=0.001)


def listed(node: FakeNode, *, slots: int | None = None, name: str = "") -> NodeSettings:
    return NodeSettings(url=node.url, kind=node.kind.value, slots=slots, name=name)


async def answers(dial: Dial, port: int, count: int, *, clients: int, body: object = ASKED) -> list[Answered]:
    """What so many clients get, who ask one request after another until there were `count`."""
    left = iter(range(count))

    async def ask() -> list[Answered]:
        wire = await dial(port)
        got: list[Answered] = []
        for _ in left:
            wire.post(CHAT, body)
            got.append(await wire.answer())
        return got

    return [answer for each in await asyncio.gather(*(ask() for _ in range(clients))) for answer in each]


def statuses(got: Sequence[Answered]) -> dict[int, int]:
    return dict(Counter(answer.status for answer in got))


async def arrived(gateway: Gateway, dial: Dial, count: int) -> None:
    """Wait until so many requests are in the gateway."""
    wire = await dial(gateway.port)
    while await wire.gauge("sutazai_in_flight") < count:
        await asyncio.sleep(0)


async def probed(fleet: Fleet, name: str, health: Health) -> None:
    """Wait for the fleet to believe that."""
    while (state := fleet.state(name)) is None or state.health is not health:
        await asyncio.sleep(0.01)


async def test_a_node_that_fails_fast_draws_little(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    """It is never busy, and yet gets less than a tenth of the attempts; its failures reach no client."""
    good = [await fake_nodes(OPENAI) for _ in range(2)]
    bad = await fake_nodes(OPENAI)
    bad.default = Fault.status(503)
    for node in good:
        node.default = Answer(first_token_s=0.005)
    gateway = await gateways(*(listed(node, slots=4) for node in [*good, bad]), retry=AT_ONCE)
    got = await answers(dial, gateway.port, 600, clients=8)

    attempts = sum(len(node.inferences) for node in [*good, bad])
    assert statuses(got) == {200: 600}
    assert len(bad.inferences) < 0.1 * attempts


async def test_a_flood_does_not_spill_over_to_a_node_that_fails(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """When the good nodes are full, waiting for them is better than failing at once."""
    good = [await fake_nodes(OPENAI) for _ in range(2)]
    bad = await fake_nodes(OPENAI)
    bad.default = Fault.status(503)
    for node in good:
        node.default = Answer(first_token_s=0.02)
    gateway = await gateways(*(listed(node, slots=4) for node in [*good, bad]), retry=AT_ONCE)
    got = await answers(dial, gateway.port, 600, clients=200)

    assert statuses(got) == {200: 600}
    assert len(bad.inferences) < 60


@pytest.mark.parametrize(
    "fault",
    [
        Fault.status(429),
        Fault.status(502),
        Fault.status(503),
        Fault.reset_before_head(),
        Fault.close_before_head(),
        Fault.garbage(),
        Fault.truncate(1),
    ],
    ids=lambda fault: str(fault.name),
)
async def test_a_request_that_a_node_fails_is_answered_by_another(
    fault: Fault, gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """Not streamed, so that even half an answer can be taken back."""
    bad, good = await fake_nodes(OPENAI), await fake_nodes(OPENAI)
    bad.default = fault
    gateway = await gateways(listed(bad, name="bad"), listed(good, name="good"), retry=AT_ONCE)
    got = await answers(dial, gateway.port, 20, clients=1)

    assert statuses(got) == {200: 20}
    assert {answer.headers["x-sutazai-node"] for answer in got} == {"good"}
    assert bad.inferences
    assert any(answer.headers["x-sutazai-reason"].endswith("attempt 2") for answer in got)


async def test_a_node_that_refuses_connections_costs_no_client_its_answer(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    dead, good = await fake_nodes(OPENAI), await fake_nodes(OPENAI)
    gateway = await gateways(dead, good, retry=AT_ONCE, health=HealthSettings(interval_s=60.0))
    await dead.stop()
    got = await answers(dial, gateway.port, 40, clients=4)

    assert statuses(got) == {200: 40}
    assert len(good.inferences) == 40


@pytest.mark.parametrize("status", [400, 404, 422, 500, 501])
async def test_what_another_node_would_answer_alike_is_not_tried_again(
    status: int, gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    nodes = [await fake_nodes(OPENAI) for _ in range(2)]
    for node in nodes:
        node.default = Fault.status(status)
    gateway = await gateways(*nodes)
    await answers(dial, gateway.port, 1, clients=1)

    assert sum(len(node.inferences) for node in nodes) == 1


@pytest.mark.parametrize("fault", [Fault.reset_mid_stream(1), Fault.truncate(1)], ids=lambda fault: str(fault.name))
async def test_a_stream_that_has_begun_is_never_begun_again(
    fault: Fault, gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    nodes = [await fake_nodes(OPENAI) for _ in range(2)]
    for node in nodes:
        node.default = fault
    gateway = await gateways(*nodes, retry=AT_ONCE)
    (got,) = await answers(dial, gateway.port, 1, clients=1, body=ASKED | {"stream": True})

    assert sum(len(node.inferences) for node in nodes) == 1
    assert got.body.count(b'"error"') == 1
    assert b"[DONE]" not in got.body


async def test_when_every_node_fails_the_pool_gets_little_more_than_it_was_asked(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """1.2 attempts for each request, and what is always allowed."""
    nodes = [await fake_nodes(OPENAI) for _ in range(3)]
    for node in nodes:
        node.default = Fault.status(503, retry_after_s=7)
    gateway = await gateways(*nodes, retry=Retry(attempts=3, backoff_s=0.001, backoff_max_s=0.001))
    loop = asyncio.get_running_loop()
    began = loop.time()
    got = await answers(dial, gateway.port, 1000, clients=10)

    attempts = sum(len(node.inferences) for node in nodes)
    assert statuses(got) == {503: 1000}
    assert got[0].headers["retry-after"] == "7"
    assert 1000 < attempts <= 1.2 * 1000 + 3.0 * (10 + loop.time() - began)


async def test_three_failed_probes_take_a_node_out_and_one_success_brings_it_back_slowly(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    nodes = {"back": await fake_nodes(OPENAI), "steady": await fake_nodes(OPENAI)}
    gateway = await gateways(
        *(listed(node, name=name, slots=8) for name, node in nodes.items()),
        health=HealthSettings(interval_s=0.05, timeout_s=1.0, failures=3),
    )
    back = gateway.fleet.state("back")
    assert back is not None
    nodes["back"].probe_fault = Fault.status(500)
    await probed(gateway.fleet, "back", Health.DOWN)
    failures = back.failures
    seen = len(nodes["back"].inferences)
    got = await answers(dial, gateway.port, 10, clients=2)
    nodes["back"].probe_fault = None
    await probed(gateway.fleet, "back", Health.UP)
    for node in nodes.values():
        node.default = Answer(first_token_s=0.02)
    afterwards = await answers(dial, gateway.port, 100, clients=8)

    assert failures >= 3
    assert len(nodes["back"].inferences) - seen < 40, "a node that came back draws less than its half at first"
    assert {answer.headers["x-sutazai-node"] for answer in got} == {"steady"}
    assert statuses(afterwards) == {200: 100}


@pytest.mark.parametrize("head_start", [0, 1, 2])
async def test_no_node_ever_holds_more_than_its_slots_and_the_head_start(
    head_start: int, gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    nodes = [await fake_nodes(OPENAI), await fake_nodes(NodeKind.LLAMACPP, slots=2), await fake_nodes(slots=1)]
    for node in nodes:
        node.default = Answer(first_token_s=0.01)
        if node.kind is NodeKind.OLLAMA:
            node.load("llama3")
    gateway = await gateways(listed(nodes[0], slots=3), *map(listed, nodes[1:]), routing=Routing(head_start=head_start))
    got = await answers(dial, gateway.port, 400, clients=200)

    assert statuses(got) == {200: 400}
    for node, slots in zip(nodes, (3, 2, 1), strict=True):
        assert node.peak_in_flight <= slots + head_start
        assert len(node.inferences) > 20


async def test_requests_are_served_in_the_order_in_which_they_came(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(OPENAI)
    node.script.extend([Answer(first_token_s=0.8)] * 2)
    gateway = await gateways(listed(node, slots=1))
    wires = [await dial(gateway.port) for _ in range(30)]
    for number, wire in enumerate(wires):
        wire.post(CHAT, ASKED | {"seed": number})
        await arrived(gateway, dial, number + 1)
    await asyncio.gather(*(wire.answer() for wire in wires))

    assert [received.json["seed"] for received in node.inferences] == list(range(30))


async def test_a_request_that_found_no_slot_in_time_is_told_to_come_back(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(OPENAI)
    node.default = Fault.stall_before_head()
    gateway = await gateways(
        listed(node, slots=1), routing=Routing(head_start=0), queue=Queue(max_wait_s=0.3, max_waiting=2)
    )
    wires = [await dial(gateway.port) for _ in range(4)]
    for wire in wires:
        wire.post(CHAT, ASKED)
        if wire is not wires[3]:
            await arrived(gateway, dial, wires.index(wire) + 1)
    turned_away = await wires[3].answer()
    too_late = await asyncio.gather(wires[1].answer(), wires[2].answer())

    assert turned_away.status == 503
    assert "2 requests are waiting already" in turned_away.json["error"]["message"]
    assert [answer.status for answer in too_late] == [503, 503]
    assert "No slot became free within 0.3 s" in too_late[0].json["error"]["message"]
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in [turned_away, *too_late])
    assert len(node.inferences) == 1


async def test_a_model_goes_to_the_node_that_has_it_in_memory(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    nodes = [await fake_nodes(models=("llama3", "qwen3"), slots=4) for _ in range(3)]
    nodes[1].load("qwen3")
    gateway = await gateways(*(listed(node, slots=4) for node in nodes))
    got = await answers(dial, gateway.port, 12, clients=3, body=ASKED | {"model": "qwen3"})

    assert len(nodes[1].inferences) == 12
    assert nodes[1].loads == 1
    assert got[0].headers["x-sutazai-reason"].startswith("warm")
