"""
The connections to one PostgreSQL server, kept by SQLAlchemy's pool and given out as asyncpg's own.

SQLAlchemy would ask a connection whether it lives each time it is taken, in three round trips. Here the BEGIN that
follows anyway is the question: where it finds the connection dead, nothing has begun, and another one is taken.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import asyncpg
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_connection, PGDialect_asyncpg
from sqlalchemy.pool import AsyncAdaptedQueuePool, PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn

from sutazai.adapters.postgres.addresses import server_name
from sutazai.adapters.postgres.faults import LOST, address_hidden
from sutazai.settings.secret import Secret

Connection = Any
"""An asyncpg connection; asyncpg has no types."""

STATEMENTS = 100
"""Prepared statements kept for each connection. None behind a PgBouncer, which gives out servers by transaction."""


ALIVE_S = 1.0
"""A connection that answered so recently is taken to be alive. Whether it is closed is known at once."""

_NO_LIMIT: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRules:
    """How many connections, and for how long."""

    size: int = 20
    """Kept open once they were needed."""
    overflow: int = 40
    """Opened beyond that, and closed when given back."""
    recycle_s: float = 3600.0
    """Older ones are replaced when they are next needed: a balancer's or a firewall's memory ends some time."""
    pre_ping: bool = True
    """Whether one that is found dead before anything began is replaced by another."""


class Lease:
    """A connection that was given out, and its transaction; None where its one statement is a transaction by itself."""

    def __init__(self, kept: PoolProxiedConnection, connection: Connection, transaction: Any | None) -> None:
        self.connection = connection
        self._kept = kept
        self._transaction = transaction

    @property
    def is_standby(self) -> bool:
        """Whether the server says that it is a replica; False where it tells nothing, as before PostgreSQL 14."""
        return getattr(self.connection.get_settings(), "in_hot_standby", "off") == "on"

    @property
    def has_begun(self) -> bool:
        """Whether there is a transaction that ends with `commit` alone."""
        return self._transaction is not None

    async def commit(self) -> None:
        """Commit, and give the connection back. Raises what the driver raises."""
        if self._transaction is not None:
            await self._transaction.commit()
        self._kept.info["answered_at"] = time.monotonic()
        self._kept.close()

    def drop(self) -> None:
        """
        Drop the connection without a word.

        A server that has just stopped answering would have to answer the rollback too.
        """
        self._kept.invalidate()


class Pool:
    """Connects when it is first used, so a server that is away is no error here."""

    def __init__(self, url: Secret, rules: PoolRules, timeout_s: float) -> None:
        self._url = url
        self._rules = rules
        self._timeout_s = timeout_s
        self._pool = AsyncAdaptedQueuePool(
            self._make,
            pool_size=rules.size,
            max_overflow=rules.overflow,
            recycle=int(rules.recycle_s),
            timeout=_NO_LIMIT,  # callers bring a limit of their own, for all they do
            use_lifo=True,
            reset_on_return=None,  # transactions leave nothing behind
            dialect=_DIALECT,
        )
        self._open: WeakSet[Connection] = WeakSet()
        self.name = server_name(url) or "unnamed"
        """Host and port, for people."""
        self.is_direct = True
        """Whether servers themselves answer, as far as is known; a PgBouncer passes no notifications on."""

    @property
    def in_use(self) -> int:
        """Connections that are given out."""
        return self._pool.checkedout()

    async def begin(self, *, readonly: bool = False, is_steady: bool = False, is_single: bool = False) -> Lease:
        """
        A connection on which a transaction has begun. Raises what the driver raises.

        All statements of a steady one see the same moment. For a single one nothing begins where the connection
        answered a moment ago.
        """
        isolation = "repeatable_read" if is_steady else "read_committed"
        while True:
            kept: PoolProxiedConnection = await greenlet_spawn(self._pool.connect)
            is_fresh = not kept.info
            kept.info["used"] = True
            connection: Connection = kept.driver_connection
            answered_at = kept.info.get("answered_at", -ALIVE_S)
            if is_single and time.monotonic() - answered_at < ALIVE_S and not connection.is_closed():
                return Lease(kept, connection, None)
            try:
                transaction = connection.transaction(isolation=isolation, readonly=readonly)
                await transaction.start()
            except BaseException as error:
                kept.invalidate()
                if is_fresh or not self._rules.pre_ping or not isinstance(error, LOST):
                    raise
            else:
                return Lease(kept, connection, transaction)

    async def connect(self) -> Connection:
        """A connection outside the pool, for whoever keeps it long."""
        with address_hidden():
            connection = await self._connect(STATEMENTS)
            try:
                self.is_direct = await _is_direct(connection)
            except BaseException:
                connection.terminate()
                raise
            if self.is_direct:
                return connection
            connection.terminate()
            return await self._connect(0)

    def close(self) -> None:
        """Drop all connections, those that are given out too."""
        self._pool.dispose()
        for connection in tuple(self._open):
            connection.terminate()

    def _make(self) -> Any:
        connection = await_only(self.connect())
        self._open.add(connection)
        # By itself, not by its module, which would give every error another name.
        return _ADAPTED(_DRIVER, connection)

    async def _connect(self, statements: int) -> Connection:
        return await asyncpg.connect(
            self._url.reveal(),
            timeout=self._timeout_s,
            command_timeout=self._timeout_s,
            statement_cache_size=statements,
            server_settings={"application_name": "sutazai"},
        )


async def _is_direct(connection: Connection) -> bool:
    """Whether the process that answers is the one that greeted: a pooler greets by itself."""
    transaction = connection.transaction()
    await transaction.start()
    statement = await connection.prepare("SELECT pg_backend_pid()", name="")
    pid = await statement.fetchval()
    await transaction.rollback()
    return bool(pid == connection.get_server_pid())


class _Dialect(PGDialect_asyncpg):
    """Drops connections without a goodbye, which a silent server would not answer."""

    supports_statement_cache = True

    def do_close(self, dbapi_connection: Any) -> None:
        dbapi_connection.driver_connection.terminate()

    do_terminate = do_close


_UNTYPED: Any = _Dialect
_DIALECT = _UNTYPED()
_DRIVER = _UNTYPED.import_dbapi()
_ADAPTED: Any = AsyncAdapt_asyncpg_connection
