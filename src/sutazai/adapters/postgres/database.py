"""
The one way to PostgreSQL: a small pool, short transactions, and every failure as `StoreUnavailable`.

Everything runs inside an explicit transaction and without named prepared statements, so a PgBouncer in
transaction mode may stand in between. A transaction that failed is not rolled back politely; its connection
is dropped, for a server that has just stopped answering would have to answer the rollback too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg

from sutazai.adapters.postgres import statements
from sutazai.core.errors import StoreUnavailable
from sutazai.settings.secret import Secret

MAX_CONNECTIONS = 4
"""Of one process. Keys and usage need one; the others are for a slow moment."""
IDLE_S = 60.0
"""An idle connection is given back to the server after this long."""
REMEDY = "Check that PostgreSQL runs, and `database.url` in the settings."

Connection = Any
"""An asyncpg connection; asyncpg has no types."""


class CommitUnknown(StoreUnavailable):
    """The connection broke during a commit: it may have taken place, or may yet."""


class Database:
    """A pool with a time limit. Made by `open_database`."""

    def __init__(self, pool: Any, url: Secret, timeout_s: float) -> None:
        self._pool = pool
        self._url = url
        self._timeout_s = timeout_s
        self.sql: Mapping[str, str] = statements.load()
        """Statements by name."""

    @asynccontextmanager
    async def transaction(self, *, within_s: float | None = None) -> AsyncIterator[Connection]:
        """
        Commit at the end, or drop everything on any error.

        All of it is bounded by `within_s`, or else by the limit of the settings; past it `StoreUnavailable`.
        Raises `CommitUnknown` where nobody can tell whether the commit took place.
        """
        limit_s = within_s or self._timeout_s
        committing = False
        try:
            with told_as_unavailable(limit_s):
                async with asyncio.timeout(limit_s), self._connection() as connection:
                    transaction = connection.transaction()
                    await transaction.start()
                    yield connection
                    committing = True
                    await transaction.commit()
        except StoreUnavailable as error:
            if committing:
                raise CommitUnknown(error.message) from error
            raise

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        """One of the pool; after any error it is dropped."""
        with _address_hidden():
            connection = await self._pool.acquire()
        try:
            yield connection
        except BaseException:
            connection.terminate()
            raise
        finally:
            await self._pool.release(connection, timeout=self._timeout_s)

    @asynccontextmanager
    async def own_connection(self) -> AsyncIterator[Connection]:
        """A connection outside the pool, to be kept for long; closed without ceremony at the end."""
        with told_as_unavailable(self._timeout_s):
            with _address_hidden():
                connection = await asyncpg.connect(self._url.reveal(), **_options(self._timeout_s))
            try:
                yield connection
            finally:
                connection.terminate()


@asynccontextmanager
async def open_database(url: Secret, *, timeout_s: float) -> AsyncIterator[Database]:
    """
    A pool that connects when it is first used, so a server that is away is no error here.

    `timeout_s` bounds each transaction, the connecting included.
    """
    pool = await asyncpg.create_pool(
        url.reveal(),
        min_size=0,
        max_size=MAX_CONNECTIONS,
        max_inactive_connection_lifetime=IDLE_S,
        reset=_leave_as_is,
        **_options(timeout_s),
    )
    try:
        yield Database(pool, url, timeout_s)
    finally:
        pool.terminate()


@contextmanager
def told_as_unavailable(timeout_s: float) -> Iterator[None]:
    """Raise what the driver, the network or the clock raised as `StoreUnavailable`, without the password."""
    try:
        yield
    except TimeoutError as error:
        raise StoreUnavailable(f"The database did not answer within {timeout_s:g} s. {REMEDY}") from error
    except asyncpg.PostgresError as error:
        raise StoreUnavailable(f"The database refused: {error.args[0]}. {REMEDY}") from error
    except OSError as error:
        raise StoreUnavailable(f"The database was not reached: {error.strerror or error}. {REMEDY}") from error
    except (asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        raise StoreUnavailable(f"The connection to the database broke: {error}. {REMEDY}") from error


@contextmanager
def _address_hidden() -> Iterator[None]:
    """A malformed address raises a `ValueError` that may quote the password: no text and no cause is kept."""
    try:
        yield
    except ValueError:
        raise StoreUnavailable(
            "The address of the database was not understood. Write `database.url` as"
            " `postgresql://user:password@host/name`, and `%40` for an `@` in the password."
        ) from None


def _options(timeout_s: float) -> dict[str, Any]:
    return {
        "timeout": timeout_s,
        "command_timeout": timeout_s,
        "statement_cache_size": 0,
        "server_settings": {"application_name": "sutazai"},
    }


async def _leave_as_is(_: Connection) -> None:
    """Transactions leave nothing behind, so the pool's own clean-up would be a wasted round trip."""
