"""When a second node is asked what the first has not answered yet, and how often that may happen."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

WINDOW = 256
"""Recent times that are kept of a model."""
MINIMUM_SAMPLES = 20
"""Fewer say nothing of a tail."""
BUDGET_RATIO = 0.05
"""Requests asked twice, of all."""
MAX_SAVED = 5.0
"""Second requests that a quiet time may save up for a bad one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HedgeRules:
    """What the settings say about hedging."""

    embeddings: bool
    after_quantile: float
    """Of recent times to an answer, above 0 and at most 1."""


class RecentTimes:
    """How long the latest answers of one model took to begin, in seconds."""

    __slots__ = ("_by_age", "_by_length")

    def __init__(self) -> None:
        self._by_age: deque[float] = deque()
        self._by_length: list[float] = []

    def note(self, time_s: float) -> None:
        """One more; the oldest beyond `WINDOW` is forgotten."""
        if len(self._by_age) == WINDOW:
            oldest = self._by_age.popleft()
            del self._by_length[bisect_left(self._by_length, oldest)]
        self._by_age.append(time_s)
        insort(self._by_length, time_s)

    def quantile(self, share: float) -> float | None:
        """The time that `share` (0 to 1) of them did not pass; None while there are fewer than `MINIMUM_SAMPLES`."""
        count = len(self._by_length)
        if count < MINIMUM_SAMPLES:
            return None
        return self._by_length[min(int(count * share), count - 1)]


class HedgeBudget:
    """At most `BUDGET_RATIO` of all requests are asked twice, so that a slow pool is not given the double work."""

    __slots__ = ("_saved",)

    def __init__(self) -> None:
        self._saved = 0.0

    @property
    def has_room(self) -> bool:
        """Whether one more is allowed."""
        return self._saved >= 1.0

    def note_request(self) -> None:
        """A request that might be asked twice began."""
        self._saved = min(self._saved + BUDGET_RATIO, MAX_SAVED)

    def take(self) -> None:
        """One was asked twice; there was room for it."""
        self._saved -= 1.0
