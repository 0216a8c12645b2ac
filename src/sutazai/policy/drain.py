"""How fast requests for one model get their turn, and so how long those who wait will."""

from __future__ import annotations

HALF_LIFE_S = 30.0
"""What happened so long ago counts half."""
ENOUGH = 3.0
"""Requests that must have ended before the rate is more than a guess."""
SURE = 6.0
"""Requests that must have ended while others waited before anybody is sent away for what the rate says."""
GUESSED_SERVICE_S = 10.0
"""What a request takes a node where none has ended yet: cautious, for a client that comes too early waits again."""


class Drain:
    """
    What is known of one model: time spent on requests, and requests that ended.

    The rate is that of the time in which somebody waited, where enough ended then: only then is the pool as fast as it
    can be. Else it is what is under way by the mean time of a request (Little's law), which holds at any load.
    """

    __slots__ = ("_busy_s", "_ended", "_full_ended", "_full_s", "in_flight")

    def __init__(self) -> None:
        self.in_flight = 0
        """Requests at nodes, as of the last note."""
        self._busy_s = 0.0
        self._ended = 0.0
        self._full_s = 0.0
        self._full_ended = 0.0

    def note(self, *, in_flight: int, ended: int, elapsed_s: float, is_waited_for: bool) -> None:
        """So many are at nodes, and so many ended since the last note; quiet times are not counted."""
        self.in_flight = in_flight
        if not in_flight and not ended:
            return
        keep = 0.5 ** (elapsed_s / HALF_LIFE_S)
        self._busy_s = self._busy_s * keep + in_flight * elapsed_s
        self._ended = self._ended * keep + ended
        if is_waited_for:
            self._full_s = self._full_s * keep + elapsed_s
            self._full_ended = self._full_ended * keep + ended

    @property
    def is_known(self) -> bool:
        """Whether the rate is more than a guess."""
        return self._ended >= ENOUGH

    @property
    def is_sure(self) -> bool:
        """Whether the rate was seen while the pool was as busy as it can be."""
        return self._full_ended >= SURE

    @property
    def per_s(self) -> float:
        """Requests that get their turn in a second; always above 0."""
        if self._full_ended >= ENOUGH and self._full_s > 0.0:
            return self._full_ended / self._full_s
        under_way = max(self.in_flight, 1)
        if self.is_known and self._busy_s > 0.0:
            return under_way * self._ended / self._busy_s
        return under_way / GUESSED_SERVICE_S
