"""
How many messages of a queue a worker may hold: those under way, and, where tasks are quick, some that wait for them.

A message that waits behind a slow task cannot be started elsewhere, and counts as delivered each time its worker dies:
with ten of them and workers that kept crashing, 20 of 60 tasks were never run. Where tasks take milliseconds, the same
ten hide the way to the broker and back.
"""

from __future__ import annotations

from dataclasses import dataclass

FAST_S = 0.1
"""A task below it is quick."""
CALM_S = 30.0
"""For so long all have to be quick before messages may wait. What waits is handed back when one is slow after all, and
that counts as a delivery, so it must be rare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchRules:
    """Messages held for each attempt that may be under way, that attempt's own included."""

    slow: int
    fast: int


NONE_WAITS = PrefetchRules(slow=1, fast=1)


@dataclass(frozen=True, slots=True)
class Pace:
    """When attempts on one queue were slow last."""

    slow_at: float
    """In the seconds of a clock that only goes forward; the start counts as slow, for nothing is known then."""

    def after(self, took_s: float, *, now: float) -> Pace:
        """An attempt ended, or is still under way after that time."""
        return Pace(now) if took_s >= FAST_S else self

    def prefetch(self, rules: PrefetchRules, *, slots: int, now: float) -> int:
        """Messages to hold at most, where `slots` attempts may be under way."""
        is_fast = now - self.slow_at >= CALM_S
        return slots * (rules.fast if is_fast else rules.slow)
