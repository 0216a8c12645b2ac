"""
Leaving a model on a node alone while it fails, and finding out when it is well again.

A breaker belongs to one model on one node. None exists before the first failure or slow answer, and it is dropped
when its window is clean again, so the healthy cost nothing. Closed: requests pass and are counted over a window. Open:
the node is left alone with that model. Half-open: one request is let through, the trial; its outcome closes the
breaker or opens it for twice as long.

How many may be left alone at once is decided over all nodes with the model (`left_alone`): never all of them.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

BUCKETS = 10
"""The window moves on by a tenth of its length."""
LONGEST = 4
"""Doublings of the open time at most: 16 times."""
OUTLIER_SHARE = 0.5
"""Half of the error ratio that opens a breaker is enough where the other nodes hardly fail."""
OTHERS_SHARE = 0.25
"""Others hardly fail when their error ratio is below a quarter of the node's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerRules:
    """What the settings say about breakers; ratios are 0.0 to 1.0, times in seconds."""

    window_s: float = 10.0
    minimum_requests: int = 5
    error_ratio: float = 0.5
    slow_s: float = 30.0
    slow_ratio: float = 0.8
    open_s: float = 5.0
    max_ejected_ratio: float = 0.5


class Position(enum.Enum):
    """Where a breaker stands."""

    CLOSED = "closed"
    """Requests pass."""
    OPEN = "open"
    """None passes, but where too many nodes would be left alone."""
    HALF_OPEN = "half-open"
    """One passes at a time: the trial."""


class Counts(NamedTuple):
    """Requests that ended within the window."""

    all: int
    failed: int
    slow: int

    @property
    def error_ratio(self) -> float:
        """0.0 where there were none."""
        return self.failed / self.all if self.all else 0.0

    @property
    def slow_ratio(self) -> float:
        """0.0 where there were none."""
        return self.slow / self.all if self.all else 0.0


NOTHING = Counts(0, 0, 0)


class Breaker:
    """One model on one node. `now` is monotonic seconds everywhere."""

    __slots__ = ("_buckets", "_open_until", "_opened_with", "_times", "on_trial")

    def __init__(self) -> None:
        self._buckets: deque[list[float]] = deque()
        """Beginning, requests, failed ones, slow ones; oldest first."""
        self._open_until: float | None = None
        self._opened_with = NOTHING
        self._times = 0
        self.on_trial = False
        """A request was let through to see, and has not been answered yet."""

    @property
    def opens_until(self) -> float:
        """When it turns half-open; 0.0 while it is closed."""
        return self._open_until or 0.0

    @property
    def opened_with(self) -> Counts:
        """What it was opened for."""
        return self._opened_with

    def position(self, now: float) -> Position:
        """Closed, open or half-open."""
        if self._open_until is None:
            return Position.CLOSED
        return Position.OPEN if now < self._open_until else Position.HALF_OPEN

    def passes(self, now: float) -> bool:
        """Whether one more request may go to the node."""
        return self._open_until is None or (now >= self._open_until and not self.on_trial)

    def counts(self, now: float, rules: BreakerRules) -> Counts:
        """What ended within the window."""
        buckets = self._buckets
        while buckets and buckets[0][0] <= now - rules.window_s:
            buckets.popleft()
        return Counts(*(int(sum(bucket[kind] for bucket in buckets)) for kind in (1, 2, 3)))

    def is_clean(self, now: float, rules: BreakerRules) -> bool:
        """Whether it can be forgotten."""
        if self._open_until is not None:
            return False
        counts = self.counts(now, rules)
        return not counts.failed and not counts.slow

    def note(self, now: float, rules: BreakerRules, *, failed: bool, slow: bool) -> bool:
        """A request that was no trial ended; whether that opened the breaker."""
        if self._open_until is not None:
            return False  # sent before it opened, or because nobody else was left: the trial alone decides
        if not self._buckets or now - self._buckets[-1][0] >= rules.window_s / BUCKETS:
            self._buckets.append([now, 0, 0, 0])
        bucket = self._buckets[-1]
        bucket[1] += 1
        bucket[2] += failed
        bucket[3] += slow
        if not failed and not slow:
            return False
        counts = self.counts(now, rules)
        if counts.all < rules.minimum_requests or not _is_too_much(counts, rules):
            return False
        self.open(now, rules)
        return True

    def open(self, now: float, rules: BreakerRules) -> None:
        """Leave the node alone, each time in a row for twice as long."""
        if self._open_until is None:
            self._opened_with = self.counts(now, rules)
        self._open_until = now + rules.open_s * 2.0 ** min(self._times, LONGEST)
        self._times += 1
        self.on_trial = False

    def close(self) -> None:
        """The trial went well: begin anew."""
        self._buckets.clear()
        self._open_until = None
        self._opened_with = NOTHING
        self._times = 0
        self.on_trial = False


def _is_too_much(counts: Counts, rules: BreakerRules) -> bool:
    return (counts.failed > 0 and counts.error_ratio >= rules.error_ratio) or (
        counts.slow > 0 and counts.slow_ratio >= rules.slow_ratio
    )


def left_alone(
    breakers: Mapping[str, Breaker], names: Sequence[str], now: float, rules: BreakerRules
) -> Collection[str]:
    """
    Which of these nodes are to get nothing now.

    Args:
        breakers: those of one model, by the name of the node.
        names: nodes with the model that are up.

    Returns:
        At most `max_ejected_ratio` of the names and never all. Where more fail than that, those that fail the most;
        where more are slow than that, the slow ones are let go: then the pool is slow, and not a few of its nodes.
    """
    shut = [name for name in names if name in breakers and not breakers[name].passes(now)]
    most = min(len(names) - 1, int(rules.max_ejected_ratio * len(names) + 1e-9))
    if len(shut) <= most:
        return shut
    failing = [name for name in shut if breakers[name].opened_with.error_ratio >= rules.error_ratio]
    failing.sort(key=lambda name: (breakers[name].opened_with.error_ratio, breakers[name].opens_until), reverse=True)
    return failing[: max(0, most)]


def fails_far_more(own: Counts, others: Sequence[Counts], rules: BreakerRules) -> bool:
    """Whether a node fails often, and much more often than the others with the same model: an outlier."""
    if not others or own.all < 2 * rules.minimum_requests:
        return False
    ratio = own.error_ratio
    theirs = sum(counts.failed for counts in others) / max(1, sum(counts.all for counts in others))
    return ratio >= OUTLIER_SHARE * rules.error_ratio and theirs <= OTHERS_SHARE * ratio and own.failed > 0


FAR_SLOWER = 5.0
"""A node is an outlier when it answers so many times later than the others, and than it used to."""
FASTEST_OUTLIER_S = 1.0
"""Nobody is left alone for less."""


def is_far_slower(recent_s: float, usual_s: float, others_s: Sequence[float]) -> bool:
    """
    Whether a node begins to answer much later than the others with the same model, and than it used to itself.

    A node that was always slow is merely a slow node: it gets less, by its load, and is worth having when all are full.
    """
    if not others_s or recent_s < FASTEST_OUTLIER_S:
        return False
    median_s = sorted(others_s)[len(others_s) // 2]
    return recent_s > FAR_SLOWER * median_s and recent_s > FAR_SLOWER * usual_s


class Breakers:
    """All breakers there are: none while all is well."""

    def __init__(self) -> None:
        self.by_model: dict[str, dict[str, Breaker]] = {}
        """By model, then by node; no empty ones."""
        self.opened = 0
        """Times that a model on a node was left alone, outliers and failed trials too."""
        self.ejected = 0
        """Those of them that were outliers."""
        self.trials = 0
        """Requests let through to see."""

    def get(self, model: str, node: str) -> Breaker | None:
        """The breaker of one model on one node, where there is one."""
        return self.by_model.get(model, {}).get(node)

    def made(self, model: str, node: str) -> Breaker:
        """The breaker of one model on one node, new where there was none."""
        return self.by_model.setdefault(model, {}).setdefault(node, Breaker())

    def begin_trial(self, model: str, node: str, now: float) -> Breaker | None:
        """A request goes to the node: its breaker where this is the trial, which the caller then ends."""
        breaker = self.get(model, node)
        if breaker is None or breaker.on_trial or breaker.position(now) is not Position.HALF_OPEN:
            return None
        breaker.on_trial = True
        self.trials += 1
        return breaker

    def note(self, model: str, node: str, now: float, rules: BreakerRules, *, failed: bool, slow: bool) -> bool:
        """A request that was no trial ended; whether that opened the breaker. Makes one where it is needed."""
        breaker = self.made(model, node) if failed or slow else self.get(model, node)
        if breaker is None:
            return False
        opened = breaker.note(now, rules, failed=failed, slow=slow)
        self.opened += opened
        if not failed and not slow and breaker.is_clean(now, rules):
            self._drop(model, node)
        return opened

    def open(self, breaker: Breaker, now: float, rules: BreakerRules, *, is_outlier: bool = False) -> None:
        """Leave alone: a trial failed, or an outlier was found."""
        breaker.open(now, rules)
        self.opened += 1
        self.ejected += is_outlier

    def close(self, breaker: Breaker, model: str, node: str) -> None:
        """A trial went well: forget what was."""
        breaker.close()
        if self.get(model, node) is breaker:
            self._drop(model, node)

    def fails_far_more(self, model: str, node: str, others: Sequence[str], now: float, rules: BreakerRules) -> bool:
        """Whether the node is an outlier by its errors."""
        breakers = self.by_model.get(model, {})
        if node not in breakers:
            return False
        theirs = [breakers[name].counts(now, rules) if name in breakers else NOTHING for name in others]
        return fails_far_more(breakers[node].counts(now, rules), theirs, rules)

    def tidy(self, now: float, rules: BreakerRules, *, node: str, models: Collection[str]) -> None:
        """Drop what is clean, and what is about models that the node has no more."""
        for model in [model for model, breakers in self.by_model.items() if node in breakers]:
            if model not in models or self.by_model[model][node].is_clean(now, rules):
                self._drop(model, node)

    def _drop(self, model: str, node: str) -> None:
        breakers = self.by_model[model]
        del breakers[node]
        if not breakers:
            del self.by_model[model]
