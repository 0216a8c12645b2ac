"""
How many requests a node can work on at once, where nobody says.

A node with a free slot begins to answer at once; one without lets the request wait. So the limit follows the time to
the first answer: as long as it stays near the least there is, there may be more requests, and when it grows, fewer. A
refusal (429, 503) or a timeout takes a quarter off at once.

The least time is known only while nothing waits, and a busy node is never seen so. So now and then, and at the
beginning, the limit is halved for as long as that makes answers come sooner; then it grows fast until they come later.

Source: Netflix' concurrency-limits (`Gradient2Limit`: limit * tolerance * long / short + headroom, smoothed; grows only
where the limit is made use of) and its `AIMDLimit`. Other than there the long-term value is measured and is no
average: an average learns the wait that the limit itself causes.
"""

from __future__ import annotations

import math

LEAST, MOST = 1.0, 512.0
FIRST = 4.0
TOLERANCE = 1.25
"""Means up to so many times the least one are as good as it."""
SMOOTHING = 0.2
"""Share of the way to the new limit that is taken at once."""
SHARPEST = 0.5
"""No window takes more than half off."""
BACKOFF = 0.75
"""What is left of the limit after a refusal."""
FAST_GROWTH = 1.5
DRIFT = 0.1
"""How far the least time moves towards a lower mean, or any mean of a node that is not busy."""
SOONER = 0.8
"""Half of the limit made answers come sooner when their mean is below this share of what it was."""
FEWEST_ANSWERS = 10
"""In a window, so that one long prompt decides nothing."""
MEASURE_AFTER = 200
"""Windows until the least time is measured anew."""


class ConcurrencyLimit:
    """The limit of one node. Times are monotonic seconds."""

    __slots__ = (
        "_backed_off_at",
        "_count",
        "_grows_fast",
        "_least_s",
        "_limit",
        "_mean_before_s",
        "_older",
        "_sum_s",
        "_windows",
        "was_reached",
    )

    def __init__(self) -> None:
        self._limit = FIRST
        self._least_s = math.inf
        """The mean of a window in which nothing waited, as far as that is known."""
        self._mean_before_s: float | None = math.inf
        """While measuring: the mean with twice the limit; else None."""
        self._grows_fast = False
        self._windows = 0
        self._older = 0
        """Answers to come that were asked for before the limit was halved: they still tell of the wait of then."""
        self._count = 0
        self._sum_s = 0.0
        self._backed_off_at = -math.inf
        self.was_reached = False
        """In this window as many requests were at the node as the limit allows. Set by whoever sends them."""

    @property
    def slots(self) -> int:
        """The limit in whole requests, 1 to 512."""
        return int(self._limit)

    def answered(self, took_s: float) -> None:
        """A request got the beginning of its answer after so long."""
        if self._older:
            self._older -= 1
            return
        self._count += 1
        self._sum_s += max(took_s, 1e-6)
        if self._count >= max(FEWEST_ANSWERS, self._limit):
            self._close_window(self._sum_s / self._count)

    def refused(self, now: float) -> None:
        """The node said that it is full, or kept silent for too long. Counts once for the time of an answer."""
        if now - self._backed_off_at < min(1.0, self._least_s):
            return  # they were sent together, under the same limit
        self._backed_off_at = now
        self._grows_fast = False
        self._move_to(self._limit * BACKOFF)

    def _close_window(self, mean_s: float) -> None:
        self._windows += 1
        if self._mean_before_s is not None:
            self._measure(mean_s, self._mean_before_s)
        elif self._windows >= MEASURE_AFTER and self.was_reached:
            self._halve(mean_s)
        else:
            self._follow(mean_s)

    def _measure(self, mean_s: float, before_s: float) -> None:
        """Halve for as long as that helps."""
        if mean_s < SOONER * before_s and self._limit > LEAST:
            self._halve(mean_s)
            return
        self._least_s = min(mean_s, before_s)
        self._mean_before_s = None
        self._grows_fast = True
        self._windows = 0
        self._move_to(self._limit)

    def _halve(self, mean_s: float) -> None:
        self._mean_before_s = mean_s
        self._older = self.slots
        self._move_to(self._limit / 2)

    def _follow(self, mean_s: float) -> None:
        """Grow while answers come as soon as ever, else shrink."""
        if mean_s < self._least_s or not self.was_reached:
            self._least_s += DRIFT * (mean_s - self._least_s)
        gradient = min(1.0, TOLERANCE * self._least_s / mean_s)
        self._grows_fast = self._grows_fast and gradient == 1.0
        aim = self._limit * max(SHARPEST, gradient) + math.sqrt(self._limit)
        if aim >= self._limit and not self.was_reached:
            self._move_to(self._limit)
        elif self._grows_fast:
            self._move_to(self._limit * FAST_GROWTH)
        else:
            self._move_to(self._limit + SMOOTHING * (aim - self._limit))

    def _move_to(self, limit: float) -> None:
        self._limit = min(MOST, max(LEAST, limit))
        self._count = 0
        self._sum_s = 0.0
        self.was_reached = False
