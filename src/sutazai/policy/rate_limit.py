"""
How much a tenant and its key may take: the arithmetic of limits, without a clock or a store.

Each limit is one number, its level. A limit per minute is a bucket with a hole: what is taken raises the level, time
lowers it at a steady rate, and there is room while it stays below the capacity, which is `burst_s` seconds' worth.
The level of what runs at once and of a month's budget falls by other events only; their rate is zero, and all else
is the same. Every store, in memory or shared, keeps levels and leaves the rest to this module.

Source: the generic cell rate algorithm (ITU-T I.371) in its continuous form. Its other form keeps the time at which
the bucket will be empty; that one breaks where the clock is set back, a level just does not fall meanwhile.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from sutazai.core.identity import Allowance, Limits

SLACK = 1e-6
"""Of a unit: sums of fractions are not exact."""
MINUTE_S = 60.0
PLACE_RETRY_S = 1.0
"""When to come back for a place that a running request holds: nobody knows how long that takes."""


class Kind(enum.IntEnum):
    """What is limited. The numbers are an order, known to the shared store's script."""

    REQUESTS = 0
    TOKENS = 1
    BYTES = 2
    CONCURRENT = 3
    MONTH_TOKENS = 4
    MONTH_MONEY = 5


RATES = (Kind.REQUESTS, Kind.TOKENS, Kind.BYTES)
BUDGETS = (Kind.MONTH_TOKENS, Kind.MONTH_MONEY)
SETTLED = (Kind.TOKENS, Kind.MONTH_TOKENS, Kind.MONTH_MONEY)
"""Taken as an estimate, and corrected when the truth is known."""


Amounts = tuple[float, float, float, float, float, float]
"""What one request takes, by `Kind`: before it ran an estimate, afterwards the truth."""


def amounts_of(*, tokens: int, size_bytes: int, money: float, places: int = 1) -> Amounts:
    """What a request takes of each limit; one that has ended takes no place."""
    return 1, tokens, size_bytes, places, tokens, money


class Bound:
    """One limit of one request."""

    __slots__ = ("capacity", "is_of_key", "kind", "limit", "per_s")

    def __init__(self, kind: Kind, *, is_of_key: bool, limit: float, capacity: float, per_s: float) -> None:
        self.kind = kind
        self.is_of_key = is_of_key
        """Else of the tenant."""
        self.limit = limit
        """As the settings have it."""
        self.capacity = capacity
        """The highest level."""
        self.per_s = per_s
        """How fast the level falls; 0.0 for all but rates."""

    def part(self, share: float, known: float) -> Bound:
        """
        What one of several gateways may let through when none knows of the others.

        Args:
            share: of it, in (0, 1].
            known: of a budget: what was spent when they last knew; the share is of the rest.
        """
        if self.kind in BUDGETS:
            capacity = known + max(0.0, self.limit - known) * share
        else:
            capacity = max(min(1.0, self.capacity), self.capacity * share)
        if self.kind is Kind.CONCURRENT:
            capacity = float(int(capacity))
        per_s = self.per_s * share
        return Bound(self.kind, is_of_key=self.is_of_key, limit=self.limit, capacity=capacity, per_s=per_s)


class Bounds:
    """All limits of one request: the tenant's, then the key's, each in the order of `Kind`."""

    __slots__ = ("all", "allowance", "counts_money", "counts_tokens", "has_budget", "is_settled", "requests", "tokens")

    def __init__(self, allowance: Allowance, bounds: Sequence[Bound]) -> None:
        self.allowance = allowance
        self.all = bounds
        kinds = {bound.kind for bound in bounds}
        self.requests = self._places_of(Kind.REQUESTS)
        """Which of `all` are these."""
        self.tokens = self._places_of(Kind.TOKENS)
        self.counts_tokens = not kinds.isdisjoint(SETTLED)
        """What a request will take has to be guessed."""
        self.counts_money = Kind.MONTH_MONEY in kinds
        self.has_budget = not kinds.isdisjoint(BUDGETS)
        self.is_settled = self.counts_tokens or Kind.CONCURRENT in kinds
        """The store must hear of the end of a request."""

    def _places_of(self, kind: Kind) -> tuple[int, ...]:
        return tuple(place for place, bound in enumerate(self.all) if bound.kind is kind)


def bounds_of(allowance: Allowance) -> Bounds:
    """The limits that are set, as bounds."""
    of_tenant, of_key = _bounds(allowance.of_tenant, is_of_key=False), _bounds(allowance.of_key, is_of_key=True)
    return Bounds(allowance, (*of_tenant, *of_key))


class Standing:
    """How one limit stands after a request asked."""

    __slots__ = ("bound", "remaining", "reset_s", "retry_after_s")

    def __init__(self, bound: Bound, remaining: float, reset_s: float, retry_after_s: float) -> None:
        self.bound = bound
        self.remaining = remaining
        """Never below zero. Fractions of a unit are there too."""
        self.reset_s = reset_s
        """Until all of it is there again; 0.0 for what is given back when requests end."""
        self.retry_after_s = retry_after_s
        """0.0 where there was room; else when there will be, if nobody takes any meanwhile."""

    def __repr__(self) -> str:
        owner = "key" if self.bound.is_of_key else "tenant"
        return f"Standing({owner}, {self.bound.kind.name}, {self.remaining=}, {self.reset_s=}, {self.retry_after_s=})"


class Verdict:
    """What all limits say to one request. Where one refuses, nothing was taken from any."""

    __slots__ = ("admitted", "amounts", "bounds", "levels", "month_left_s")

    def __init__(
        self, bounds: Bounds, levels: Sequence[float], amounts: Amounts, *, admitted: bool, month_left_s: float
    ) -> None:
        """
        Note what a store found.

        Args:
            levels: of `bounds.all`, before the request took anything.
            amounts: what it asked for, by `Kind`.
        """
        self.bounds = bounds
        self.levels = levels
        self.amounts = amounts
        self.admitted = admitted
        self.month_left_s = month_left_s

    def level(self, place: int) -> float:
        """The level of one bound after the request."""
        level = self.levels[place]
        return level + self.amounts[self.bounds.all[place].kind] if self.admitted else level

    def standings(self) -> Iterator[Standing]:
        """How each limit stands now, in the order of `bounds.all`."""
        for place, bound in enumerate(self.bounds.all):
            level = self.level(place)
            retry_after_s = 0.0 if self.admitted else self._retry_after_s(bound, level)
            yield Standing(bound, max(0.0, bound.capacity - level), self._reset_s(bound, level), retry_after_s)

    def _retry_after_s(self, bound: Bound, level: float) -> float:
        amount = self.amounts[bound.kind]
        if has_room(bound, level, amount):
            return 0.0
        if bound.per_s:
            return (level + min(amount, bound.capacity) - bound.capacity) / bound.per_s
        return self.month_left_s if bound.kind in BUDGETS else PLACE_RETRY_S

    def _reset_s(self, bound: Bound, level: float) -> float:
        if bound.per_s:
            return level / bound.per_s
        return self.month_left_s if bound.kind in BUDGETS else 0.0


def has_room(bound: Bound, level: float, amount: float) -> bool:
    """
    Whether so much more may be taken.

    A request that is larger than all of a rate's capacity needs an empty bucket, and then takes what it takes: it is
    paid back over time like everything else. Were it refused, it would be for ever.
    """
    needed = min(amount, bound.capacity) if bound.per_s else amount
    return level + needed <= bound.capacity + SLACK


def drained(level: float, elapsed_s: float, per_s: float) -> float:
    """
    The level after so long. Where the clock was set back nothing drains; the store then keeps the earlier time with
    the level, or it would not drain until the clock is where it was.
    """
    if elapsed_s <= 0.0:
        return level
    return max(0.0, level - elapsed_s * per_s)


def month_of(unix_s: float) -> int:
    """The calendar month in UTC, counted from the year 0."""
    then = datetime.fromtimestamp(unix_s, UTC)
    return then.year * 12 + then.month - 1


def month_end_s(unix_s: float) -> float:
    """Unix time at which the calendar month ends in UTC."""
    year, month = divmod(month_of(unix_s) + 1, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()


def _bounds(limits: Limits, *, is_of_key: bool) -> Iterator[Bound]:
    by_kind = (
        limits.requests_per_minute,
        limits.tokens_per_minute,
        limits.bytes_per_minute,
        limits.concurrent_requests,
        limits.tokens_per_month,
        limits.money_per_month,
    )
    for kind, limit in zip(Kind, by_kind, strict=True):
        if limit is not None:
            per_s = limit / MINUTE_S if kind in RATES else 0.0
            # a rate lets at least one through, however short its burst
            capacity = max(1.0, per_s * limits.burst_s) if per_s else float(limit)
            yield Bound(kind, is_of_key=is_of_key, limit=limit, capacity=capacity, per_s=per_s)
