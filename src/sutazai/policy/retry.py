"""Whether, and how soon, a request may be tried on another node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sutazai.core.errors import NodeRejected, NodeTimeout, NodeUnreachable, SutazaiError

WINDOW_S = 10.0
"""The budget looks back about this long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRules:
    """What the settings say about retries."""

    attempts: int
    budget_ratio: float
    budget_minimum_per_s: float
    backoff_s: float
    backoff_max_s: float


def is_retryable(error: SutazaiError) -> bool:
    """
    Whether another node might do better.

    A node that took the request and stayed silent past the limit is not replaced: the client has waited long enough,
    and the work may still be going on there.
    """
    if isinstance(error, NodeRejected):
        return error.status in {429, 502, 503}
    return isinstance(error, NodeUnreachable) or (isinstance(error, NodeTimeout) and error.connecting)


def pause_s(attempt: int, rules: RetryRules, random: Callable[[], float]) -> float:
    """
    Seconds to wait before the attempt after `attempt` (1 = the first): full jitter.

    Source: exponential back-off with full jitter, uniform in [0, min(cap, base * 2^n)).
    """
    return random() * min(rules.backoff_max_s, rules.backoff_s * 2.0 ** min(attempt - 1, 30))


class RetryBudget:
    """
    Retries in proportion to requests, so that a sick pool gets at most `budget_ratio` more work than it was asked.

    Two counters that halve every ten seconds; `now` is monotonic seconds.
    """

    __slots__ = ("_at", "_requests", "_retries", "_rules")

    def __init__(self, rules: RetryRules) -> None:
        self._rules = rules
        self._requests = 0.0
        self._retries = 0.0
        self._at = 0.0

    def note_requests(self, count: int, now: float) -> None:
        """So many requests began."""
        self._fade(now)
        self._requests += count

    def take(self, now: float) -> bool:
        """Whether one retry may happen; if so it is counted."""
        self._fade(now)
        allowed = self._rules.budget_ratio * self._requests + self._rules.budget_minimum_per_s * WINDOW_S
        if self._retries + 1.0 > allowed:
            return False
        self._retries += 1.0
        return True

    def _fade(self, now: float) -> None:
        age_s = now - self._at
        if age_s > 0:
            keep = 0.5 ** (age_s / WINDOW_S)
            self._requests *= keep
            self._retries *= keep
        self._at = max(now, self._at)
