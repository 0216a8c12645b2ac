"""
What each agent did on each day: a materialized view over the tasks, refreshed while others read it.

Any number of processes may run the loop: a lock lets one of them work, and the others see by the age of the view that
it was done. Days whose partition was taken out are no longer in it after the next refresh.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime

import structlog

from sutazai.adapters.postgres.database import Connection, Database
from sutazai.core.errors import StoreUnavailable

log = structlog.get_logger("sutazai.statistics")

REFRESH_S = 600.0
"""It reads every task once."""
AGAIN_S = 60.0
"""After a failure."""
EARLY_PART = 0.9
"""Of the interval: a view that is younger was refreshed by another process in this turn."""
REMEDY = "Run `sutazai db migrate`."


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentDay:
    """One agent on one day of UTC, by the time its tasks were made."""

    agent: str
    date: date
    total_tasks: int
    completed: int
    failed: int
    mean_processing_s: float | None
    """Of the last attempt of those that were completed; None where none was."""
    mean_attempts: float | None
    """Of those that were completed or failed; None where none was."""
    refreshed_at: datetime


class Statistics:
    """The view, and the loop that keeps it fresh."""

    def __init__(self, database: Database, *, every_s: float) -> None:
        self._database = database
        self._sql = database.sql
        self._every_s = every_s

    async def run(self) -> None:
        """Refresh until cancelled."""
        while True:
            pause_s = self._every_s
            try:
                await self.refresh(older_than_s=EARLY_PART * self._every_s)
            except StoreUnavailable as error:
                log.warning("statistics were not refreshed", why=error.message)
                pause_s = min(AGAIN_S, self._every_s)
            except Exception:  # the border of one turn
                log.exception("statistics were not refreshed")
            await asyncio.sleep(pause_s)

    async def refresh(self, *, older_than_s: float = 0.0) -> bool:
        """
        Count anew, if the view is so old and nobody else is at it; whether it was done.

        Raises `StoreUnavailable` where the database is away, has no such view, or took too long.
        """
        async with self._database.transaction(within_s=REFRESH_S) as connection:
            if not await connection.fetchval(self._sql["take_statistics_turn"]):
                return False
            if not await self._is_filled(connection):
                await connection.execute(self._sql["fill_statistics"], timeout=REFRESH_S)
                return True
            age_s = await connection.fetchval(self._sql["statistics_age_s"])
            if age_s is not None and age_s < older_than_s:
                return False
            await connection.execute(self._sql["refresh_statistics"], timeout=REFRESH_S)
        return True

    async def days(self) -> Sequence[AgentDay]:
        """As of the last refresh, the newest first; none before the first. Raises `StoreUnavailable`."""
        async with self._database.reading() as connection:
            if not await self._is_filled(connection):
                return ()
            rows = await connection.fetch(self._sql["statistics"])
        return [AgentDay(**row) for row in rows]

    async def _is_filled(self, connection: Connection) -> bool:
        is_filled: bool | None = await connection.fetchval(self._sql["statistics_state"])
        if is_filled is None:
            raise StoreUnavailable(f"The database had no statistics of agents. {REMEDY}")
        return is_filled
