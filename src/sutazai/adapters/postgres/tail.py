"""
Reads rows in the order of their positions and never past one that may still come: events, and messages of agents.

A position is given by a sequence before the commit, so that of two transactions the one with the lower position may
become visible last; and the numbers of transactions are given in yet another order. So a reader takes marks: first the
highest position given so far, then who writes to the table at that moment. Whoever took a position up to there and has
not ended is among them, for writers of a table lock it from before they write until they have ended. Once none of them
is left, whatever there is up to the mark can be seen. Transactions that write elsewhere, however long, hold nobody up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A table whose rows have positions."""

    table: str
    newest: str
    """The statement that gives the highest position so far."""


EVENTS = Source(table="events", newest="newest_position")
MESSAGES = Source(table="agent_messages", newest="newest_message")


class Tail:
    """The marks of one process for one table."""

    def __init__(self, database: Database, source: Source) -> None:
        self._database = database
        self._sql = database.sql
        self._source = source
        self._settled = 0
        self._marks: deque[Mark] = deque()

    async def rows(self, statement: str, after: int, limit: int, *more: object) -> tuple[Sequence[asyncpg.Record], int]:
        """Rows past that position, oldest first, and the highest position of all. `statement` takes these arguments."""
        async with self._database.transaction() as connection:
            # Each statement has a snapshot of its own, and these three need this order.
            position: int = await connection.fetchval(self._sql[self._source.newest])
            writers = frozenset[str](await connection.fetchval(self._sql["writers"], self._source.table))
            self._settle(position, writers)
            return await connection.fetch(self._sql[statement], after, limit, self._settled, *more), position

    def _settle(self, position: int, writers: frozenset[str]) -> None:
        newest = self._marks[-1].position if self._marks else self._settled
        if position > newest and len(self._marks) < MAX_MARKS:
            self._marks.append(Mark(position, writers))
        if not writers:
            self._settled = max(self._settled, position)
            self._marks.clear()
        while self._marks and not self._marks[0].writers & writers:
            self._settled = self._marks.popleft().position


class EventTail(Tail):
    """The same for events as they are kept."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, EVENTS)

    async def read(self, *, after: int, limit: int) -> Sequence[KeptEvent]:
        """Events past that position, oldest first."""
        rows, _ = await self.rows("tail_events", after, limit)
        return [event_of(row) for row in rows]
