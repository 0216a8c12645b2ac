"""
How many of the tasks that a consumer takes are of lower classes that were passed over for too long.

Each consumer counts for itself, so the share holds for any number of them, and nobody has to agree with anybody.
"""

from __future__ import annotations

EVERY = 10
"""Of so many tasks one may be of a class that was passed over."""


class PassedOver:
    """What one consumer owes to classes that were passed over."""

    def __init__(self) -> None:
        self._credit = 0
        """Tasks taken, less `EVERY` for each one that was passed over; what is not used is not saved up."""

    def places(self, at_most: int) -> int:
        """Of the next so many tasks, how many may be of those."""
        return max(0, min(at_most, (self._credit + at_most) // EVERY))

    def took(self, count: int, *, passed_over: int) -> None:
        """So many were taken, and so many of them had been passed over."""
        self._credit = min(EVERY - 1, self._credit + count - EVERY * passed_over)
