"""Answers are given again: fresh, to those who may have them, as they came; and no store makes an error more."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings as examples
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.stages import JSON, SSE, Asked, Client, Node, a_request

from sutazai.core.errors import (
    BadRequest,
    NodeRejected,
    NodeUnreachable,
    NoHealthyNode,
    Overloaded,
    StoreUnavailable,
    SutazaiError,
)
from sutazai.core.request import Priority, Request, Usage
from sutazai.gateway.answers_in_memory import AnswersInMemory
from sutazai.gateway.cached import MOST_RENEWALS, Cached
from sutazai.gateway.coalesced import Coalesced
from sutazai.gateway.second_tier import FOLLOW_S
from sutazai.policy.cacheability import CacheRules
from sutazai.ports.cache import AnswerStore, Forgotten
from sutazai.ports.inference import Inference
from sutazai.testing.answers import MemoryAnswerStore, Shelf

ONE, OTHER = b"1" * 32, b"2" * 32
BODY = b'{"choices":[]}'
STREAM = (b'data: {"a":1}\n\n', b'data: {"a":2}\n\n', b"data: [DONE]\n\n")
RESET = NodeUnreachable("It was reset.", node="a")
RULES = CacheRules(
    memory_ttl_s=60.0,
    chat_ttl_s=300.0,
    embedding_ttl_s=3600.0,
    max_answer_bytes=1000,
    refresh_from_hits=3,
    stale_if_error_s=600.0,
)


@dataclass(slots=True)
class Time:
    """Virtual time, monotonic and by the wall."""

    now: float = 1000.0

    def clock(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + 1_700_000_000.0


@dataclass(slots=True)
class Gateway:
    """One gateway's stages: the cache, coalescing, and a node that does as it is told."""

    time: Time = field(default_factory=Time)
    store: AnswerStore | None = None
    rules: CacheRules = RULES
    public: set[str] = field(default_factory=set)
    node: Node = field(default_factory=Node)
    coalesced: Coalesced = field(init=False)
    cached: Cached = field(init=False)

    def __post_init__(self) -> None:
        self.coalesced = Coalesced(self.node)
        self.cached = self.made(self.coalesced)

    def made(self, inner: Inference) -> Cached:
        return Cached(
            inner,
            memory=AnswersInMemory(2**20),
            store=self.store,
            rules=self.rules,
            is_public=self.public.__contains__,
            clock=self.time.clock,
            wall=self.time.wall,
            store_limit_s=0.02,
        )

    def ask(self, fingerprint: bytes = ONE, *, stream: bool = False, **wishes: object) -> Client:
        request = a_request(fingerprint=fingerprint, stream=stream)
        for name, value in wishes.items():
            setattr(request, name, value)
        client = Client()
        client.call = self.cached.start(request, client)
        return client

    def answered(self, fingerprint: bytes = ONE, body: bytes = BODY, **wishes: object) -> Client:
        """A client whose request the node answers."""
        client = self.ask(fingerprint, stream=False, **wishes)
        self.node.last.whole(body, usage=Usage(3, 4))
        return client

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Gateway]:
        """With its background work."""
        task = asyncio.create_task(self.cached.run(), name="the cache")
        await asyncio.sleep(0)
        try:
            while self.cached.second is not None and not self.cached.second.is_running:
                await asyncio.sleep(0)
            yield self
        finally:
            task.cancel()
            await asyncio.wait([task])
        assert task.cancelled()


@pytest.fixture
def gateway() -> Gateway:
    """One without a store."""
    return Gateway()


async def until(holds: Callable[[], bool]) -> None:
    """Let others go on until something holds."""
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.001)


# the first tier


def test_an_answer_is_given_again_within_the_call(gateway: Gateway) -> None:
    first = gateway.answered()
    gateway.time.now += 7.9
    second = gateway.ask()

    assert (first.body, first.cache, first.ends) == (BODY, b"miss", [Usage(3, 4)])
    assert (second.body, second.cache, second.ends) == (BODY, b"hit-l1", [Usage()])
    assert len(gateway.node.asked) == 1
    head = second.heads[0]
    assert (head.status, head.content_type, head.length, head.node) == (200, JSON, len(BODY), "a")
    assert (head.reason, head.extra) == ("cached", b"age: 7\r\n")
    assert (gateway.cached.hits_l1, gateway.cached.misses, gateway.cached.stored) == (1, 1, 1)


def test_a_stream_is_given_again_as_a_stream(gateway: Gateway) -> None:
    first = gateway.ask(stream=True)
    gateway.node.last.stream(*STREAM, usage=Usage(1, 2))
    second = gateway.ask(stream=True)

    assert first.parts == list(STREAM)
    assert second.parts == [b"".join(STREAM)]
    assert (second.heads[0].length, second.heads[0].content_type) == (None, SSE)
    assert second.ends == [Usage()]


def test_the_age_counts_from_when_a_node_gave_it(gateway: Gateway) -> None:
    gateway.answered()
    for after_s, age in ((0.0, b"age: 0\r\n"), (59.0, b"age: 59\r\n")):
        gateway.time.now = 1000.0 + after_s
        assert gateway.ask().heads[0].extra == age


def test_an_answer_is_asked_for_anew_after_its_time(gateway: Gateway) -> None:
    gateway.answered()
    gateway.time.now += 60.0
    second = gateway.answered(body=b'{"new":1}')
    third = gateway.ask()

    assert (second.cache, second.body) == (b"miss", b'{"new":1}')
    assert (third.cache, third.body) == (b"hit-l1", b'{"new":1}')


def test_requests_without_a_fingerprint_pass_untouched(gateway: Gateway) -> None:
    gateway.cached = gateway.made(gateway.node)
    client = Client()
    call = gateway.cached.start(a_request(), client)

    assert gateway.node.last.reply is client
    assert call is gateway.node.last


@pytest.mark.parametrize(
    "answer",
    [
        lambda asked: asked.fail(RESET),
        lambda asked: asked.whole(BODY, status=201),
        lambda asked: asked.whole(b'{"error":"no"}'),
        lambda asked: asked.whole(bytes(1001)),
    ],
    ids=["an error", "another status", "an error with a good status", "too large"],
)
def test_what_may_not_be_kept_is_not(answer: Callable[[Asked], None], gateway: Gateway) -> None:
    gateway.ask()
    answer(gateway.node.last)
    gateway.ask()

    assert len(gateway.node.asked) == 2
    assert (gateway.cached.entries, gateway.cached.stored) == (0, 0)


@pytest.mark.parametrize(
    "say",
    [
        lambda asked: (asked.head(), asked.chunk(STREAM[0]), asked.fail(RESET)),
        lambda asked: asked.stream(*STREAM[:2]),
        lambda asked: asked.stream(STREAM[0], b'data: {"error":"no"}\n\n', STREAM[2]),
        lambda asked: asked.stream(bytes(600), bytes(600), STREAM[2]),
    ],
    ids=["broken off", "without an end", "with an error in it", "too large"],
)
def test_a_stream_that_did_not_go_well_is_not_kept(say: Callable[[Asked], None], gateway: Gateway) -> None:
    client = gateway.ask(stream=True)
    say(gateway.node.last)
    gateway.ask(stream=True)

    assert client.parts
    assert len(gateway.node.asked) == 2


def test_a_large_answer_that_came_in_parts_is_kept_as_one(gateway: Gateway) -> None:
    gateway.ask()
    gateway.node.last.head(content_type=JSON)
    gateway.node.last.chunk(b'{"choices":')
    gateway.node.last.chunk(b"[]}")
    gateway.node.last.end()
    again = gateway.ask()

    assert (again.parts, again.heads[0].length) == ([BODY], len(BODY))


def test_of_an_answer_that_is_too_large_nothing_is_held() -> None:
    gateway = Gateway()
    gateway.cached = gateway.made(gateway.node)
    gateway.ask(stream=True)
    node = gateway.node.last
    node.head()
    parts = [bytes([number]) * 600 for number in range(3)]
    for part in parts:
        node.chunk(part)
    recording = node.reply

    assert not any(part in gc.get_referents(held) for held in gc.get_referents(recording) for part in parts)


def test_who_leaves_early_leaves_nothing_in_the_cache(gateway: Gateway) -> None:
    client = gateway.ask(stream=True)
    gateway.node.last.head()
    gateway.node.last.chunk(STREAM[0])
    client.leave()

    assert gateway.node.last.cancelled
    assert gateway.cached.entries == 0


def test_of_requests_that_share_an_answer_one_records_it(gateway: Gateway) -> None:
    clients = [gateway.ask(stream=True) for _ in range(3)]
    gateway.node.last.stream(*STREAM)

    assert [client.cache for client in clients] == [b"miss", b"coalesced", b"coalesced"]
    assert gateway.cached.stored == 1
    assert gateway.ask(stream=True).cache == b"hit-l1"


# what the client says


def test_no_store_reads_and_leaves_nothing(gateway: Gateway) -> None:
    gateway.answered()
    other = gateway.answered(cache_control=b"no-store", body=b'{"other":1}')

    assert (other.cache, other.body) == (b"bypass", b'{"other":1}')
    assert gateway.ask().body == BODY
    gateway.answered(OTHER, cache_control=b"no-store")
    gateway.ask(OTHER)
    assert len(gateway.node.asked) == 4


def test_no_cache_asks_a_node_and_renews_what_is_kept(gateway: Gateway) -> None:
    gateway.answered()
    other = gateway.answered(cache_control=b"no-cache", body=b'{"other":1}')

    assert (other.cache, other.body) == (b"miss", b'{"other":1}')
    assert gateway.ask().body == b'{"other":1}'


def test_max_age_takes_only_what_is_young_enough(gateway: Gateway) -> None:
    gateway.answered()
    gateway.time.now += 10.0
    young_enough = gateway.ask(cache_control=b"max-age=10")
    too_old = gateway.answered(cache_control=b"max-age=9", body=b'{"other":1}')

    assert (young_enough.cache, young_enough.body) == (b"hit-l1", BODY)
    assert (too_old.cache, too_old.body) == (b"miss", b'{"other":1}')
    assert gateway.ask(cache_control=b"max-age=0").body == b""


# better old than none


@pytest.mark.parametrize(
    "error",
    [
        RESET,
        NodeRejected("It broke.", node="a", status=503),
        NoHealthyNode("All were down.", retry_after_s=5),
        Overloaded("There was no room.", retry_after_s=5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_old_answer_is_given_in_place_of_an_error(error: SutazaiError, gateway: Gateway) -> None:
    gateway.answered()
    gateway.time.now += 659.0
    client = gateway.ask()
    gateway.node.last.fail(error)

    assert (client.cache, client.body, client.ends) == (b"stale", BODY, [Usage()])
    assert client.heads[0].extra == b"age: 659\r\n"
    assert gateway.cached.stale == 1


@pytest.mark.parametrize(
    ("error", "after_s", "cache_control"),
    [
        (BadRequest("It made no sense."), 70.0, b""),
        (NodeRejected("It was not understood.", node="a", status=400), 70.0, b""),
        (RESET, 661.0, b""),
        (RESET, 70.0, b"max-age=300"),
        (RESET, 1.0, b"no-cache"),
    ],
)
def test_the_clients_own_mistakes_and_what_is_too_old_for_it_stay_errors(
    error: SutazaiError, after_s: float, cache_control: bytes, gateway: Gateway
) -> None:
    gateway.answered()
    gateway.time.now += after_s
    gateway.cached.sweep()
    client = gateway.ask(cache_control=cache_control)
    gateway.node.last.fail(error)

    assert client.ends == [error]


def test_an_answer_that_has_begun_is_not_replaced_by_an_old_one(gateway: Gateway) -> None:
    gateway.ask(stream=True)
    gateway.node.last.stream(*STREAM)
    gateway.time.now += 70.0
    client = gateway.ask(stream=True)
    gateway.node.last.head()
    gateway.node.last.fail(RESET)

    assert client.ends == [RESET]


# made anew in time


def asked_often(gateway: Gateway, count: int = 3) -> None:
    for _ in range(count):
        assert gateway.ask().cache == b"hit-l1"


def test_what_is_asked_for_often_is_made_anew_before_its_time(gateway: Gateway) -> None:
    gateway.answered()
    asked_often(gateway)
    assert len(gateway.node.asked) == 1
    gateway.time.now += 49.0
    asked_often(gateway)

    assert len(gateway.node.asked) == 2
    renewal = gateway.node.last
    assert renewal.request.id.endswith(".r1")
    assert renewal.request.priority is Priority.LOW
    renewal.whole(b'{"new":1}')
    assert gateway.ask().body == b'{"new":1}'
    assert gateway.cached.refreshed == 1
    gateway.time.now += 40.0
    assert gateway.ask().body == b'{"new":1}'


def test_what_is_asked_for_seldom_is_not(gateway: Gateway) -> None:
    gateway.answered()
    gateway.time.now += 49.0
    asked_often(gateway, 2)

    assert len(gateway.node.asked) == 1


def test_a_renewal_that_fails_is_noticed_by_nobody(gateway: Gateway) -> None:
    gateway.answered()
    gateway.time.now += 49.0
    asked_often(gateway)
    gateway.node.last.fail(RESET)
    asked_often(gateway, 5)

    assert len(gateway.node.asked) == 2
    assert gateway.cached.refreshed == 0


def test_renewals_are_few_at_a_time(gateway: Gateway) -> None:
    names = [bytes([number]) * 32 for number in range(MOST_RENEWALS + 5)]
    for name in names:
        gateway.answered(name)
    gateway.time.now += 49.0
    for name in names * 3:
        gateway.ask(name)

    assert len(gateway.node.asked) - len(names) == MOST_RENEWALS


async def test_renewals_under_way_end_with_the_cache(gateway: Gateway) -> None:
    async with gateway.running():
        gateway.answered()
        gateway.time.now += 49.0
        asked_often(gateway)

    assert gateway.node.last.cancelled


# forgetting


async def test_what_is_forgotten_is_asked_for_anew(gateway: Gateway) -> None:
    gateway.answered(ONE)
    gateway.answered(OTHER)

    assert await gateway.cached.forget(Forgotten(fingerprint=ONE)) == 1
    assert gateway.ask(OTHER).cache == b"hit-l1"
    gateway.ask(ONE)
    assert len(gateway.node.asked) == 3


@pytest.mark.parametrize(
    ("what", "gone"),
    [
        (Forgotten(tag="node:a"), 1),
        (Forgotten(tag="node:b"), 0),
        (Forgotten(tag="key:key"), 1),
        (Forgotten(model="llama3"), 1),
        (Forgotten(tenant="acme"), 1),
        (Forgotten(tenant=""), 0),
    ],
)
async def test_an_answer_can_be_forgotten_by_who_gave_it_and_who_asked(
    what: Forgotten, gone: int, gateway: Gateway
) -> None:
    gateway.answered()

    assert await gateway.cached.forget(what) == gone


async def test_a_public_answer_belongs_to_no_tenant(gateway: Gateway) -> None:
    gateway.public.add("llama3")
    gateway.answered()

    assert await gateway.cached.forget(Forgotten(tenant="acme")) == 0
    assert await gateway.cached.forget(Forgotten(tenant="")) == 1


async def test_an_answer_that_is_being_made_while_others_are_forgotten_is_not_kept(gateway: Gateway) -> None:
    """It may have been made by what was to be forgotten."""
    client = gateway.ask()
    await gateway.cached.forget(Forgotten(model="llama3"))
    gateway.node.last.whole(BODY)

    assert client.body == BODY
    assert gateway.cached.entries == 0


# the second tier


@pytest.fixture
async def gateways() -> AsyncIterator[tuple[Gateway, Gateway]]:
    """Two that share a store and the time."""
    time = Time()
    shelf = Shelf(clock=time.clock)
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(Gateway(time, MemoryAnswerStore(shelf)).running())
        other = await stack.enter_async_context(Gateway(time, MemoryAnswerStore(shelf)).running())
        yield one, other


def store_of(gateway: Gateway) -> MemoryAnswerStore:
    assert isinstance(gateway.store, MemoryAnswerStore)
    return gateway.store


async def asked(gateway: Gateway, count: int) -> Asked:
    """The latest request of the node, once there are so many."""
    await until(lambda: len(gateway.node.asked) >= count)
    return gateway.node.last


async def shared(gateway: Gateway, fingerprint: bytes = ONE, body: bytes = BODY) -> None:
    """An answer that this gateway had made and that is in the store."""
    before = len(gateway.node.asked)
    gateway.ask(fingerprint)
    (await asked(gateway, before + 1)).whole(body, usage=Usage(3, 4))
    await until(lambda: fingerprint in store_of(gateway).shelf.answers)


async def test_another_gateway_gives_the_answer_and_keeps_it(gateways: tuple[Gateway, Gateway]) -> None:
    one, other = gateways
    await shared(one)
    one.time.now += 5.0
    client = other.ask()
    await until(lambda: bool(client.ends))

    assert (client.body, client.cache, client.heads[0].extra) == (BODY, b"hit-l2", b"age: 5\r\n")
    assert client.ends == [Usage()]
    assert other.ask().cache == b"hit-l1"
    assert other.node.asked == []
    assert (other.cached.hits_l2, other.cached.hits_l1) == (1, 1)


async def test_streams_come_from_the_store_as_streams(gateways: tuple[Gateway, Gateway]) -> None:
    one, other = gateways
    one.ask(stream=True)
    (await asked(one, 1)).stream(*STREAM)
    await until(lambda: ONE in store_of(one).shelf.answers)
    client = other.ask(stream=True)
    await until(lambda: bool(client.ends))

    assert (client.body, client.heads[0].length) == (b"".join(STREAM), None)


async def test_the_store_outlasts_this_process_memory(gateways: tuple[Gateway, Gateway]) -> None:
    """The memory's time is shorter; the answer's own counts in both."""
    one, _ = gateways
    await shared(one)
    one.time.now += 61.0
    client = one.ask()
    await until(lambda: bool(client.ends))
    assert client.cache == b"hit-l2"
    one.time.now += 238.0
    client = one.ask()
    await until(lambda: bool(client.ends))
    assert client.cache == b"hit-l2"
    one.time.now += 1.5
    one.ask()
    await asked(one, 2)

    assert len(one.node.asked) == 2


async def test_equal_requests_ask_the_store_once_and_then_one_node(gateways: tuple[Gateway, Gateway]) -> None:
    one, _ = gateways
    clients = [one.ask() for _ in range(100)]
    (await asked(one, 1)).whole(BODY)
    late = one.ask()

    assert {client.body for client in [*clients, late]} == {BODY}
    assert len(one.node.asked) == 1
    assert store_of(one).asked == 2  # get and lead; the answer is written later


async def test_who_comes_while_a_node_is_asked_joins_it_and_does_not_wait_for_the_store(
    gateways: tuple[Gateway, Gateway],
) -> None:
    one, _ = gateways
    one.ask(stream=True)
    node = await asked(one, 1)
    node.head()
    node.chunk(STREAM[0])
    late = one.ask(stream=True)

    assert late.body == STREAM[0]
    assert late.cache == b"coalesced"


async def test_of_two_gateways_one_asks_a_node_and_the_other_waits_for_it(gateways: tuple[Gateway, Gateway]) -> None:
    one, other = gateways
    one.ask()
    node = await asked(one, 1)
    waiting = other.ask()
    await asyncio.sleep(0.03)
    assert other.node.asked == []
    node.whole(BODY)
    await until(lambda: bool(waiting.ends))

    assert (waiting.body, waiting.cache) == (BODY, b"hit-l2")
    assert other.node.asked == []


async def test_who_waits_asks_itself_when_the_leader_fails(gateways: tuple[Gateway, Gateway]) -> None:
    one, other = gateways
    one.ask()
    node = await asked(one, 1)
    waiting = other.ask()
    await asyncio.sleep(0.01)
    node.fail(RESET)
    (await asked(other, 1)).whole(BODY)

    assert waiting.body == BODY


async def test_who_waits_asks_itself_when_the_leading_client_leaves(gateways: tuple[Gateway, Gateway]) -> None:
    one, other = gateways
    leaving = one.ask()
    node = await asked(one, 1)
    waiting = other.ask()
    await asyncio.sleep(0.01)
    leaving.leave()
    (await asked(other, 1)).whole(BODY)

    assert node.cancelled
    assert waiting.body == BODY


async def test_a_client_that_leaves_while_the_store_is_asked_is_forgotten(gateways: tuple[Gateway, Gateway]) -> None:
    one, _ = gateways
    store_of(one).stall()
    clients = [one.ask(), one.ask()]
    clients[0].leave()
    store_of(one).go_on()
    (await asked(one, 1)).whole(BODY)
    assert clients[1].body == BODY
    store_of(one).stall()
    alone = one.ask(OTHER)
    await asyncio.sleep(0)
    alone.leave()
    store_of(one).go_on()
    again = one.ask(OTHER)
    (await asked(one, 2)).whole(BODY)

    assert again.body == BODY
    assert len(one.node.asked) == 2


async def test_a_client_that_pauses_while_the_store_is_asked_pauses_the_node(
    gateways: tuple[Gateway, Gateway],
) -> None:
    one, _ = gateways
    client = one.ask(stream=True)
    assert client.call is not None
    client.call.pause()
    node = await asked(one, 1)
    assert node.paused
    client.call.resume()

    assert not node.paused


async def test_a_store_that_is_away_costs_a_miss_and_no_error(gateways: tuple[Gateway, Gateway]) -> None:
    one, _ = gateways
    store_of(one).is_away = True
    client = one.ask()
    (await asked(one, 1)).whole(BODY)
    await until(lambda: one.cached.store_errors == 2)

    assert (client.body, client.cache) == (BODY, b"miss")
    assert one.ask().cache == b"hit-l1"


async def test_a_store_that_hangs_costs_no_more_than_its_limit(gateways: tuple[Gateway, Gateway]) -> None:
    one, _ = gateways
    store_of(one).stall()
    began = asyncio.get_running_loop().time()
    client = one.ask()
    (await asked(one, 1)).whole(BODY)
    took_s = asyncio.get_running_loop().time() - began

    assert client.body == BODY
    assert 0.015 < took_s < 1.0
    assert one.cached.store_errors == 1


async def test_who_waited_for_the_store_before_waits_no_second_time(gateways: tuple[Gateway, Gateway]) -> None:
    """All stages together have one limit: its limits took it all, so a node is asked within `start`."""
    one, _ = gateways
    store_of(one).stall()
    client = one.ask(store_wait_s=0.02)

    assert len(one.node.asked) == 1
    one.node.last.whole(BODY)
    assert (client.body, one.cached.store_errors) == (BODY, 0)


async def test_a_request_with_little_patience_left_joins_no_longer_question(gateways: tuple[Gateway, Gateway]) -> None:
    one, _ = gateways
    store_of(one).stall()
    patient = one.ask()
    hurried = one.ask(store_wait_s=0.015)

    assert len(one.node.asked) == 1
    (await asked(one, 1)).whole(BODY)
    (await asked(one, 2)).whole(BODY)  # the other's turn, once the store had its time
    assert (hurried.body, patient.body) == (BODY, BODY)


async def test_a_store_that_breaks_its_word_breaks_nothing_else() -> None:
    """Not even with errors that it was never to raise."""

    class Broken(MemoryAnswerStore):
        async def get(self, fingerprint: bytes) -> None:
            raise ValueError(fingerprint)

        async def put(self, *_: object, **__: object) -> None:
            raise ValueError

    async with Gateway(store=Broken()).running() as gateway:
        client = gateway.ask()
        (await asked(gateway, 1)).whole(BODY)
        await until(lambda: gateway.cached.store_errors == 2)
        gateway.ask(OTHER)
        (await asked(gateway, 2)).whole(BODY)

    assert client.body == BODY


async def test_an_old_answer_of_the_store_is_given_when_no_node_can(gateways: tuple[Gateway, Gateway]) -> None:
    one, other = gateways
    await shared(one)
    one.time.now += 500.0
    client = other.ask()
    (await asked(other, 1)).fail(RESET)

    assert (client.cache, client.body, client.heads[0].extra) == (b"stale", BODY, b"age: 500\r\n")


async def test_who_has_wishes_gets_no_old_answer_of_the_store_either(gateways: tuple[Gateway, Gateway]) -> None:
    one, other = gateways
    await shared(one)
    one.time.now += 500.0
    client = other.ask(cache_control=b"max-age=600")
    (await asked(other, 1)).fail(RESET)

    assert client.ends == [RESET]


async def test_a_lead_that_nobody_waits_for_any_more_is_given_up(gateways: tuple[Gateway, Gateway]) -> None:
    one, other = gateways
    store_of(one).stall()
    leaving = one.ask()
    await asyncio.sleep(0)
    leaving.leave()
    store_of(one).go_on()
    await until(lambda: store_of(one).asked == 3)  # get, lead and give up
    await until(lambda: not store_of(one).shelf.leads)
    other.ask()
    await asked(other, 1)

    assert one.node.asked == []


async def test_who_leaves_while_another_gateway_is_waited_for_is_forgotten(gateways: tuple[Gateway, Gateway]) -> None:
    one, other = gateways
    one.ask()
    node = await asked(one, 1)
    leaving = other.ask()
    await until(lambda: store_of(other).asked == 3)  # get, lead and follow
    leaving.leave()
    staying = other.ask()
    async with asyncio.timeout(FOLLOW_S / 2):
        (await asked(other, 1)).whole(BODY)

    assert staying.body == BODY
    node.whole(BODY)


async def test_for_who_left_already_no_other_gateway_is_waited_for(gateways: tuple[Gateway, Gateway]) -> None:
    one, other = gateways
    one.ask()
    await asked(one, 1)
    store_of(other).stall()
    leaving = other.ask()
    await asyncio.sleep(0)
    leaving.leave()
    store_of(other).go_on()
    await until(lambda: store_of(other).asked == 2)  # get and lead
    await asyncio.sleep(0.01)

    assert store_of(other).asked == 2


async def test_what_was_given_before_it_was_fetched_again_counts(gateways: tuple[Gateway, Gateway]) -> None:
    """What is asked for steadily, but not three times a minute, is made anew in time too."""
    one, _ = gateways
    await shared(one)
    asked_often(one, 2)
    one.time.now += 200.0
    client = one.ask()
    await until(lambda: bool(client.ends))
    assert client.cache == b"hit-l2"
    one.time.now += 45.0
    asked_often(one, 1)

    assert (await asked(one, 2)).request.id.endswith(".r1")


async def test_one_gateway_renews_what_both_are_asked_for_often(gateways: tuple[Gateway, Gateway]) -> None:
    one, other = gateways
    await shared(one)
    one.time.now += 245.0
    for gateway in gateways:
        client = gateway.ask()
        await until(lambda client=client: bool(client.ends))  # type: ignore[misc]
        asked_often(gateway)
    await until(lambda: len(one.node.asked) + len(other.node.asked) >= 2)
    await asyncio.sleep(0.02)

    assert len(one.node.asked) + len(other.node.asked) == 2
    renewer = one if len(one.node.asked) == 2 else other
    renewer.node.last.whole(b'{"new":1}')
    await until(lambda: store_of(one).shelf.answers[ONE][0].parts == (b'{"new":1}',))
    assert renewer.cached.refreshed == 1


async def test_renewals_are_few_at_a_time_with_a_store_too(gateways: tuple[Gateway, Gateway]) -> None:
    one, _ = gateways
    names = [bytes([number]) * 32 for number in range(MOST_RENEWALS + 5)]
    for name in names:
        await shared(one, name)
    one.time.now += 59.0
    for name in names:
        one.ask(name)
    one.time.now += 186.0
    for name in names:
        client = one.ask(name)
        await until(lambda client=client: bool(client.ends))  # type: ignore[misc]
    for name in names * 2:
        one.ask(name)
    await until(lambda: len(store_of(one).shelf.leads) == MOST_RENEWALS)

    assert len(one.node.asked) - len(names) == MOST_RENEWALS


async def test_what_one_gateway_forgets_every_gateway_forgets(gateways: tuple[Gateway, Gateway]) -> None:
    one, other = gateways
    await shared(one, ONE)
    await shared(one, OTHER)
    for fingerprint in (ONE, OTHER):
        client = other.ask(fingerprint)
        await until(lambda client=client: bool(client.ends))  # type: ignore[misc]

    assert await one.cached.forget(Forgotten(fingerprint=ONE)) == 1
    await until(lambda: other.cached.entries == 1)

    assert other.ask(OTHER).cache == b"hit-l1"
    other.ask(ONE)
    await asked(other, 1)


async def test_a_gateway_that_may_have_missed_a_word_forgets_everything(gateways: tuple[Gateway, Gateway]) -> None:
    one, _ = gateways
    await shared(one, ONE)
    store_of(one).lose_words()

    await until(lambda: one.cached.entries == 0)


async def test_forgetting_tells_when_the_others_could_not_be_told(gateways: tuple[Gateway, Gateway]) -> None:
    one, _ = gateways
    await shared(one)
    store_of(one).is_away = True

    with pytest.raises(StoreUnavailable):
        await one.cached.forget(Forgotten())
    assert one.cached.entries == 0


async def test_an_answer_that_waits_to_be_written_can_be_forgotten(gateways: tuple[Gateway, Gateway]) -> None:
    one, other = gateways
    one.ask()
    node = await asked(one, 1)
    store_of(one).stall()
    node.whole(BODY)
    one.cached.forget_here(Forgotten(model="llama3"))
    store_of(one).go_on()
    client = other.ask()
    (await asked(other, 1)).whole(BODY)

    assert client.cache == b"miss"
    assert one.cached.entries == 0


async def test_without_its_background_work_it_asks_no_store() -> None:
    gateway = Gateway(store=MemoryAnswerStore())
    client = gateway.answered()

    assert client.cache == b"miss"
    assert gateway.ask().cache == b"hit-l1"
    assert store_of(gateway).asked == 0


def test_new_rules_count_from_now_on(gateway: Gateway) -> None:
    gateway.cached.adopt(replace(RULES, memory_ttl_s=5.0), memory_bytes=2**20)
    gateway.answered()
    gateway.time.now += 5.0
    gateway.ask()
    assert len(gateway.node.asked) == 2
    gateway.cached.adopt(RULES, memory_bytes=0)

    assert gateway.cached.size_bytes == 0


class CachedMachine(RuleBasedStateMachine):
    """Any order of asking, leaving, answering, waiting and forgetting, for tenants who must not meet."""

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.gateway = Gateway()
        self.clients: list[tuple[Request, Client]] = []
        self.made_at: dict[bytes, tuple[bytes, float]] = {}
        self.count = 0

    def open_calls(self) -> list[Asked]:
        return [call for call in self.gateway.node.asked if not call.over]

    @rule(name=st.sampled_from("abc"), tenant=st.sampled_from(["x", "y"]), wish=st.sampled_from([b"", b"no-cache"]))
    def ask(self, name: str, tenant: str, wish: bytes) -> None:
        request = a_request(fingerprint=(name + tenant).encode() * 16, stream=False, tenant=tenant)
        request.cache_control = wish
        client = Client()
        client.call = self.gateway.cached.start(request, client)
        self.clients.append((request, client))

    @precondition(lambda self: self.open_calls())
    @rule()
    def answer(self) -> None:
        call = self.random.choice(self.open_calls())
        self.count += 1
        body = b'{"for":"%s","number":%d}' % (call.request.fingerprint[:2], self.count)
        self.made_at[body] = (call.request.fingerprint, self.gateway.time.now)
        call.whole(body)

    @precondition(lambda self: self.open_calls())
    @rule()
    def fail(self) -> None:
        self.random.choice(self.open_calls()).fail(RESET)

    @precondition(lambda self: any(not client.ends for _, client in self.clients))
    @rule()
    def leave(self) -> None:
        self.random.choice([client for _, client in self.clients if not client.ends]).leave()

    @rule(by_s=st.sampled_from([1.0, 20.0, 59.0, 300.0, 700.0]))
    def wait(self, by_s: float) -> None:
        self.gateway.time.now += by_s
        self.gateway.cached.sweep()

    @rule(tenant=st.sampled_from(["x", "y", None]))
    def forget(self, tenant: str | None) -> None:
        self.gateway.cached.forget_here(Forgotten(tenant=tenant))

    @invariant()
    def everybody_gets_an_answer_to_his_own_question(self) -> None:
        for request, client in self.clients:
            if client.body:
                fingerprint, _ = self.made_at[client.body]
                assert fingerprint == request.fingerprint
                assert client.cache in {b"miss", b"coalesced", b"hit-l1", b"stale"}

    @invariant()
    def what_is_given_is_as_old_as_it_says(self) -> None:
        for _, client in self.clients:
            for head in client.heads:
                if head.cache == b"hit-l1":
                    assert 0 <= int(head.extra.split()[1]) <= 60
                if head.cache == b"stale":
                    assert 60 <= int(head.extra.split()[1]) <= 660

    @invariant()
    def calls_and_clients_end_together(self) -> None:
        waiting = {request.fingerprint for request, client in self.clients if not client.ends and not client.left}
        renewed = {call.request.fingerprint for call in self.open_calls() if call.request.id.endswith(".r1")}
        assert {call.request.fingerprint for call in self.open_calls()} == waiting | renewed


CachedMachine.TestCase.settings = examples(max_examples=50, stateful_step_count=40, deadline=None)
TestAnyOrder = CachedMachine.TestCase
