"""
The one way to PostgreSQL: a pool, short transactions, and every failure as `StoreUnavailable`.

Everything runs inside an explicit transaction, and prepared statements have names only where no pooler stands in
between, so a PgBouncer in transaction mode may.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from sutazai.adapters.postgres import statements
from sutazai.adapters.postgres.faults import CommitUnknown, told_as_unavailable
from sutazai.adapters.postgres.pool import Connection, Pool, PoolRules
from sutazai.core.errors import StoreUnavailable
from sutazai.settings.secret import Secret

__all__ = ["CommitUnknown", "Connection", "Database", "PoolRules", "open_database", "told_as_unavailable"]

USUAL = PoolRules()


class Database:
    """A pool with a time limit. Made by `open_database`."""

    def __init__(self, pool: Pool, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self.sql: Mapping[str, str] = statements.load()
        """Statements by name."""

    @property
    def is_direct(self) -> bool:
        """Whether servers themselves answer, as far as is known; a PgBouncer passes no notifications on."""
        return self._pool.is_direct

    @asynccontextmanager
    async def transaction(self, *, within_s: float | None = None) -> AsyncIterator[Connection]:
        """
        Commit at the end, or drop everything on any error.

        All of it, the wait for a connection included, is bounded by `within_s`, or else by the limit of the
        settings; past it `StoreUnavailable`. Raises `CommitUnknown` where nobody can tell whether the commit
        took place.
        """
        limit_s = within_s or self._timeout_s
        committing = False
        try:
            with told_as_unavailable(limit_s):
                async with asyncio.timeout(limit_s), self._pool.begun() as (connection, transaction):
                    yield connection
                    committing = True
                    await transaction.commit()
        except StoreUnavailable as error:
            if committing:
                raise CommitUnknown(error.message) from error
            raise

    @asynccontextmanager
    async def own_connection(self) -> AsyncIterator[Connection]:
        """A connection outside the pool, to be kept for long; closed without ceremony at the end."""
        with told_as_unavailable(self._timeout_s):
            connection = await self._pool.connect()
            try:
                yield connection
            finally:
                connection.terminate()


@asynccontextmanager
async def open_database(url: Secret, *, timeout_s: float, rules: PoolRules = USUAL) -> AsyncIterator[Database]:
    """
    A pool that connects when it is first used, so a server that is away is no error here.

    `timeout_s` bounds each transaction, the connecting included.
    """
    pool = Pool(url, rules, timeout_s)
    try:
        yield Database(pool, timeout_s)
    finally:
        pool.close()
