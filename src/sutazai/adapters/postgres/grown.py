"""
Has PostgreSQL look again at tables that have grown much.

Plans are kept, and one that was made while there were a few tasks reads all of them when they have become many. A look
throws it away. PostgreSQL takes one by itself, once a minute at most; within that minute a new database, or the
partition of a new month, would be slow under load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from sutazai.adapters.postgres.database import Database
from sutazai.core.errors import StoreUnavailable

log = structlog.get_logger("sutazai.postgres")

LOOK_S = 2.0


async def tend_grown(database: Database) -> None:
    """Runs until cancelled."""
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            await analyse_grown(database)
        except StoreUnavailable as error:
            log.warning("tables that grow were not looked at", why=error.message)
        except Exception:  # the border of one turn
            log.exception("tables that grow were not looked at")


async def analyse_grown(database: Database) -> Sequence[str]:
    """Do it once; the tables that had grown, none where another process is at it."""
    async with database.statement() as connection:
        grown: list[str] = [row["name"] for row in await connection.fetch(database.sql["grown_tables"])]
    if grown:
        async with database.transaction() as connection:
            if not await connection.fetchval(database.sql["take_grown_turn"]):
                return ()
            await connection.execute(f"ANALYZE (SKIP_LOCKED) {', '.join(grown)}")
    return grown
