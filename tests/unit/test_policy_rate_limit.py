"""The arithmetic of limits: the bound that they promise, and honest words about what is left and when to come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.identity import Allowance, Limits
from sutazai.policy.rate_limit import (
    Bound,
    Kind,
    Standing,
    Verdict,
    amounts_of,
    bounds_of,
    drained,
    has_room,
    month_end_s,
    month_of,
)

UNLIMITED = Limits()


def allowance(tenant: Limits = UNLIMITED, key: Limits = UNLIMITED) -> Allowance:
    return Allowance(tenant="acme", key_id="k1", of_tenant=tenant, of_key=key)


@dataclass(slots=True)
class Bucket:
    """One limit on tokens and its level: what a store does, in its shortest form."""

    limit: int
    burst_s: float
    level: float = 0.0
    at: float = 0.0

    @property
    def bound(self) -> Bound:
        return bounds_of(allowance(Limits(tokens_per_minute=self.limit, burst_s=self.burst_s))).all[0]

    def ask(self, amount: int, now: float) -> Standing:
        """Take it where there is room; else take nothing."""
        level = drained(self.level, now - self.at, self.bound.per_s)
        self.at = min(self.at, now)
        admitted = has_room(self.bound, level, amount)
        if admitted:
            self.level, self.at = level + amount, now
        bounds = bounds_of(allowance(Limits(tokens_per_minute=self.limit, burst_s=self.burst_s)))
        amounts = amounts_of(tokens=amount, size_bytes=0, money=0.0)
        verdict = Verdict(bounds, [level], amounts, admitted=admitted, month_left_s=0.0)
        (standing,) = verdict.standings()
        assert (standing.retry_after_s == 0.0) is admitted
        return standing


@st.composite
def buckets(draw: st.DrawFn) -> Bucket:
    return Bucket(draw(st.integers(1, 100_000)), draw(st.sampled_from([0.001, 1.0, 10.0, 59.9, 60.0])))


def visits(*, backwards: bool = False) -> st.SearchStrategy[list[tuple[float, int]]]:
    """Seconds since the visit before, and how much is asked for."""
    pause = st.floats(-50 if backwards else 0, 50) | st.just(0.0)
    return st.lists(st.tuples(pause, st.integers(1, 200_000) | st.integers(1, 20)), max_size=40)


@given(buckets(), visits())
def test_no_window_sees_more_than_the_burst_and_its_time(bucket: Bucket, asked: Sequence[tuple[float, int]]) -> None:
    """However it is asked. What is larger than the burst counts as the burst."""
    taken: list[tuple[float, int]] = []
    now = 0.0
    for pause_s, amount in asked:
        now += pause_s
        if not bucket.ask(amount, now).retry_after_s:
            taken.append((now, amount))

    for first, (begin, _) in enumerate(taken):
        for last, (end, _) in enumerate(taken[first:], first):
            amounts = [amount for _, amount in taken[first : last + 1]]
            most = max(bucket.bound.capacity, *amounts) + bucket.bound.per_s * (end - begin)
            assert sum(amounts) <= most * (1 + 1e-9) + 1e-3


@given(buckets(), visits(), st.integers(1, 200_000))
def test_who_comes_back_when_told_to_is_admitted_and_not_much_earlier(
    bucket: Bucket, before: Sequence[tuple[float, int]], amount: int
) -> None:
    now = 0.0
    for pause_s, taken in before:
        now += pause_s
        bucket.ask(taken, now)

    refused = bucket.ask(amount, now)

    if refused.retry_after_s:
        assert bucket.ask(amount, now + refused.retry_after_s * 0.99 - 1e-3).retry_after_s > 0.0
        assert bucket.ask(amount, now + refused.retry_after_s + 1e-6).retry_after_s == 0.0


@given(buckets(), visits())
def test_what_is_said_to_remain_can_be_taken_and_one_more_cannot(
    bucket: Bucket, asked: Sequence[tuple[float, int]]
) -> None:
    now = 0.0
    remaining = int(bucket.bound.capacity)
    for pause_s, amount in asked:
        now += pause_s
        remaining = int(bucket.ask(amount, now).remaining)

    if remaining + 1 <= bucket.bound.capacity:  # what is larger asks for an empty bucket instead
        assert bucket.ask(remaining + 1, now).retry_after_s > 0.0
    assert not remaining or bucket.ask(remaining, now).retry_after_s == 0.0


@given(buckets(), visits())
def test_after_the_reset_all_of_it_is_there(bucket: Bucket, asked: Sequence[tuple[float, int]]) -> None:
    now = reset_s = 0.0
    for pause_s, amount in asked:
        now += pause_s
        reset_s = bucket.ask(amount, now).reset_s

    level = drained(bucket.level, now + reset_s - bucket.at, bucket.bound.per_s)
    assert level == pytest.approx(0.0, abs=1e-3)


@given(buckets(), visits(backwards=True))
def test_a_clock_that_is_set_back_gives_nothing_and_blocks_nobody(
    bucket: Bucket, asked: Sequence[tuple[float, int]]
) -> None:
    """Steps back count for nothing, steps forward for what they are."""
    now = forward_s = 0.0
    taken: list[int] = []
    for step_s, amount in asked:
        now += step_s
        forward_s += max(0.0, step_s)
        if not bucket.ask(amount, now).retry_after_s:
            taken.append(amount)

    most = max(bucket.bound.capacity, *taken, 0) + bucket.bound.per_s * forward_s
    assert sum(taken) <= most * (1 + 1e-9) + 1e-3
    refused = bucket.ask(1, now)
    assert not refused.retry_after_s or bucket.ask(1, now + refused.retry_after_s + 1e-6).retry_after_s == 0.0


def test_a_limit_without_a_burst_lets_one_through_at_a_time() -> None:
    bucket = Bucket(60, burst_s=0.001)

    waits = [bucket.ask(1, now).retry_after_s for now in (0.0, 0.25, 1.0)]

    assert waits == [0.0, pytest.approx(0.75), 0.0]


@pytest.mark.parametrize("limit", [1, 3, 7, 60, 999])
def test_all_of_a_minute_may_be_taken_at_once(limit: int) -> None:
    """Thirds and sevenths add up."""
    bucket = Bucket(limit, burst_s=60.0)

    taken = [not bucket.ask(1, 5.0).retry_after_s for _ in range(limit + 1)]

    assert taken == [True] * limit + [False]


def test_a_part_of_a_limit_is_a_part_of_its_rate_burst_and_budget() -> None:
    limits = Limits(requests_per_minute=90, concurrent_requests=5, tokens_per_month=1000, burst_s=10.0)
    requests, places, budget = bounds_of(allowance(limits)).all

    parts = [requests.part(1 / 3, 0.0), places.part(1 / 3, 0.0), budget.part(1 / 3, 700.0), budget.part(1 / 3, 2000.0)]

    assert [part.capacity for part in parts] == [pytest.approx(5.0), 1.0, pytest.approx(800.0), 2000.0]
    assert [part.per_s for part in parts] == [pytest.approx(0.5), 0.0, 0.0, 0.0]
    assert [part.limit for part in parts] == [90, 5, 1000, 1000]


@given(st.integers(1, 20), st.integers(2, 9))
def test_all_gateways_parts_together_are_no_more_than_a_limit(limit: int, gateways: int) -> None:
    """But each has one place and one request, else it would have to refuse everybody."""
    limits = Limits(requests_per_minute=limit, concurrent_requests=limit, tokens_per_month=limit)

    for bound in bounds_of(allowance(limits)).all:
        together = bound.part(1 / gateways, 0.0).capacity * gateways
        assert together <= max(limit, gateways if bound.kind is not Kind.MONTH_TOKENS else 0) + 1e-9


def test_limits_of_the_tenant_come_before_those_of_the_key() -> None:
    bounds = bounds_of(allowance(Limits(tokens_per_minute=5, money_per_month=2.0), Limits(requests_per_minute=3)))

    assert [(bound.kind, bound.is_of_key, bound.limit) for bound in bounds.all] == [
        (Kind.TOKENS, False, 5),
        (Kind.MONTH_MONEY, False, 2.0),
        (Kind.REQUESTS, True, 3),
    ]
    assert (bounds.counts_tokens, bounds.counts_money, bounds.has_budget, bounds.is_settled) == (True,) * 4


def test_what_is_known_beforehand_needs_no_settling() -> None:
    bounds = bounds_of(allowance(Limits(requests_per_minute=3, bytes_per_minute=9)))

    assert (bounds.counts_tokens, bounds.counts_money, bounds.has_budget, bounds.is_settled) == (False,) * 4


def test_no_limits_are_no_bounds() -> None:
    assert bounds_of(allowance()).all == ()


@given(st.floats(0, 13e9))
def test_a_month_ends_where_the_next_begins(unix_s: float) -> None:
    then = datetime.fromtimestamp(unix_s, UTC)
    end_s = month_end_s(unix_s)

    assert month_of(unix_s) == then.year * 12 + then.month - 1
    assert 0 < end_s - unix_s <= 31 * 86400
    assert (month_of(end_s - 1e-3), month_of(end_s)) == (month_of(unix_s), month_of(unix_s) + 1)
