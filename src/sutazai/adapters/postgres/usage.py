"""
Usage in PostgreSQL: one row for each key, model and hour, which only grows.

The answer to a commit can be lost while the commit takes place: a disk that hangs for longer than our limit
is enough. Counting again would be wrong, and so would be not counting. So each store numbers its writes, the
database keeps the last number with the counts, and a write of unknown fate is offered once more, under its
number, before the next.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from datetime import datetime

from sutazai.adapters.postgres.database import CommitUnknown, Database
from sutazai.ports.keys import UsageRow


class PostgresUsageStore:
    """The `UsageStore` of production."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sql = database.sql
        self._writer = uuid.uuid4()
        self._number = 0
        self._unknown: Sequence[UsageRow] = ()
        """What was sent under `_number`, if nobody knows whether it arrived."""
        self._turn = asyncio.Lock()

    async def add(self, rows: Sequence[UsageRow]) -> None:
        """
        Add counts and move the keys' `last_used_at` on, all or nothing. One write at a time.

        Returns also when the answer to the commit was lost: those counts are ours then and need no second
        `add`. The next call settles them, and raises `StoreUnavailable` while that cannot be done.
        """
        async with self._turn:
            if self._unknown:
                await self._write(self._unknown)
                self._unknown = ()
            if rows:
                self._number += 1
                try:
                    await self._write(rows)
                except CommitUnknown:
                    self._unknown = rows

    async def _write(self, rows: Sequence[UsageRow]) -> None:
        columns = [
            [row.hour for row in rows],
            [row.key_id for row in rows],
            [row.tenant for row in rows],
            [row.model for row in rows],
            [row.requests for row in rows],
            [row.errors for row in rows],
            [row.input_tokens for row in rows],
            [row.output_tokens for row in rows],
        ]
        async with self._database.transaction() as connection:
            if self._number == 1:
                await connection.execute(self._sql["forget_writers"])
            if await connection.fetchval(self._sql["claim_write"], self._writer, self._number):
                await connection.execute(self._sql["add_usage"], *columns)
                await connection.execute(self._sql["touch_keys"], columns[1], columns[0])

    async def total(self, *, since: datetime) -> Sequence[UsageRow]:
        """Sums by key and model from that hour on; `hour` is the newest one in the sum."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(self._sql["total_usage"], since)
        return [UsageRow(**row) for row in rows]
