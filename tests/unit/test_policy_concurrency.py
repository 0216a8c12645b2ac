"""Finding out how many requests a node can work on, against servers whose number is known."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sutazai.policy.concurrency import FIRST, LEAST, MOST, ConcurrencyLimit


@dataclass
class Queue:
    """A server in virtual time that works on so many requests at once and lets the others wait, without end."""

    capacity: int
    service_s: float
    first_s: float | None
    """From the begin of the work to the first token; None = the answer comes whole."""
    random: random.Random
    now: float = 0.0
    in_flight: int = 0
    done: int = 0
    slots_seen: list[int] = field(default_factory=list)
    _running: int = 0
    _waiting: deque[float] = field(default_factory=deque)
    _events: list[tuple[float, int, bool, float]] = field(default_factory=list)
    _count: int = 0

    def run(self, limit: ConcurrencyLimit, requests: int, *, demand: int = 10_000) -> Sequence[int]:
        """Serve so many requests, as many at once as the limit and the demand allow; the limits after each."""
        until = self.done + requests
        while self.done < until:
            while self.in_flight < min(limit.slots, demand):
                self._send(limit)
            self.now, _, is_end, sent_at = heapq.heappop(self._events)
            if not is_end or self.first_s is None:
                limit.answered(self.now - sent_at)
            if is_end:
                self._end()
                self.slots_seen.append(limit.slots)
        return self.slots_seen[-requests:]

    def _send(self, limit: ConcurrencyLimit) -> None:
        self.in_flight += 1
        if self.in_flight >= limit.slots:
            limit.was_reached = True
        if self._running < self.capacity:
            self._begin(self.now)
        else:
            self._waiting.append(self.now)

    def _begin(self, sent_at: float) -> None:
        self._running += 1
        ends_at = self.now + self.service_s * self.random.uniform(0.7, 1.3)
        if self.first_s is not None:
            self._push(self.now + self.first_s * self.random.uniform(0.7, 1.3), False, sent_at)
        self._push(ends_at, True, sent_at)

    def _end(self) -> None:
        self.done += 1
        self.in_flight -= 1
        self._running -= 1
        if self._waiting:
            self._begin(self._waiting.popleft())

    def _push(self, at: float, is_end: bool, sent_at: float) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, is_end, sent_at))


def mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


@settings(max_examples=15, deadline=None)
@given(
    capacity=st.integers(1, 128),
    first_s=st.sampled_from([0.2, 1.0, None]),
    seed=st.integers(0, 10_000),
)
def test_it_comes_near_the_true_capacity(capacity: int, first_s: float | None, seed: int) -> None:
    """Hardly below, so that no slot is idle, and not far above, so that little waits where nothing can be reordered."""
    queue = Queue(capacity, 5.0, first_s, random.Random(seed))
    limit = ConcurrencyLimit()
    queue.run(limit, 40 * capacity + 1000)
    found = mean(queue.run(limit, 40 * capacity + 1000))

    assert 0.9 * capacity - 1 <= found <= 1.6 * capacity + 4


@pytest.mark.parametrize(("before", "after"), [(40, 10), (10, 40)])
def test_it_follows_a_server_that_changes(before: int, after: int) -> None:
    queue = Queue(before, 5.0, 0.2, random.Random(1))
    limit = ConcurrencyLimit()
    queue.run(limit, 4000)
    queue.capacity = after
    queue.run(limit, 8000)

    assert 0.9 * after - 1 <= mean(queue.run(limit, 4000)) <= 1.6 * after + 4


def test_almost_nothing_is_lost_by_measuring() -> None:
    """Halving the limit now and then leaves slots idle: less than a tenth of the time."""
    queue = Queue(8, 5.0, 0.2, random.Random(1))
    limit = ConcurrencyLimit()
    queue.run(limit, 2000)
    began, done = queue.now, queue.done
    queue.run(limit, 8000)

    assert (queue.done - done) / (queue.now - began) > 0.9 * 8 / 5.0


@given(st.lists(st.one_of(st.floats(0, 1e6), st.none(), st.booleans()), max_size=400))
def test_it_stays_within_its_bounds_whatever_it_hears(heard: list[float | bool | None]) -> None:
    """Times, refusals (None) and whether the limit was reached."""
    limit, now = ConcurrencyLimit(), 0.0
    for word in heard:
        now += 0.5
        if word is None:
            limit.refused(now)
        elif isinstance(word, bool):
            limit.was_reached = word
        else:
            limit.answered(word)

        assert LEAST <= limit.slots <= MOST


def test_it_grows_only_where_it_was_reached() -> None:
    queue = Queue(100, 5.0, 0.2, random.Random(1))
    limit = ConcurrencyLimit()
    queue.run(limit, 3000, demand=3)

    assert limit.slots <= 4


def test_it_begins_with_four() -> None:
    assert ConcurrencyLimit().slots == FIRST == 4


def test_a_refusal_takes_a_quarter_off_and_those_that_come_with_it_nothing_more() -> None:
    queue = Queue(100, 5.0, 0.2, random.Random(1))
    limit = ConcurrencyLimit()
    queue.run(limit, 4000)
    before = limit.slots
    for _ in range(20):
        limit.refused(queue.now)
    once = limit.slots
    limit.refused(queue.now + 1.0)

    assert once == pytest.approx(0.75 * before, abs=1)
    assert limit.slots == pytest.approx(0.75 * once, abs=1)


def test_refusals_alone_leave_one() -> None:
    limit = ConcurrencyLimit()
    for number in range(100):
        limit.refused(number * 10.0)

    assert limit.slots == 1
