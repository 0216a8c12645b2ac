"""
For how long others have shown no sign of life.

Whoever lives makes a number grow. Nobody compares clocks: each observer measures by its own how long a number has
stood still before its eyes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K")


class Stillness(Generic[K]):
    """What one observer saw of several beats."""

    def __init__(self, *, longest_step_s: float, now: float) -> None:
        """
        Args:
            longest_step_s: what the time between two looks counts as at most. Past that it was the observer, or where
                the beats are kept, that stood still, and nobody shall die of it.
            now: seconds of a clock that never goes back.
        """
        self._longest_step_s = longest_step_s
        self._looked_at = now
        self._seen: dict[K, tuple[Hashable, float]] = {}

    def look(self, beats: Mapping[K, Hashable], *, now: float) -> Mapping[K, float]:
        """For each of these, the seconds since it was first seen as it is; those that are missing are forgotten."""
        passed_s = min(now - self._looked_at, self._longest_step_s)
        self._looked_at = now
        before, self._seen = self._seen, {}
        for key, beat in beats.items():
            seen, still_s = before.get(key, (None, 0.0))
            self._seen[key] = (beat, still_s + passed_s if key in before and seen == beat else 0.0)
        return {key: still_s for key, (_, still_s) in self._seen.items()}
