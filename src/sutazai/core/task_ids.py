"""Ids for new tasks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from sutazai.core.task import task_id

RANDOM_BITS = 62
STEP_BITS = 32


class TaskIds:
    """
    Ids whose slots are equal sort as they were made, also within one millisecond; where the clock is set back, from
    there on.

    Within a millisecond the random part grows by random steps (RFC 9562, section 6.2, method 2). It begins in the lower
    half of its range, so there is room for 2**28 of them.
    """

    def __init__(self, random_bits: Callable[[int], int]) -> None:
        """
        None was made yet.

        Args:
            random_bits: a random number of so many bits.
        """
        self._random_bits = random_bits
        self._millisecond = -1
        self._bits = 0

    def next(self, now: datetime, slot: int) -> str:
        """An id of this moment, for a task of a tenant with this shard slot."""
        now_s = now.timestamp()
        millisecond = int(now_s * 1000)
        if millisecond == self._millisecond:
            self._bits += 1 + self._random_bits(STEP_BITS)
        else:
            self._millisecond, self._bits = millisecond, self._random_bits(RANDOM_BITS - 1)
        return task_id(now_s, self._bits, slot=slot)
