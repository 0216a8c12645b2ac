"""The cache and coalescing over HTTP: equal questions reach a node once, and tenants never meet."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from sutazai.adapters.postgres.stores import open_stores
from sutazai.core.identity import Role
from sutazai.core.node import NodeKind
from sutazai.settings.model import Auth, Cache, Database, ModelSettings, Retry
from sutazai.testing import Answer, Fault

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from tests.conftest import Answered, Dial, StartGateway, StartNode, Wire
    from tests.redis_servers import Servers

CHAT, EMBED = "/v1/chat/completions", "/v1/embeddings"
ASKED = {"model": "llama3", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
OFTEN_S = 0.01


async def ask(wire: Wire, body: object = ASKED, *headers: str, path: str = CHAT) -> Answered:
    wire.post(path, body, *headers)
    return await wire.answer()


def cache_of(answer: Answered) -> str:
    return answer.headers["x-sutazai-cache"]


@pytest.mark.parametrize(
    ("kind", "path", "body"),
    [
        (NodeKind.OLLAMA, "/api/chat", ASKED | {"options": {"temperature": 0}, "stream": False}),
        (NodeKind.OLLAMA, "/api/chat", ASKED | {"options": {"seed": 7}}),
        (NodeKind.OLLAMA, "/api/generate", {"model": "llama3", "prompt": "a", "options": {"temperature": 0}}),
        (NodeKind.OLLAMA, "/api/embed", {"model": "llama3", "input": ["a", "b"]}),
        (NodeKind.OLLAMA, "/api/embeddings", {"model": "llama3", "prompt": "a"}),
        (NodeKind.OLLAMA, CHAT, ASKED | {"stream": True}),
        (NodeKind.OPENAI, CHAT, ASKED),
        (NodeKind.OPENAI, CHAT, ASKED | {"stream": True, "stream_options": {"include_usage": True}}),
        (NodeKind.OPENAI, "/v1/completions", {"model": "llama3", "prompt": "a", "seed": 1}),
        (NodeKind.OPENAI, EMBED, {"model": "llama3", "input": "a"}),
        (NodeKind.OPENAI, "/api/chat", ASKED | {"options": {"temperature": 0}}),
        (NodeKind.LLAMACPP, CHAT, ASKED),
        (NodeKind.LLAMACPP, CHAT, ASKED | {"stream": True}),
    ],
)
async def test_the_second_to_ask_gets_the_same_bytes_and_no_node_is_asked(
    kind: NodeKind, path: str, body: dict[str, Any], gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(kind)
    gateway = await gateways(node)
    wire = await dial(gateway.port)
    first = await ask(wire, body, path=path)
    again = await ask(wire, msgspec.json.format(msgspec.json.encode(body), indent=2), path=path)

    assert (first.status, cache_of(first)) == (200, "miss")
    assert (again.status, cache_of(again)) == (200, "hit-l1")
    assert again.body == first.body
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["x-sutazai-node"] == first.headers["x-sutazai-node"]
    assert again.headers["age"] == "0"
    assert len(node.inferences) == 1


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"keep_alive": "5m"}, {"seed": -1, "temperature": 1}])
async def test_what_may_come_out_differently_is_asked_for_each_time(
    change: dict[str, object], gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    gateway = await gateways(node)
    wire = await dial(gateway.port)
    answers = [await ask(wire, ASKED | change) for _ in range(2)]

    assert [cache_of(answer) for answer in answers] == ["bypass", "bypass"]
    assert len(node.inferences) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_hundred_equal_requests_at_once_reach_a_node_once(
    stream: bool, gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    node.default = Answer(first_token_s=0.1, between_s=0.05, tokens=("a", "b", "c"))
    gateway = await gateways(node)
    wires = [await dial(gateway.port) for _ in range(100)]
    answers = await asyncio.gather(*[ask(wire, ASKED | {"stream": stream}) for wire in wires])

    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) == 1
    assert sorted(cache_of(answer) for answer in answers) == ["coalesced"] * 99 + ["miss"]
    assert len(node.inferences) == 1


async def test_a_late_joiner_gets_the_beginning_and_then_each_part_live(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    node.default = Answer(tokens=("one", "two", "three"), between_s=0.1)
    gateway = await gateways(node)
    first, late = await dial(gateway.port), await dial(gateway.port)
    first.post(CHAT, ASKED | {"stream": True})
    await first.head()
    beginning = await first.chunk()
    late.post(CHAT, ASKED | {"stream": True})
    head = await late.head()
    caught_up = await late.chunk()
    rests = [b"", b""]
    for number, wire in enumerate((first, late)):
        while part := await wire.chunk():
            rests[number] += part

    assert head.headers["x-sutazai-cache"] == "coalesced"
    assert caught_up + rests[1] == beginning + rests[0]
    assert rests[1].endswith(b"data: [DONE]\n\n")
    assert len(node.inferences) == 1


async def test_the_node_works_on_until_the_last_listener_has_left(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    node.default = Answer(tokens=("a",) * 1000, between_s=0.01)
    gateway = await gateways(node)
    first, second = await dial(gateway.port), await dial(gateway.port)
    for wire in (first, second):
        wire.post(CHAT, ASKED | {"stream": True})
        await wire.head()
    first.writer.close()
    for _ in range(5):
        assert await second.chunk()
    assert node.in_flight == 1
    second.writer.close()

    await node.wait_idle()
    assert len(node.inferences) == 1


async def test_the_clients_cache_control_is_obeyed(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    node = await fake_nodes()
    gateway = await gateways(node)
    wire = await dial(gateway.port)
    said = ["no-store", "", "No-Cache", "max-age=60", "max-age=0", ""]
    caches = [cache_of(await ask(wire, ASKED, *([f"Cache-Control: {word}"] if word else []))) for word in said]

    assert caches == ["bypass", "miss", "miss", "hit-l1", "miss", "hit-l1"]
    assert len(node.inferences) == 4


@pytest.mark.parametrize(
    "fault",
    [Fault.error_mid_stream(1), Fault.unfinished(1), Fault.reset_mid_stream(1), Fault.truncate(1)],
    ids=lambda fault: fault.name,
)
@pytest.mark.parametrize("kind", [NodeKind.OLLAMA, NodeKind.OPENAI], ids=lambda kind: kind.value)
async def test_a_stream_that_broke_is_given_to_nobody_else(
    kind: NodeKind, fault: Fault, gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(kind)
    node.script.append(fault)
    path, body = ("/api/chat", ASKED | {"options": {"seed": 1}}) if kind is NodeKind.OLLAMA else (CHAT, ASKED)
    gateway = await gateways(node)
    broken = await dial(gateway.port)
    broken.post(path, body | {"stream": True})
    assert (await broken.head()).status == 200
    while await broken.chunk():
        pass
    wire = await dial(gateway.port)
    good = await ask(wire, body | {"stream": True}, path=path)
    again = await ask(wire, body | {"stream": True}, path=path)

    assert [cache_of(good), cache_of(again)] == ["miss", "hit-l1"]
    assert b"error" not in good.body
    assert len(node.inferences) == 2


async def test_an_error_is_given_to_nobody_else(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    node = await fake_nodes()
    node.script.append(Fault.status(500))
    gateway = await gateways(node, retry=Retry(attempts=1))
    wire = await dial(gateway.port)
    failed, good = await ask(wire), await ask(wire)

    assert (failed.status, good.status) == (502, 200)
    assert cache_of(good) == "miss"


async def test_an_old_answer_is_given_when_the_node_died(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    gateway = await gateways(node, cache=Cache(memory_ttl_s=0.05))
    wire = await dial(gateway.port)
    first = await ask(wire)
    await node.stop()
    await asyncio.sleep(0.1)
    old = await ask(wire)
    strict = await ask(wire, ASKED, "Cache-Control: max-age=300")

    assert (old.status, cache_of(old), old.body) == (200, "stale", first.body)
    assert strict.status in {502, 503}


async def test_an_answer_grows_old(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    node = await fake_nodes()
    gateway = await gateways(node, cache=Cache(memory_ttl_s=0.05))
    wire = await dial(gateway.port)
    first = await ask(wire)
    while cache_of(await ask(wire)) == "hit-l1":
        await asyncio.sleep(OFTEN_S)

    assert cache_of(first) == "miss"
    assert len(node.inferences) == 2


async def test_nothing_is_kept_where_the_cache_is_turned_off(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    gateway = await gateways(node, cache=Cache(enabled=False))
    wire = await dial(gateway.port)
    caches = [cache_of(await ask(wire)) for _ in range(2)]

    assert "hit-l1" not in caches
    assert len(node.inferences) == 2


@pytest.fixture
async def keys(data_dir: Path) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """A function that makes a key of a tenant, as a header."""
    async with open_stores(Database(), data_dir) as stores:

        async def key_of(tenant: str) -> str:
            _, key = await stores.keys.create(name=uuid.uuid4().hex, tenant=tenant, role=Role.USER)
            return f"Authorization: Bearer {key}"

        yield key_of


@pytest.mark.parametrize(
    ("is_public", "caches"),
    [(False, ["miss", "hit-l1", "miss", "hit-l1"]), (True, ["miss", "hit-l1", "hit-l1", "hit-l1"])],
    ids=["private", "public"],
)
async def test_tenants_share_nothing_but_public_models(
    is_public: bool,
    caches: list[str],
    keys: Callable[[str], Awaitable[str]],
    gateways: StartGateway,
    fake_nodes: StartNode,
    dial: Dial,
) -> None:
    node = await fake_nodes()
    who = [await keys("acme"), await keys("acme"), await keys("other"), await keys("other")]
    gateway = await gateways(node, auth=Auth(required=True), models={"llama3": ModelSettings(public=is_public)})
    wire = await dial(gateway.port)

    assert [cache_of(await ask(wire, ASKED, key)) for key in who] == caches
    assert len(node.inferences) == caches.count("miss")


async def test_equal_questions_of_two_tenants_at_once_are_two(
    keys: Callable[[str], Awaitable[str]], gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    node.default = Answer(first_token_s=0.1)
    who = [await keys("acme"), await keys("other")] * 10
    gateway = await gateways(node, auth=Auth(required=True))
    wires = [await dial(gateway.port) for _ in who]
    await asyncio.gather(*[ask(wire, ASKED, key) for wire, key in zip(wires, who, strict=True)])

    assert len(node.inferences) == 2


def question(number: int) -> dict[str, object]:
    return ASKED | {"seed": number}


async def first_of(cache: str, wire: Wire, numbers: Iterator[int], prepare: Callable[[int], Awaitable[None]]) -> int:
    """
    Ask new questions until one is answered from there; which.

    A machine that is busy may take longer for one than Redis is given.
    """
    while True:
        number = next(numbers)
        await prepare(number)
        if cache_of(await ask(wire, question(number))) == cache:
            return number


async def test_gateways_share_answers_through_redis_and_forget_them_together(
    well_redis: Callable[[str], Servers], gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    shared = well_redis("alone").settings(prefix=uuid.uuid4().hex[:12])
    node = await fake_nodes()
    wires = [await dial((await gateways(node, redis=shared)).port) for _ in range(2)]

    async def asked_of_the_first(number: int) -> None:
        await ask(wires[0], question(number))
        await asyncio.sleep(OFTEN_S)  # it is written after the client has it

    numbers = itertools.count()
    number = await first_of("hit-l2", wires[1], numbers, asked_of_the_first)
    assert cache_of(await ask(wires[1], question(number))) == "hit-l1"

    wires[0].post("/admin/cache/forget", {"model": "llama3"})
    assert (await wires[0].answer()).status == 200
    async with asyncio.timeout(5):
        while cache_of(await ask(wires[1], question(number))) != "miss":
            await asyncio.sleep(OFTEN_S)
            wires[0].post("/admin/cache/forget", {"model": "llama3"})
            await wires[0].answer()


async def test_gateways_asked_the_same_at_once_ask_one_node_once(
    well_redis: Callable[[str], Servers], gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    shared = well_redis("alone").settings(prefix=uuid.uuid4().hex[:12])
    node = await fake_nodes()
    wires = [await dial((await gateways(node, redis=shared)).port) for _ in range(2)]
    node.default = Answer(first_token_s=0.2)
    for number in itertools.count():  # again where Redis was slower than it may be
        before = len(node.inferences)
        answers = await asyncio.gather(*[ask(wire, question(number)) for wire in wires])
        if len(node.inferences) - before == 1:
            break

    assert sorted(map(cache_of, answers)) == ["hit-l2", "miss"]
    assert len({answer.body for answer in answers}) == 1


@pytest.mark.parametrize("trouble", ["killed", "stalled"])
async def test_redis_gone_or_stuck_is_no_error_and_costs_little(
    trouble: str, redis_alone: Servers, gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    (server,) = redis_alone.servers
    wire = await dial((await gateways(node, redis=redis_alone.settings(timeout_s=0.02))).port)
    other = await dial((await gateways(node, redis=redis_alone.settings(timeout_s=0.02))).port)
    numbers = itertools.count()
    if trouble == "killed":
        server.kill()
    else:
        server.stall()
    took_s: list[float] = []
    for _ in range(20):
        began = asyncio.get_running_loop().time()
        answer = await ask(wire, question(next(numbers)))
        took_s.append(asyncio.get_running_loop().time() - began)
        assert (answer.status, cache_of(answer)) == (200, "miss")
    if trouble == "killed":
        server.start()
    else:
        server.resume()

    assert sorted(took_s)[10] < 0.1

    async def asked_of_the_other(number: int) -> None:
        await ask(other, question(number))
        await asyncio.sleep(0.1)

    await first_of("hit-l2", wire, numbers, asked_of_the_other)
