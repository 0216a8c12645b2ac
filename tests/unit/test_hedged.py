"""What one node is slow to answer a second one is asked: the first answer counts, and it happens seldom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sutazai.core.errors import NodeUnreachable, SutazaiError
from sutazai.core.request import Endpoint, Head, Request, Usage
from sutazai.gateway.hedged import Hedged
from sutazai.policy.hedging import (
    BUDGET_RATIO,
    MAX_SAVED,
    MINIMUM_SAMPLES,
    WINDOW,
    HedgeBudget,
    HedgeRules,
    RecentTimes,
)
from sutazai.ports.inference import Call, Reply
from sutazai.testing.memory_pool import Clock

RULES = HedgeRules(embeddings=True, after_quantile=0.95)
USUAL_S = 1.0


@dataclass(slots=True, eq=False)
class Asked:
    """One call to a node."""

    request: Request
    reply: Reply
    node: str
    over: bool = False
    cancelled: bool = False
    paused: bool = False
    headed: bool = False

    def cancel(self) -> None:
        self.cancelled = self.cancelled or not self.over
        self.over = True

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def head(self) -> None:
        if not self.over and not self.headed:
            self.headed = True
            self.reply.head(Head(200, b"", None, self.node, ""))

    def end(self) -> None:
        self.head()
        if not self.over:
            self.reply.chunk(self.node.encode())
        if not self.over:
            self.over = True
            self.reply.end(Usage(1))

    def whole(self) -> None:
        if not self.over and not self.headed:
            self.over = True
            self.reply.whole(Head(200, b"", 1, self.node, ""), self.node.encode(), Usage(1))

    def fail(self) -> SutazaiError:
        error = NodeUnreachable(f"{self.node} is gone.", node=self.node)
        if not self.over:
            self.over = True
            self.reply.fail(error)
        return error


@dataclass(slots=True, eq=False)
class Caller:
    """A reply that keeps what it hears, and complains of what it must not."""

    call: Call | None = None
    left: bool = False
    heads: list[str] = field(default_factory=list)
    body: bytes = b""
    error: SutazaiError | None = None
    ends: int = 0

    def head(self, head: Head) -> None:
        self._hears()
        self.heads.append(head.node)

    def chunk(self, data: bytes) -> None:
        self._hears()
        self.body += data

    def end(self, _usage: Usage | None) -> None:
        self._hears()
        self.ends += 1

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        self.head(head)
        self.chunk(body)
        self.end(usage)

    def fail(self, error: SutazaiError) -> None:
        self._hears()
        self.error = error
        self.ends += 1

    def leave(self) -> None:
        assert self.call is not None
        self.left = True
        self.call.cancel()

    def _hears(self) -> None:
        assert not self.left, "It left and was told something."
        assert not self.ends, "It was told something after the end."


@dataclass(slots=True)
class Pool:
    """A stage with two nodes: `first` gets all requests, `second` what is asked twice."""

    rules: HedgeRules = RULES
    clock: Clock = field(default_factory=Clock)
    has_room: bool = True
    first_waits: bool = False
    asked: list[Asked] = field(default_factory=list)
    callers: list[Caller] = field(default_factory=list)
    stage: Hedged = field(init=False)

    def __post_init__(self) -> None:
        self.stage = Hedged(
            self,
            self._spare,
            self.rules,
            node_of=lambda _: "" if self.first_waits else "first",
            later=self.clock.later,
            clock=self.clock,
        )

    def start(self, request: Request, reply: Reply) -> Call:
        return self._begin(request, reply, "first")

    def ask(self, endpoint: Endpoint = Endpoint.OPENAI_EMBEDDING) -> Caller:
        """One more caller."""
        caller = Caller()
        self.callers.append(caller)
        request = Request(f"r{len(self.callers)}", endpoint, "m", False, b"{}", "t", "", self.clock.now)
        caller.call = self.stage.start(request, caller)
        return caller

    def learn(self, count: int = MINIMUM_SAMPLES) -> None:
        """Answer so many requests in the usual time."""
        for _ in range(count):
            self.ask()
            self.clock.advance(USUAL_S)
            self.asked[-1].whole()
        self.asked.clear()
        self.callers.clear()

    def _begin(self, request: Request, reply: Reply, node: str) -> Asked:
        asked = Asked(request, reply, node)
        self.asked.append(asked)
        return asked

    def _spare(self, request: Request, reply: Reply) -> Call | None:
        assert request.avoid == "first"
        return self._begin(request, reply, "second") if self.has_room else None


def _slow() -> Pool:
    """A request that takes longer than usual, so that it was asked twice."""
    pool = Pool()
    pool.learn()
    pool.ask()
    pool.clock.advance(USUAL_S + 0.01)
    return pool


def test_a_slow_request_is_asked_a_second_time_at_another_node() -> None:
    pool = _slow()

    assert [asked.node for asked in pool.asked] == ["first", "second"]
    assert pool.asked[1].request.id == "r1.h1"
    assert pool.stage.hedged == 1


@pytest.mark.parametrize(("winner", "loser"), [(0, 1), (1, 0)])
def test_the_first_answer_counts_and_the_other_call_is_cancelled(winner: int, loser: int) -> None:
    pool = _slow()

    pool.asked[winner].head()
    ended_at_once = pool.asked[loser].cancelled
    pool.asked[winner].end()

    assert ended_at_once
    assert pool.callers[0].heads == [pool.asked[winner].node]
    assert pool.callers[0].body == pool.asked[winner].node.encode()
    assert pool.stage.won == winner


@pytest.mark.parametrize(("loser", "winner"), [(0, 1), (1, 0)])
def test_an_error_of_one_waits_for_the_other(loser: int, winner: int) -> None:
    pool = _slow()
    pool.asked[loser].fail()
    ends = pool.callers[0].ends

    pool.asked[winner].whole()

    assert ends == 0
    assert pool.callers[0].heads == [pool.asked[winner].node]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_errors_that_of_the_first_node_is_told(order: tuple[int, int]) -> None:
    pool = _slow()

    errors = {turn: pool.asked[turn].fail() for turn in order}

    assert pool.callers[0].error is errors[0]


def test_an_answer_that_breaks_off_fails_with_its_own_error() -> None:
    pool = _slow()
    pool.asked[0].fail()
    pool.asked[1].head()

    error = pool.asked[1].fail()

    assert pool.callers[0].error is error


def test_an_answer_in_the_usual_time_is_asked_once() -> None:
    pool = Pool()
    pool.learn()
    pool.ask()
    pool.clock.advance(USUAL_S - 0.01)
    pool.asked[0].head()

    pool.clock.advance(10)

    assert len(pool.asked) == 1
    assert not pool.clock.pending


def test_too_few_times_say_nothing_about_a_tail() -> None:
    pool = Pool()
    pool.learn(MINIMUM_SAMPLES - 1)
    pool.ask()

    pool.clock.advance(100)

    assert len(pool.asked) == 1


def test_what_waits_in_line_is_not_asked_twice() -> None:
    pool = Pool(first_waits=True)
    pool.learn()
    pool.ask()

    pool.clock.advance(100)

    assert len(pool.asked) == 1


def test_without_a_node_that_has_room_nothing_is_asked_twice_and_nothing_is_counted() -> None:
    pool = Pool(has_room=False)
    pool.learn()
    caller = pool.ask()
    pool.clock.advance(USUAL_S + 0.01)

    pool.asked[0].whole()

    assert caller.ends == 1
    assert pool.stage.hedged == 0
    assert pool.stage.budget.has_room


def test_no_more_than_one_in_twenty_is_asked_twice() -> None:
    pool = Pool()
    pool.learn()
    for _ in range(3):
        pool.ask()

    pool.clock.advance(USUAL_S + 0.01)

    assert pool.stage.hedged == 1
    assert pool.stage.denied == 2


def test_one_who_leaves_ends_both_calls() -> None:
    pool = _slow()

    pool.callers[0].leave()

    assert [asked.cancelled for asked in pool.asked] == [True, True]


def test_a_pause_reaches_both_calls_and_one_that_comes_later() -> None:
    pool = Pool()
    pool.learn()
    call = pool.ask().call
    assert call is not None
    call.pause()
    pool.clock.advance(USUAL_S + 0.01)
    paused = [asked.paused for asked in pool.asked]

    call.resume()

    assert paused == [True, True]
    assert [asked.paused for asked in pool.asked] == [False, False]


@pytest.mark.parametrize("endpoint", [Endpoint.OPENAI_CHAT, Endpoint.OLLAMA_GENERATE])
def test_only_embeddings_are_watched(endpoint: Endpoint) -> None:
    pool = Pool()

    caller = pool.ask(endpoint)

    assert pool.asked[0].reply is caller
    assert caller.call is pool.asked[0]


def test_switched_off_it_is_not_there() -> None:
    pool = Pool()
    pool.stage.adopt(HedgeRules(embeddings=False, after_quantile=0.95))

    caller = pool.ask()

    assert pool.asked[0].reply is caller


class AnyOrder(RuleBasedStateMachine):
    """One end for everybody, whoever answers, fails or leaves; calls without a caller are over."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()
        self.pool.learn()
        self.begun = MINIMUM_SAMPLES

    @rule()
    def ask(self) -> None:
        self.begun += 1
        self.pool.ask()

    @precondition(lambda self: any(not asked.over for asked in self.pool.asked))
    @rule(data=st.data(), what=st.sampled_from([Asked.head, Asked.end, Asked.whole, Asked.fail]))
    def act(self, data: st.DataObject, what: Callable[[Asked], object]) -> None:
        what(data.draw(st.sampled_from([asked for asked in self.pool.asked if not asked.over])))

    @precondition(lambda self: any(not caller.ends and not caller.left for caller in self.pool.callers))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        here = [caller for caller in self.pool.callers if not caller.ends and not caller.left]
        data.draw(st.sampled_from(here)).leave()

    @rule(by_s=st.floats(0, 2))
    def wait(self, by_s: float) -> None:
        self.pool.clock.advance(by_s)

    @rule(is_so=st.booleans())
    def room(self, is_so: bool) -> None:
        self.pool.has_room = is_so

    @invariant()
    def an_answer_is_of_one_node(self) -> None:
        for caller in self.pool.callers:
            assert len(caller.heads) <= 1
            assert caller.body in {b"", *(node.encode() for node in caller.heads)}

    @invariant()
    def few_are_asked_twice(self) -> None:
        assert self.pool.stage.hedged <= BUDGET_RATIO * self.begun

    def teardown(self) -> None:
        for asked in list(self.pool.asked):
            asked.end()

        assert all(caller.ends == (not caller.left) for caller in self.pool.callers)
        assert all(asked.over for asked in self.pool.asked)
        assert self.pool.clock.pending == 0


TestAnyOrder = AnyOrder.TestCase


@given(st.lists(st.integers(0, 100), min_size=MINIMUM_SAMPLES, max_size=60), st.integers(1, 12), st.floats(0.5, 0.99))
def test_a_quantile_is_that_of_the_latest_times(times: list[int], turns: int, share: float) -> None:
    recent = RecentTimes()
    for time_s in times[::-1] + times * turns:
        recent.note(time_s)

    latest = sorted((times[::-1] + times * turns)[-WINDOW:])
    found = recent.quantile(share)

    assert found == latest[min(int(len(latest) * share), len(latest) - 1)]


@given(st.lists(st.booleans(), max_size=300))
def test_the_budget_holds_over_any_time(wants: list[bool]) -> None:
    budget, taken = HedgeBudget(), 0

    for count, wanted in enumerate(wants, start=1):
        budget.note_request()
        if wanted and budget.has_room:
            budget.take()
            taken += 1

        assert taken <= BUDGET_RATIO * count + 1e-9


def test_a_quiet_time_saves_up_only_a_few() -> None:
    budget = HedgeBudget()
    for _ in range(10_000):
        budget.note_request()
    taken = 0

    while budget.has_room:
        budget.take()
        taken += 1

    assert taken == MAX_SAVED
