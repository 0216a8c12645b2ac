"""
Reads events in the order of their positions and never past one that may still come.

A position is given by a sequence before the commit, so that of two transactions the one with the lower position may
become visible last; and the numbers of transactions are given in yet another order. So a reader takes marks: first the
highest position given so far, then who writes events at that moment. Whoever took a position up to there and has not
ended is among them, for writers of a table lock it from before they write until they have ended. Once none of them is
left, whatever there is up to the mark can be seen. Transactions that write no events, however long, hold nobody up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.task_rows import event_of
from sutazai.ports.task_events import KeptEvent

MAX_MARKS = 64
"""Where one writer stays open for long, no more are taken: it must end before any of them counts."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A position, and the transactions that had to end before it counts."""

    position: int
    writers: frozenset[str]


class EventTail:
    """The marks of one process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sql = database.sql
        self._settled = 0
        self._marks: deque[Mark] = deque()

    async def read(self, *, after: int, limit: int) -> Sequence[KeptEvent]:
        """Events past that position, oldest first."""
        async with self._database.transaction() as connection:
            # Each statement has a snapshot of its own, and these three need this order.
            position: int = await connection.fetchval(self._sql["newest_position"])
            writers = frozenset[str](await connection.fetchval(self._sql["event_writers"]))
            self._settle(position, writers)
            rows = await connection.fetch(self._sql["tail_events"], after, limit, self._settled)
        return [event_of(row) for row in rows]

    def _settle(self, position: int, writers: frozenset[str]) -> None:
        newest = self._marks[-1].position if self._marks else self._settled
        if position > newest and len(self._marks) < MAX_MARKS:
            self._marks.append(Mark(position, writers))
        if not writers:
            self._settled = max(self._settled, position)
            self._marks.clear()
        while self._marks and not self._marks[0].writers & writers:
            self._settled = self._marks.popleft().position
