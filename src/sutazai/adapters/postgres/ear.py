"""Hears notifications of PostgreSQL, and says when some may have been missed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import suppress

from sutazai.adapters.postgres.database import Database
from sutazai.core.errors import StoreUnavailable

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0
POOLED_LOOK_S = 1.0
MAX_HEARD = 10_000
"""Payloads kept for a slow listener; past it they count as missed."""


async def heard(database: Database, channel: str, *, look_s: float) -> AsyncIterator[frozenset[str]]:
    """
    Payloads of a channel as they come, those of one moment together; an empty one where nobody can tell.

    That is after each (re)connection, and every `look_s`, or every second behind a PgBouncer, which swallows
    notifications in transaction mode.
    Never ends; raises only on cancellation.
    """
    pause_s = FIRST_PAUSE_S
    while True:
        with suppress(StoreUnavailable):
            async with database.own_connection() as connection:
                called, payloads = asyncio.Event(), set[str]()

                def hear(_: object, __: int, ___: str, payload: str, payloads: set[str] = payloads) -> None:
                    payloads.add(payload if len(payloads) < MAX_HEARD else "")
                    called.set()  # noqa: B023 - one event for each connection, and so for each listener

                connection.add_termination_listener(lambda *_: called.set())  # noqa: B023
                await connection.add_listener(channel, hear)
                pause_s = FIRST_PAUSE_S
                yield frozenset()
                while not connection.is_closed():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(look_s if database.is_direct else min(look_s, POOLED_LOOK_S)):
                            await called.wait()
                    called.clear()
                    news = frozenset(payloads)
                    payloads.clear()
                    yield frozenset() if "" in news else news
        await asyncio.sleep(random.uniform(0.5, 1.0) * pause_s)  # noqa: S311
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
