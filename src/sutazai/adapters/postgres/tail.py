"""
Reads events in the order of their positions and never past one that may still come.

A position is given by a sequence before the commit, so that of two transactions the one with the lower position may
become visible last; and the numbers of transactions are given in yet another order. So a reader takes marks: first the
highest position given so far, then the number of a transaction that begins afterwards. Whoever took a position up to
there began earlier; once all earlier transactions have ended, whatever there is up to the mark can be seen. Nothing of
this is kept, so it holds in a database that was restored from a dump as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.task_rows import event_of
from sutazai.ports.task_events import KeptEvent

MAX_MARKS = 64
"""Where one transaction stays open for long, no more are taken: it must end before any of them counts."""


class EventTail:
    """The marks of one process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sql = database.sql
        self._settled = 0
        self._marks: deque[tuple[int, int]] = deque()

    async def read(self, *, after: int, limit: int) -> Sequence[KeptEvent]:
        """Events past that position, oldest first."""
        async with self._database.transaction() as connection:
            newest = self._marks[-1][0] if self._marks else self._settled
            mark = await connection.fetchrow(self._sql["mark_events"], newest)
            if mark["transaction"] is not None and len(self._marks) < MAX_MARKS:
                self._marks.append((mark["position"], mark["transaction"]))
            columns = [position for position, _ in self._marks], [number for _, number in self._marks]
            # Each statement has a snapshot of its own: what was settled before the second one is seen by it.
            settled = await connection.fetchval(self._sql["settled_events"], *columns) if self._marks else None
            self._settle(settled)
            rows = await connection.fetch(self._sql["tail_events"], after, limit, self._settled)
        return [event_of(row) for row in rows]

    def _settle(self, settled: int | None) -> None:
        if settled is None:
            return
        self._settled = max(self._settled, settled)
        while self._marks and self._marks[0][0] <= settled:
            self._marks.popleft()
