"""
What tenants and keys took, counted in this process: all there is to it for one gateway, and the spare of several.

Nothing here waits. A level lives as long as it means anything: `sweep` drops those that have drained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sutazai.core.identity import Allowance
from sutazai.policy.rate_limit import (
    BUDGETS,
    SLACK,
    Amounts,
    Bound,
    Bounds,
    Kind,
    Verdict,
    bounds_of,
    drained,
    has_room,
    month_end_s,
    month_of,
)
from sutazai.ports.limits import Spent

Owner = tuple[str, str]
"""Tenant and key id; the tenant itself has no key id, and a key without one gets `ANONYMOUS`."""
ANONYMOUS = "-"


class Meter:
    """The level of one limit."""

    __slots__ = ("at", "is_known", "known", "level", "per_s")

    def __init__(self, at: float, per_s: float) -> None:
        self.level = 0.0
        """As of `at`, monotonic seconds."""
        self.at = at
        self.per_s = per_s
        self.known = 0.0
        """Of a budget: how much of the level was spent as all gateways know."""
        self.is_known = False
        """Of a budget: they told."""


class Counts:
    """Levels in memory, for the callers of this gateway."""

    def __init__(self, *, clock: Callable[[], float], wall_s: Callable[[], float]) -> None:
        """
        Begin with nothing taken.

        Args:
            clock: monotonic seconds.
            wall_s: Unix time in seconds; tells which month it is.
        """
        self._clock = clock
        self._wall_s = wall_s
        self._meters: dict[Owner, dict[Kind, Meter]] = {}
        self._plans: dict[Owner, tuple[Allowance, Bounds, list[tuple[Bound, Meter]]]] = {}
        self._month = 0
        self._month_end_s = 0.0
        self._was_seeded = False

    @property
    def owners(self) -> int:
        """Tenants and keys that have a level."""
        return len(self._meters)

    def bounds(self, allowance: Allowance) -> Bounds:
        """The limits of a caller, made once."""
        return self._plan(allowance)[1]

    def take(self, bounds: Bounds, amounts: Amounts, *, share: float = 1.0) -> Verdict:
        """
        Take from all limits at once, or from none.

        Args:
            share: the part of each limit that is this gateway's, in (0, 1]; of a budget, of what was left of it when
                that was last known. Of places and of a rate's burst each gateway has one at least.
        """
        if bounds.has_budget:
            self._turn_month()
        cells = self._plan(bounds.allowance)[2]
        if share < 1.0:
            cells = [(bound.part(share, meter.known), meter) for bound, meter in cells]
            bounds = Bounds(bounds.allowance, [bound for bound, _ in cells])
        now = self._clock()
        levels = []
        admitted = True
        for bound, meter in cells:
            level, per_s = meter.level, bound.per_s
            if per_s and level:
                level = drained(level, now - meter.at, per_s)
                meter.at = min(meter.at, now)
            levels.append(level)
            amount = amounts[bound.kind]
            if level + amount > bound.capacity + SLACK and not has_room(bound, level, amount):
                admitted = False
        if admitted:
            for (bound, meter), level in zip(cells, levels):  # noqa: B905 - a keyword costs
                meter.level = level + amounts[bound.kind]
                meter.at = now
        return Verdict(bounds, levels, amounts, admitted=admitted, month_left_s=self._month_left_s(bounds))

    def settle(self, bounds: Bounds, estimated: Amounts, true: Amounts) -> None:
        """The request ended: give back or take the difference. Once for each that was admitted."""
        if bounds.has_budget:
            self._turn_month()
        now = self._clock()
        for bound, meter in self._plan(bounds.allowance)[2]:
            kind = bound.kind
            if true[kind] != estimated[kind]:
                level = drained(meter.level, now - meter.at, bound.per_s) + true[kind] - estimated[kind]
                meter.level = max(meter.known, level)
                meter.at = now

    def note(self, verdict: Verdict) -> None:
        """What a store that all gateways share says was spent this month."""
        self._turn_month()
        cells = self._plan(verdict.bounds.allowance)[2]
        for place, (bound, meter) in enumerate(cells):
            if bound.kind in BUDGETS:
                meter.known = meter.level = verdict.level(place)
                meter.is_known = True

    def knows(self, bounds: Bounds) -> bool:
        """Whether it was told this month what all gateways together had spent of these budgets."""
        self._turn_month()
        cells = self._plan(bounds.allowance)[2]
        return self._was_seeded or all(meter.is_known for bound, meter in cells if bound.kind in BUDGETS)

    def seed(self, spent: Sequence[Spent], *, month: int) -> None:
        """Raise this month's sums to at least these; another month changes nothing."""
        self._turn_month()
        if month != self._month:
            return
        self._was_seeded = True  # who is not named has spent nothing
        for one in spent:
            meters = self._meters.setdefault((one.tenant, one.key_id), {})
            for kind, amount in ((Kind.MONTH_TOKENS, one.tokens), (Kind.MONTH_MONEY, one.money)):
                meter = meters.setdefault(kind, Meter(self._clock(), 0.0))
                meter.level = max(meter.level, amount)
                meter.known = max(meter.known, amount)

    def sweep(self) -> None:
        """Forget levels that have drained, and callers whose levels are gone."""
        now = self._clock()
        self._turn_month()
        for owner in list(self._meters):
            meters = self._meters[owner]
            if not any(drained(meter.level, now - meter.at, meter.per_s) for meter in meters.values()):
                del self._meters[owner]
                self._plans = {}  # they hold meters that nobody else would find; they are made again as needed

    # parts

    def _plan(self, allowance: Allowance) -> tuple[Allowance, Bounds, list[tuple[Bound, Meter]]]:
        owner = (allowance.tenant, allowance.key_id)
        plan = self._plans.get(owner)
        if plan is None or plan[0] is not allowance:
            bounds = bounds_of(allowance)
            plan = self._plans[owner] = (
                allowance,
                bounds,
                [(bound, self._meter(bound, owner)) for bound in bounds.all],
            )
        return plan

    def _meter(self, bound: Bound, owner: Owner) -> Meter:
        tenant, key_id = owner
        meters = self._meters.setdefault((tenant, (key_id or ANONYMOUS) if bound.is_of_key else ""), {})
        meter = meters.setdefault(bound.kind, Meter(self._clock(), bound.per_s))
        meter.per_s = bound.per_s
        return meter

    def _turn_month(self) -> None:
        """Budgets begin anew with the month."""
        now_s = self._wall_s()
        if now_s < self._month_end_s:
            return
        self._month, self._month_end_s = month_of(now_s), month_end_s(now_s)
        self._was_seeded = False
        for meters in self._meters.values():
            for kind in BUDGETS:
                if kind in meters:
                    meter = meters[kind]
                    meter.level = meter.known = 0.0
                    meter.is_known = False

    def _month_left_s(self, bounds: Bounds) -> float:
        return self._month_end_s - self._wall_s() if bounds.has_budget else 0.0
