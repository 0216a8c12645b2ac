"""
The time of the database, by which all processes go that have tasks in it.

A process whose own clock is wrong, or is set while it runs, would start what is for later too early, end what has a
deadline, or keep others waiting. So the database is asked for its time now and then, and in between monotonic time is
added. Where the database's own clock is set, everybody follows together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import structlog

from sutazai.adapters.postgres.database import Database
from sutazai.core.errors import StoreUnavailable

log = structlog.get_logger("sutazai.postgres")

ASK_S = 10.0


class DatabaseClock:
    """Tells the time; `run` has to run beside it where it is to follow the database's clock."""

    def __init__(
        self,
        database: Database,
        *,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Nothing was asked yet.

        Args:
            wall: what is told until the database has answered once.
        """
        self._database = database
        self._wall = wall
        self._clock = clock
        self._asked: tuple[datetime, float] | None = None
        """What the database said, and our monotonic time when the answer was there: never ahead of it, for that."""

    def __call__(self) -> datetime:
        """The time now, in UTC."""
        if self._asked is None:
            return self._wall()
        then, at_s = self._asked
        return then + timedelta(seconds=self._clock() - at_s)

    async def ask(self) -> None:
        """Ask the database. Raises `StoreUnavailable`."""
        async with self._database.transaction() as connection:
            then: datetime = await connection.fetchval(self._database.sql["time_now"])
            self._asked = then, self._clock()

    async def run(self) -> None:
        """Ask again and again, until cancelled."""
        while True:
            try:
                await self.ask()
            except StoreUnavailable as error:
                log.warning("the time was not asked for, and goes on as it was", why=error.message)
            await asyncio.sleep(ASK_S)
