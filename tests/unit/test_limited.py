"""The stage of limits: what it lets through, what it says, and that it gives back all that it took, on every way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sutazai.core.errors import BudgetSpent, NodeUnreachable, RateLimited, StoreUnavailable, SutazaiError
from sutazai.core.identity import Allowance, Limits
from sutazai.core.request import Endpoint, Head, Request, Usage
from sutazai.gateway.counts import Counts
from sutazai.gateway.limit_words import in_words
from sutazai.gateway.limited import MAX_UNSETTLED, Limited, Run
from sutazai.policy.rate_limit import Kind, Verdict, amounts_of, bounds_of, month_of
from sutazai.ports.inference import Call, Reply
from sutazai.ports.limits import Spent
from sutazai.testing.limits import MemoryLimits

UNLIMITED = Limits()
NOON = 1_770_000_000.0
"""Unix time of a day in the middle of a month."""
PRICES = {"m": (1.0, 2.0)}
BODY = b'{"max_tokens": 100}'
ESTIMATE = len(BODY) // 4 + 1 + 100


@dataclass(slots=True)
class Clock:
    """Monotonic and Unix time, which move together."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now

    def wall_s(self) -> float:
        return NOON - 1000.0 + self.now


@dataclass(slots=True, eq=False)
class NodeCall:
    """A request as the stages below see it."""

    request: Request
    reply: Reply
    heard: list[str] = field(default_factory=list)

    def cancel(self) -> None:
        self.heard.append("cancel")

    def pause(self) -> None:
        self.heard.append("pause")

    def resume(self) -> None:
        self.heard.append("resume")


class Inner:
    """The stages below; `at_start` is what they do with a request before `start` returns."""

    def __init__(self) -> None:
        self.calls: list[NodeCall] = []
        self.at_start: Callable[[NodeCall], None] | None = None

    def start(self, request: Request, reply: Reply) -> Call:
        call = NodeCall(request, reply)
        self.calls.append(call)
        if self.at_start is not None:
            self.at_start(call)
        return call


@dataclass(slots=True)
class Client:
    """A reply that keeps what it is told."""

    said: list[str] = field(default_factory=list)
    extra: bytes = b""
    error: SutazaiError | None = None
    on_head: Callable[[], None] | None = None

    def head(self, head: Head) -> None:
        self.said.append("head")
        self.extra = head.extra
        if self.on_head is not None:
            self.on_head()

    def chunk(self, data: bytes) -> None:
        self.said.append("chunk")

    def end(self, usage: Usage | None) -> None:
        self.said.append("end")

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        self.said.append("whole")
        self.extra = head.extra

    def fail(self, error: SutazaiError) -> None:
        self.said.append("fail")
        self.error = error


class Stage:
    """The stage, what is below it and who asks."""

    def __init__(self, *, shared: MemoryLimits | None = None, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.inner = Inner()
        self.counts = Counts(clock=self.clock, wall_s=self.clock.wall_s)
        self.shared = shared
        self.limited = Limited(self.inner, local=self.counts, shared=shared, price=lambda name: PRICES[name])
        self.asked = 0

    def ask(self, allowance: Allowance | None, client: Client | None = None, *, stream: bool = False) -> Client:
        client = client or Client()
        self.start(allowance, client, stream=stream)
        return client

    def start(self, allowance: Allowance | None, client: Client, *, stream: bool = False) -> Call:
        self.asked += 1
        request = Request(f"r{self.asked}", Endpoint.OPENAI_CHAT, "m", stream, BODY, "acme", "k1", self.clock.now)
        request.allowance = allowance
        return self.limited.start(request, client)

    @property
    def last(self) -> NodeCall:
        return self.inner.calls[-1]

    def left(self, allowance: Allowance, kind: Kind) -> float:
        """What remains of the first limit of a kind, without taking any."""
        nothing = (0, 0, 0, 0, 0, 0.0)
        return remaining(self.counts.take(self.counts.bounds(allowance), nothing), kind)


def remaining(verdict: Verdict, kind: Kind) -> float:
    return next(standing.remaining for standing in verdict.standings() if standing.bound.kind is kind)


def allowance(tenant: Limits = UNLIMITED, key: Limits = UNLIMITED, key_id: str = "k1") -> Allowance:
    return Allowance(tenant="acme", key_id=key_id, of_tenant=tenant, of_key=key)


def head(extra: bytes = b"") -> Head:
    return Head(200, b"application/json", None, "a", "warm", extra=extra)


EVERYTHING = allowance(
    Limits(
        requests_per_minute=60,
        tokens_per_minute=6000,
        bytes_per_minute=6000,
        concurrent_requests=3,
        tokens_per_month=100_000,
        money_per_month=1.0,
    )
)
ENDS: dict[str, tuple[int, Callable[[NodeCall, Call], object]]] = {
    "whole": (30, lambda node, _: node.reply.whole(head(), b"all", Usage(10, 20))),
    "whole without usage": (ESTIMATE, lambda node, _: node.reply.whole(head(), b"all", None)),
    "whole from the cache": (0, lambda node, _: node.reply.whole(head(), b"all", Usage(0, 0))),
    "more than was guessed": (900, lambda node, _: node.reply.whole(head(), b"all", Usage(400, 500))),
    "stream": (30, lambda node, _: stream(node, 3).end(Usage(10, 20))),
    "stream without usage": (ESTIMATE - 100 + 3, lambda node, _: stream(node, 3).end(None)),
    "failure before the head": (0, lambda node, _: node.reply.fail(broken())),
    "failure after the head": (ESTIMATE - 100 + 3, lambda node, _: stream(node, 3).fail(broken())),
    "client left before the head": (ESTIMATE - 100, lambda _, call: call.cancel()),
    "client left after the head": (ESTIMATE - 100 + 2, lambda node, call: leave(call, after=stream(node, 2))),
    "client left twice": (ESTIMATE - 100, lambda _, call: leave(call, times=2)),
}


def stream(node: NodeCall, chunks: int) -> Reply:
    node.reply.head(head())
    for _ in range(chunks):
        node.reply.chunk(b"a")
    return node.reply


def run_of(node: NodeCall) -> Run:
    """The call that the client holds, before `start` has returned it."""
    assert isinstance(node.reply, Run)
    return node.reply


def leave(call: Call, *, times: int = 1, after: Reply | None = None) -> None:
    del after
    for _ in range(times):
        call.cancel()


def broken() -> SutazaiError:
    return NodeUnreachable("It was cut.", node="a")


# by itself


def test_a_caller_without_limits_costs_nothing() -> None:
    """Neither the reply nor the call is wrapped."""
    stage, client = Stage(), Client()

    for nobodys in (None, allowance()):
        call = stage.start(nobodys, client)

        assert stage.last.reply is client
        assert call is stage.last


def test_requests_pass_up_to_the_limit_and_then_are_told_when_to_come_back() -> None:
    stage = Stage()
    mine = allowance(Limits(requests_per_minute=2))

    clients = [stage.ask(mine) for _ in range(3)]

    assert [client.said for client in clients] == [[], [], ["fail"]]
    error = clients[2].error
    assert type(error) is RateLimited
    assert error.retry_after_s == pytest.approx(30.0)
    assert error.message == "The tenant 'acme' may take 2 requests a minute and took them; come back in 30s."
    assert (stage.limited.admitted, stage.limited.refused, len(stage.inner.calls)) == (2, 1, 2)
    stage.clock.now += 30.0
    assert stage.ask(mine).said == []


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            Limits(tokens_per_minute=150),
            "The key 'k1' may take 150 tokens a minute. It has 45 left now, and this one might take 105; "
            "come back in 24s.",
        ),
        (
            Limits(bytes_per_minute=30),
            "The key 'k1' may take 30 bytes of requests a minute. It has 11 left now, and this one might take 19; "
            "come back in 16s.",
        ),
        (
            Limits(concurrent_requests=1),
            "The key 'k1' may have 1 requests at once and had them; come back when one has ended.",
        ),
        (
            Limits(tokens_per_month=200),
            "The key 'k1' may take 200 tokens a month and has 95 left, and this one might take 105; "
            "a new month (UTC) begins in",
        ),
        (
            Limits(money_per_month=0.000205),
            "The key 'k1' may take 0.000205 a month and took them; a new month (UTC) begins in",
        ),
    ],
    ids=["tokens", "bytes", "concurrent", "month's tokens", "month's money"],
)
def test_a_refusal_names_the_limit_whose_it_is_and_when_to_come_back(limits: Limits, message: str) -> None:
    stage = Stage()
    mine = allowance(key=limits)
    stage.ask(mine)

    error = stage.ask(mine).error

    assert isinstance(error, RateLimited)
    assert isinstance(error, BudgetSpent) is ("month" in message)
    assert error.message.startswith(message)
    assert error.retry_after_s > 0.0


def test_the_limit_that_lasts_longest_is_named() -> None:
    stage = Stage()
    mine = allowance(Limits(requests_per_minute=1), Limits(requests_per_minute=1, tokens_per_month=110))
    stage.ask(mine)

    assert isinstance(stage.ask(mine).error, BudgetSpent)


def test_a_limited_answer_tells_how_the_limits_stand() -> None:
    """Of requests and tokens, each the tightest of key and tenant, beside what others had to say."""
    stage, client = Stage(), Client()
    mine = allowance(
        Limits(requests_per_minute=60, tokens_per_minute=500), Limits(requests_per_minute=600, tokens_per_minute=400)
    )
    stage.ask(mine, client)

    stage.last.reply.whole(head(b"x-other: 1\r\n"), b"all", Usage(1, 2))

    assert client.extra.decode().split("\r\n") == [
        "x-other: 1",
        "x-ratelimit-limit-requests: 60",
        "x-ratelimit-remaining-requests: 59",
        "x-ratelimit-reset-requests: 1s",
        "x-ratelimit-limit-tokens: 400",
        f"x-ratelimit-remaining-tokens: {400 - ESTIMATE}",
        "x-ratelimit-reset-tokens: 16s",
        "",
    ]


def test_a_head_that_others_are_given_too_stays_as_it_is() -> None:
    stage = Stage()
    shared = head()
    shared.cache = b"coalesced"
    clients = [stage.ask(EVERYTHING), stage.ask(EVERYTHING)]

    for call in stage.inner.calls:
        call.reply.head(shared)

    assert shared.extra == b""
    assert [client.extra.count(b"limit-requests") for client in clients] == [1, 1]


def test_a_refusal_tells_how_the_limits_stand() -> None:
    stage = Stage()
    mine = allowance(Limits(requests_per_minute=2, concurrent_requests=1))
    stage.ask(mine)

    error = stage.ask(mine).error

    assert isinstance(error, RateLimited)
    assert b"x-ratelimit-remaining-requests: 1\r\n" in error.extra


def test_limits_that_have_no_headers_add_none() -> None:
    stage, client = Stage(), Client()
    stage.ask(allowance(Limits(concurrent_requests=1)), client)

    stage.last.reply.whole(head(), b"all", None)

    assert client.extra == b""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0s"), (1, "1s"), (59, "59s"), (60, "1m0s"), (360, "6m0s"), (7205, "2h0m5s")]
)
def test_times_are_told_as_openai_does(seconds: int, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.parametrize("end", ENDS)
def test_the_truth_is_settled_however_a_request_ends(end: str) -> None:
    """And what was an estimate is given back."""
    stage = Stage()
    tokens, act = ENDS[end]
    call = stage.start(EVERYTHING, Client(), stream="stream" in end or "head" in end)
    assert stage.left(EVERYTHING, Kind.CONCURRENT) == 2
    assert stage.left(EVERYTHING, Kind.TOKENS) == 6000 - ESTIMATE

    act(stage.last, call)

    assert stage.left(EVERYTHING, Kind.CONCURRENT) == 3
    assert stage.left(EVERYTHING, Kind.TOKENS) == 6000 - tokens
    assert stage.left(EVERYTHING, Kind.MONTH_TOKENS) == 100_000 - tokens
    assert stage.left(EVERYTHING, Kind.REQUESTS) == 59
    assert stage.left(EVERYTHING, Kind.BYTES) == 6000 - len(BODY)


def test_an_answer_within_start_is_settled_too() -> None:
    stage = Stage()
    stage.inner.at_start = lambda call: call.reply.whole(head(), b"all", Usage(1, 2))

    client = stage.ask(EVERYTHING)

    assert client.said == ["whole"]
    assert stage.left(EVERYTHING, Kind.CONCURRENT) == 3
    assert stage.left(EVERYTHING, Kind.TOKENS) == 5997


def test_a_client_that_leaves_within_start_ends_the_call() -> None:
    stage, client = Stage(), Client()
    stage.inner.at_start = lambda node: node.reply.head(head())
    client.on_head = lambda: run_of(stage.last).cancel()

    stage.start(EVERYTHING, client)

    assert stage.last.heard == ["cancel"]
    assert stage.left(EVERYTHING, Kind.CONCURRENT) == 3


def test_back_pressure_reaches_the_node() -> None:
    stage = Stage()
    call = stage.start(EVERYTHING, Client())

    call.pause()
    call.resume()

    assert stage.last.heard == ["pause", "resume"]


def test_money_is_what_the_tokens_cost() -> None:
    stage = Stage()
    stage.ask(EVERYTHING)
    stage.last.reply.whole(head(), b"all", Usage(10, 20))

    assert stage.left(EVERYTHING, Kind.MONTH_MONEY) == pytest.approx(1.0 - (10 * 1.0 + 20 * 2.0) / 1e6)


def test_a_hundred_requests_at_once_do_not_overspend_a_budget() -> None:
    """What they might take is set aside, so the last one that fits is the last."""
    stage = Stage()
    mine = allowance(Limits(tokens_per_month=1000))

    clients = [stage.ask(mine) for _ in range(100)]

    assert sum(not client.said for client in clients) == 1000 // ESTIMATE


def test_budgets_begin_anew_with_the_month() -> None:
    stage = Stage()
    mine = allowance(Limits(tokens_per_month=ESTIMATE))
    stage.ask(mine)
    error = stage.ask(mine).error
    assert isinstance(error, BudgetSpent)

    stage.clock.now += error.retry_after_s + 1.0

    assert stage.ask(mine).said == []
    stage.inner.calls[0].reply.end(Usage(10, 20))
    assert stage.left(mine, Kind.MONTH_TOKENS) <= ESTIMATE


async def test_a_budget_goes_on_from_what_the_ledger_has() -> None:
    stage = Stage()
    mine = allowance(Limits(tokens_per_month=1000))
    month = month_of(stage.clock.wall_s())
    await stage.limited.seed([Spent("acme", "", 950, 0.0)], month=month)
    await stage.limited.seed([Spent("acme", "", 0, 0.0)], month=month)
    await stage.limited.seed([Spent("acme", "", 5000, 0.0)], month=month - 1)

    error = stage.ask(mine).error

    assert isinstance(error, BudgetSpent)
    assert "has 50 left" in error.message


def test_new_limits_count_what_was_taken_under_the_old() -> None:
    stage = Stage()
    old, new = allowance(Limits(requests_per_minute=10)), allowance(Limits(requests_per_minute=4))
    for _ in range(3):
        stage.ask(old)

    clients = [stage.ask(new) for _ in range(2)]

    assert [client.said for client in clients] == [[], ["fail"]]


def test_keys_of_a_tenant_share_its_limits_and_not_their_own() -> None:
    stage = Stage()
    tenant, key = Limits(requests_per_minute=3), Limits(requests_per_minute=2)

    said = [bool(stage.ask(allowance(tenant, key, key_id=name)).said) for name in ("k1", "k1", "k1", "k2", "k2")]

    assert said == [False, False, True, False, True]


def test_what_has_drained_is_forgotten() -> None:
    """But not what runs, however long it does."""
    stage = Stage()
    tenant = Limits(requests_per_minute=90, concurrent_requests=9)
    for number in range(9):
        stage.ask(allowance(tenant, Limits(requests_per_minute=5), key_id=f"k{number}"))
    assert stage.counts.owners == 10

    stage.clock.now += 61.0
    stage.counts.sweep()

    assert stage.counts.owners == 1
    assert isinstance(stage.ask(allowance(tenant)).error, RateLimited)
    for call in stage.inner.calls:
        call.reply.whole(head(), b"all", None)
    stage.counts.sweep()
    assert stage.counts.owners == 0


# with others


@asynccontextmanager
async def gateways(count: int, **store: float) -> AsyncIterator[tuple[MemoryLimits, list[Stage]]]:
    """Some that share a count; at the end nothing is left over of theirs."""
    clock = Clock()
    shared = MemoryLimits(clock=clock, wall_s=clock.wall_s, gateways=count, **store)
    stages = [Stage(shared=shared, clock=clock) for _ in range(count)]
    for number, stage in enumerate(stages):
        stage.asked = number * 1000  # ids are unique among gateways
    yield shared, stages


async def turns() -> None:
    """Let the store be asked and answer."""
    for _ in range(12):
        await asyncio.sleep(0)


@asynccontextmanager
async def kept_up(stage: Stage) -> AsyncIterator[None]:
    """The stage with its background work."""
    task = asyncio.create_task(stage.limited.run())
    await turns()
    yield
    task.cancel()
    await asyncio.wait([task])


async def test_gateways_that_share_a_count_let_through_one_limit() -> None:
    async with gateways(3) as (_, stages):
        clients = [stage.ask(allowance(Limits(requests_per_minute=4))) for stage in stages for _ in range(3)]
        await turns()

        assert sum(not client.said for client in clients) == 4
        assert sum(stage.limited.refused for stage in stages) == 5


@pytest.mark.parametrize("end", ENDS)
async def test_the_truth_reaches_the_shared_count_however_a_request_ends(end: str) -> None:
    async with gateways(1) as (shared, (stage,)):
        client = Client()
        call = stage.start(EVERYTHING, client, stream="stream" in end or "head" in end)
        await turns()
        assert len(shared.places) == 1

        tokens, act = ENDS[end]
        act(stage.last, call)
        await turns()

        verdict = await shared.take(bounds_of(EVERYTHING), "look", amounts_of(tokens=0, size_bytes=0, money=0.0))
        assert remaining(verdict, Kind.TOKENS) == 6000 - tokens
        assert remaining(verdict, Kind.MONTH_TOKENS) == 100_000 - tokens
        assert list(shared.places) == ["look"]
        assert (stage.limited.unsettled, stage.limited.lost) == (0, 0)


async def test_a_client_that_leaves_while_the_store_is_asked_takes_nothing() -> None:
    async with gateways(1) as (shared, (stage,)):
        client = Client()
        call = stage.start(EVERYTHING, client)
        call.pause()

        call.cancel()
        await turns()

        assert (stage.inner.calls, client.said, shared.places) == ([], [], {})


async def test_a_client_that_is_slow_while_the_store_is_asked_pauses_the_node() -> None:
    async with gateways(1) as (_, (stage,)):
        call = stage.start(EVERYTHING, Client())
        call.pause()
        await turns()

        assert stage.last.heard == ["pause"]
        stage.last.reply.whole(head(), b"all", None)
        await turns()


async def test_without_the_store_each_gateway_lets_through_its_share() -> None:
    """And the store is not waited for by anybody."""
    async with gateways(4) as (shared, stages):
        for stage in stages:
            async with kept_up(stage):
                pass
        shared.is_away = True

        clients = [stage.ask(allowance(Limits(requests_per_minute=8))) for stage in stages for _ in range(5)]
        await turns()

        assert sum(not client.said for client in clients) == 8
        assert all(client.error is None or isinstance(client.error, RateLimited) for client in clients)
        assert [stage.limited.alone for stage in stages] == [5, 5, 5, 5]


async def test_who_never_heard_of_other_gateways_takes_the_limit_for_its_own() -> None:
    async with gateways(1) as (shared, (stage,)):
        shared.is_away = True

        clients = [stage.ask(allowance(Limits(requests_per_minute=8))) for _ in range(9)]
        await turns()

        assert sum(not client.said for client in clients) == 8


async def test_a_budget_that_nobody_can_look_up_stays_shut() -> None:
    async with gateways(2) as (shared, (stage, _)):
        shared.is_away = True

        client = stage.ask(EVERYTHING)
        await turns()

        assert isinstance(client.error, StoreUnavailable)
        assert "could not be looked up" in client.error.message


async def test_without_the_store_each_gateway_spends_its_share_of_what_was_left() -> None:
    async with gateways(2) as (shared, (stage, _)):
        mine = allowance(Limits(tokens_per_month=10 * ESTIMATE))
        async with kept_up(stage):
            for _ in range(2):
                stage.ask(mine)
                await turns()
        shared.is_away = True

        clients = [stage.ask(mine) for _ in range(9)]
        await turns()

        assert sum(not client.said for client in clients) == 4
        assert isinstance(clients[-1].error, BudgetSpent)


async def test_what_was_spent_without_the_store_is_told_when_it_is_back() -> None:
    async with gateways(1) as (shared, (stage,)):
        mine = allowance(Limits(tokens_per_month=1000))
        async with kept_up(stage):
            stage.ask(mine)
            await turns()
        first = stage.last
        shared.is_away = True
        stage.ask(mine)
        await turns()
        first.reply.whole(head(), b"all", Usage(10, 20))
        stage.last.reply.whole(head(), b"all", Usage(100, 200))
        await turns()
        assert stage.limited.unsettled == 2

        shared.is_away = False
        client = stage.ask(mine)
        await turns()

        assert client.said == []
        assert stage.limited.unsettled == 0
        verdict = await shared.take(bounds_of(mine), "look", (0, 0, 0, 0, 0, 0.0))
        assert remaining(verdict, Kind.MONTH_TOKENS) == 1000 - 30 - 300 - ESTIMATE
        stage.last.reply.whole(head(), b"all", Usage(0, 0))
        await turns()


async def test_answers_that_were_lost_on_the_way_count_once() -> None:
    """The store did what it was asked, and nobody heard: neither is charged twice nor a place left behind."""
    async with gateways(1) as (shared, (stage,)):
        async with kept_up(stage):
            await stage.limited.seed([], month=month_of(stage.clock.wall_s()))
        shared.loses_answers = True
        stage.ask(EVERYTHING)
        await turns()
        assert len(shared.places) == 1
        shared.loses_answers = False

        stage.last.reply.whole(head(), b"all", Usage(100, 200))
        async with kept_up(stage):
            await turns()

        verdict = await shared.take(bounds_of(EVERYTHING), "look", (0, 0, 0, 0, 0, 0.0))
        assert remaining(verdict, Kind.MONTH_TOKENS) == 100_000 - 300
        assert list(shared.places) == ["look"]


async def test_places_are_renewed_as_long_as_requests_run() -> None:
    async with gateways(1) as (shared, (stage,)):
        stage.ask(EVERYTHING)
        await turns()
        for _ in range(4):
            stage.clock.now += 20.0
            async with kept_up(stage):
                pass

        assert list(shared.places) == ["r1"]
        stage.last.reply.whole(head(), b"all", None)
        await turns()
        assert shared.places == {}


async def test_what_ended_last_is_settled_before_the_gateway_stops() -> None:
    async with gateways(1) as (shared, (stage,)):
        async with kept_up(stage):
            stage.ask(EVERYTHING)
            await turns()
            stage.last.reply.whole(head(), b"all", None)

        assert shared.places == {}


async def test_settlements_for_a_store_that_stays_away_are_bounded() -> None:
    async with gateways(1) as (shared, (stage,)):
        mine = allowance(Limits(concurrent_requests=1_000_000))
        shared.is_away = True
        stage.inner.at_start = lambda call: call.reply.whole(head(), b"all", None)
        for _ in range(MAX_UNSETTLED + 5):
            stage.ask(mine)
            await asyncio.sleep(0)
        await turns()

        assert (stage.limited.unsettled, stage.limited.lost) == (MAX_UNSETTLED, 5)


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
async def test_nothing_is_left_over_whatever_happens(chance: random.Random) -> None:
    """Gateways whose store comes and goes: at the end no place is held and the sums are those of the answers."""
    async with gateways(2) as (shared, stages):
        spent = 0
        for stage in stages:
            async with kept_up(stage):
                await stage.limited.seed([], month=month_of(stage.clock.wall_s()))
        calls: list[Call] = []
        for _ in range(30):
            stage = chance.choice(stages)
            shared.is_away = chance.random() < 0.3
            calls.append(stage.start(EVERYTHING, Client()))
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            for other in stages:
                for node in other.inner.calls[:]:
                    if chance.random() < 0.5:
                        other.inner.calls.remove(node)
                        tokens = chance.randrange(50)
                        spent += tokens
                        node.reply.whole(head(), b"all", Usage(tokens, 0))
            await turns()
        for stage in stages:
            for node in stage.inner.calls:
                node.reply.whole(head(), b"all", Usage(0, 0))
        await turns()
        shared.is_away = False
        for stage in stages:
            async with kept_up(stage):
                await turns()

        assert shared.places == {}
        assert [stage.left(EVERYTHING, Kind.CONCURRENT) for stage in stages] == [3, 3]
        verdict = await shared.take(bounds_of(EVERYTHING), "look", (0, 0, 0, 0, 0, 0.0))
        assert remaining(verdict, Kind.MONTH_TOKENS) == 100_000 - spent


class Ways(RuleBasedStateMachine):
    """One gateway, any order of events: its counts are always those of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage()
        self.running: list[tuple[NodeCall, Call]] = []
        self.clients: list[Client] = []

    @rule(stream=st.booleans())
    def ask(self, stream: bool) -> None:
        client = Client()
        before = len(self.stage.inner.calls)
        call = self.stage.start(EVERYTHING, client, stream=stream)
        self.clients.append(client)
        if len(self.stage.inner.calls) > before:
            self.running.append((self.stage.last, call))

    @precondition(lambda self: self.running)
    @rule(end=st.sampled_from(sorted(ENDS)), which=st.integers(0, 9))
    def end(self, end: str, which: int) -> None:
        node, call = self.running.pop(which % len(self.running))
        ENDS[end][1](node, call)

    @rule(by_s=st.floats(0, 90))
    def wait(self, by_s: float) -> None:
        self.stage.clock.now += by_s

    @rule()
    def sweep(self) -> None:
        self.stage.counts.sweep()

    @invariant()
    def what_runs_has_its_place(self) -> None:
        assert self.stage.left(EVERYTHING, Kind.CONCURRENT) == 3 - len(self.running)

    @invariant()
    def nobody_is_told_twice(self) -> None:
        for client in self.clients:
            assert sum(word in {"end", "whole", "fail"} for word in client.said) <= 1


TestWays = Ways.TestCase
TestWays.settings = settings(max_examples=60, deadline=None)
