"""Over real connections: what is left alone, what is asked all the same, and how often models are loaded."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sutazai.core.node import NodeKind
from sutazai.gateway.fleet import Fleet
from sutazai.settings.model import Breaker, HealthSettings, NodeSettings, Retry, Routing
from sutazai.testing import Answer, FakeNode, Fault
from sutazai.testing.received import Received
from sutazai.testing.script import Outcome

if TYPE_CHECKING:
    from tests.conftest import Answered, Dial, StartGateway, StartNode

CHAT = "/v1/chat/completions"
OPENAI = NodeKind.OPENAI
NO_RETRY = Retry(attempts=1)
SELDOM = HealthSettings(interval_s=60.0)
QUICK = Breaker(window_s=5.0, minimum_requests=5, open_s=0.3, slow_s=0.1)


def listed(node: FakeNode, name: str, *, slots: int = 4) -> NodeSettings:
    return NodeSettings(url=node.url, kind=node.kind.value, slots=slots, name=name)


def asked(model: str = "llama3", **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}]} | more


async def answers(dial: Dial, port: int, bodies: Sequence[object], *headers: str, clients: int = 1) -> list[Answered]:
    """What so many clients get, who ask one of these after another."""
    left = iter(bodies)

    async def ask() -> list[Answered]:
        wire = await dial(port)
        got: list[Answered] = []
        for body in left:
            wire.post(CHAT, body, *headers)
            got.append(await wire.answer())
        return got

    return [answer for each in await asyncio.gather(*(ask() for _ in range(clients))) for answer in each]


def nodes_of(got: Sequence[Answered]) -> set[str]:
    return {answer.headers["x-sutazai-node"] for answer in got if answer.status == 200}


def positions(fleet: Fleet) -> dict[tuple[str, str], str]:
    return {(view.node, view.model): view.position.value for view in fleet.breakers()}


async def test_a_node_is_left_alone_for_the_model_that_fails_there_and_comes_back(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """It answers 500, which is not tried elsewhere: a few clients see it, and then none."""
    models = ["llama3", "qwen3"]
    bad, good = await fake_nodes(OPENAI, models), await fake_nodes(OPENAI, models)

    def broken(received: Received) -> Outcome:
        return Fault.status(500) if received.json["model"] == "qwen3" else Answer()

    bad.default = broken
    gateway = await gateways(
        listed(bad, "bad"), listed(good, "good"), retry=NO_RETRY, breaker=QUICK, routing=Routing(failure_penalty_s=0.0)
    )
    sick = await answers(dial, gateway.port, [asked("qwen3")] * 60, clients=4)
    while_open = positions(gateway.fleet)
    others = await answers(dial, gateway.port, [asked("llama3")] * 40, clients=4)
    failed = sum(answer.status != 200 for answer in sick)
    bad.default = Answer()
    async with asyncio.timeout(10.0):
        while gateway.fleet.breakers():
            await answers(dial, gateway.port, [asked("qwen3")] * 4, clients=4)
    well = await answers(dial, gateway.port, [asked("qwen3")] * 40, clients=4)

    assert while_open[("bad", "qwen3")] in {"open", "half-open"}
    assert ("bad", "llama3") not in while_open
    assert 5 <= failed <= 12, "five open it; those under way and a few trials come on top"
    assert nodes_of(others) == {"bad", "good"}
    assert nodes_of(well) == {"bad", "good"}


async def test_a_node_that_answers_late_is_left_alone(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """Its heads come at once, as vLLM sends them; what counts is the first token."""
    slow, fast = await fake_nodes(OPENAI), await fake_nodes(OPENAI)
    slow.default = Answer(first_token_s=0.2)
    patient = Breaker(slow_s=0.1, open_s=60.0)
    gateway = await gateways(listed(slow, "slow", slots=8), listed(fast, "fast", slots=8), breaker=patient)
    async with asyncio.timeout(10.0):
        while positions(gateway.fleet).get(("slow", "llama3")) != "open":
            await answers(dial, gateway.port, [asked(stream=True)] * 16, clients=8)
    await slow.wait_idle()
    seen = len(slow.inferences)
    got = await answers(dial, gateway.port, [asked(stream=True)] * 100, clients=8)

    assert {answer.status for answer in got} == {200}
    assert len(slow.inferences) == seen


async def test_when_all_nodes_are_broken_they_are_still_asked(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """Each request is answered with what a node said, at once, and none waits for a better day."""
    nodes = [await fake_nodes(OPENAI) for _ in range(3)]
    for node in nodes:
        node.default = Fault.status(500)
    gateway = await gateways(*(listed(node, f"n{number}") for number, node in enumerate(nodes)), retry=NO_RETRY)
    got = await answers(dial, gateway.port, [asked()] * 100, clients=4)
    for node in nodes:
        node.default = Answer()
    (well,) = await answers(dial, gateway.port, [asked()])

    assert {answer.status for answer in got} == {502}
    assert sum(len(node.inferences) for node in nodes) == 101
    assert well.status == 200


async def test_a_conversation_stays_on_its_node(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    nodes = [await fake_nodes(OPENAI) for _ in range(4)]
    gateway = await gateways(*(listed(node, f"n{number}") for number, node in enumerate(nodes)))
    homes: list[str] = []
    for number in range(12):
        got = await answers(dial, gateway.port, [asked()] * 6, f"x-sutazai-session: talk-{number}")
        assert len(nodes_of(got)) == 1
        assert got[-1].headers["x-sutazai-reason"].startswith("warm, has the conversation, least connections")
        homes += nodes_of(got)

    assert len(set(homes)) > 1, "not all of them live in one place"


async def test_requests_with_the_same_beginning_go_to_the_same_node(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    nodes = [await fake_nodes(OPENAI) for _ in range(4)]
    gateway = await gateways(*(listed(node, f"n{number}") for number, node in enumerate(nodes)))
    prompts = ["You are a pirate. " * 100, "You are a parrot. " * 100]
    bodies = [
        asked(messages=[{"role": "system", "content": prompts[number % 2]}, {"role": "user", "content": f"{number}"}])
        for number in range(20)
    ]
    got = await answers(dial, gateway.port, bodies)

    where = Counter((number % 2, answer.headers["x-sutazai-node"]) for number, answer in enumerate(got))
    assert sorted(where.values()) == [10, 10]


async def test_a_burst_for_a_model_that_nobody_has_in_memory_loads_it_once_on_each_node_it_needs(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """Four slots are enough for four: the second node need not load it, nor drop what it has."""
    nodes = [await fake_nodes(slots=4, load_s=0.1) for _ in range(2)]
    gateway = await gateways(*(listed(node, f"n{number}") for number, node in enumerate(nodes)), health=SELDOM)
    got = await answers(dial, gateway.port, [asked(seed=number) for number in range(4)], clients=4)

    assert {answer.status for answer in got} == {200}
    assert sorted(node.loads for node in nodes) == [0, 1]


async def test_a_node_never_loads_two_models_at_once(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    """While one loads, the requests for the others wait in the gateway and not at the node."""
    models = ["llama3", "qwen3", "mistral"]
    node = await fake_nodes(models=models, slots=4, load_s=0.1)
    gateway = await gateways(listed(node, "n", slots=8), health=SELDOM)
    wires = [await dial(gateway.port) for _ in range(6)]
    for number, wire in enumerate(wires):
        wire.post(CHAT, asked(models[number % 3], seed=number))
    at_once: list[int] = []
    while node.loads < 3:
        at_once.append(len({received.json["model"] for received in node.inferences}) - node.loads)
        await asyncio.sleep(0.005)
    got = [await wire.answer() for wire in wires]

    assert {answer.status for answer in got} == {200}
    assert max(at_once) == 1
    assert node.loads == 3


async def test_where_one_model_fits_at_a_time_requests_come_in_runs_of_one_model(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """AAAB and not ABAB: forty requests, turn and turn about, and a load for few of them."""
    models = ["llama3", "qwen3"]
    node = await fake_nodes(models=models, slots=2, load_s=0.05, max_loaded=1)
    node.default = Answer(first_token_s=0.01)
    gateway = await gateways(listed(node, "n", slots=2), health=SELDOM)
    wires = [await dial(gateway.port) for _ in range(40)]
    for number, wire in enumerate(wires):
        wire.post(CHAT, asked(models[number % 2], seed=number))
    got = [await wire.answer() for wire in wires]

    assert {answer.status for answer in got} == {200}
    assert node.loads <= 10


async def test_an_adaptive_node_is_given_about_as_much_as_it_can_work_on(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(OPENAI, slots=8)
    node.default = Answer(first_token_s=0.02)
    entry = NodeSettings(url=node.url, kind="openai", slots="adaptive", name="n")
    gateway = await gateways(entry)
    await answers(dial, gateway.port, [asked()] * 700, clients=60)
    state = gateway.fleet.state("n")
    assert state is not None

    assert 6 <= state.slots <= 24
    assert node.peak_active == 8
