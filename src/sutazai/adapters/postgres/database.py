"""
The one way to PostgreSQL: short transactions on the right server, and every failure as `StoreUnavailable`.

Where a PgBouncer in transaction mode may stand in between, everything runs inside an explicit transaction, and prepared
statements have no names.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from copy import copy
from functools import partial
from typing import Any

import asyncpg

from sutazai.adapters.postgres import statements
from sutazai.adapters.postgres.addresses import one_by_one
from sutazai.adapters.postgres.faults import LOST, CommitUnknown, SlotMoved, told_as_unavailable
from sutazai.adapters.postgres.pool import Connection, Lease, Pool, PoolRules
from sutazai.adapters.postgres.servers import Server, Servers, ServersState
from sutazai.core.errors import StoreUnavailable
from sutazai.core.mark import BEGINNING, Mark
from sutazai.settings.secret import Secret

__all__ = [
    "CommitUnknown",
    "Connection",
    "Database",
    "PoolRules",
    "SlotMoved",
    "open_database",
    "told_as_unavailable",
]

USUAL = PoolRules()
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.5
"""Between two tries to begin on a primary."""
TRIAL_PART = 0.5
"""Of the time limit: what a replica may take of it before another server is asked."""

Row = Any
"""An asyncpg record."""


class Database:
    """One server, or a primary with its replicas. Made by `open_database`."""

    def __init__(
        self,
        pools: Sequence[Pool],
        servers: Servers | None,
        sql: Mapping[str, str],
        *,
        timeout_s: float,
    ) -> None:
        self._pools = pools
        self._servers = servers
        self._timeout_s = timeout_s
        self._slots: Sequence[int] = ()
        self.sql = sql
        """Statements by name."""
        self.whole = self
        """What this is a view of; itself where it is none."""

    @property
    def is_direct(self) -> bool:
        """Whether servers themselves answer, as far as is known; a PgBouncer passes no notifications on."""
        return all(pool.is_direct for pool in self._pools)

    @property
    def has_replicas(self) -> bool:
        """Whether there are several servers."""
        return self._servers is not None

    def of(self, slots: Iterable[int]) -> Database:
        """
        The same database, for the data of these shard slots.

        A transaction on it holds them here until its end; it raises `SlotMoved`, before anything was read or written,
        where one of them is not here.
        """
        view = copy(self)
        view._slots = sorted(slots)
        return view

    @asynccontextmanager
    async def transaction(self, *, within_s: float | None = None) -> AsyncIterator[Connection]:
        """
        Commit at the end, or drop everything on any error. Runs on the primary.

        All of it, the wait for a connection and for a primary included, is bounded by `within_s`, or else by the
        limit of the settings; past it `StoreUnavailable`. Raises `CommitUnknown` where nobody can tell whether the
        commit took place. What has begun is not tried again: only the caller knows whether it may be.
        """
        async with self._within(within_s or self._timeout_s, self._begin_on_primary) as connection:
            yield connection

    @asynccontextmanager
    async def statement(self) -> AsyncIterator[Connection]:
        """
        The same for one statement, which is a transaction by itself: one round trip where that takes three.

        Raises `CommitUnknown` also where the connection broke before it was answered.
        """
        async with self._within(self._timeout_s, self._begin_single) as connection:
            yield connection

    @asynccontextmanager
    async def reading(self, after: Mark = BEGINNING) -> AsyncIterator[Connection]:
        """
        The same for reading alone, from a replica that is hardly late, else from the primary.

        Of a mark that `newest` gave, all that it stands for is seen. Where there is no primary, replicas answer
        however late they are, but not without that.
        """
        async with self._within(self._timeout_s, lambda: self._begin_reading(after)) as connection:
            yield connection

    async def rows(self, statement: str, *values: object, tenant: str | None, seen: Mark | None) -> Sequence[Row]:
        """
        What a statement that only reads finds, with `seen` as in `ports/marks.py`.

        What a server began and did not end, because it went away or a replica had to clean up, is asked of another
        one; all of it together is bounded as `transaction` is.
        """
        if self._servers is None or tenant is None or seen is None:
            async with self.statement() as connection:
                rows: Sequence[Row] = await connection.fetch(statement, *values)
            return rows
        with told_as_unavailable(self._timeout_s, self._about_primary):
            async with asyncio.timeout(self._timeout_s):
                return await self._rows(self._servers, seen, tenant, statement, values)

    async def _rows(
        self, servers: Servers, seen: Mark, tenant: str, statement: str, values: Sequence[object]
    ) -> Sequence[Row]:
        failed: set[Server] = set()
        pause_s = FIRST_PAUSE_S
        while True:
            server = await servers.reader(seen, tenant, but_not=failed)
            is_replica = server is not servers.leader
            try:
                async with asyncio.timeout(TRIAL_PART * self._timeout_s if is_replica else None):
                    rows = await self._fetched(await self._begin_on(servers, server, readonly=True), statement, values)
            except (asyncpg.PostgresError, *LOST) as error:
                if not (is_replica or isinstance(error, LOST)):
                    raise
                servers.misses += is_replica
                failed.add(server)
                if isinstance(error, LOST):
                    servers.doubt(server)
            else:
                server.reads += 1
                return rows
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _fetched(self, lease: Lease, statement: str, values: Sequence[object]) -> Sequence[Row]:
        try:
            # A replica has replayed all that came with a slot once it knows that the slot is here.
            await self._enter(lease)
            rows: Sequence[Row] = await lease.connection.fetch(statement, *values)
            await lease.commit()
        except BaseException:
            lease.drop()
            raise
        return rows

    async def _enter(self, lease: Lease) -> None:
        if self._slots:
            await lease.connection.execute(self.sql["enter_slots"], self._slots)

    def note(self, tenant: str) -> None:
        if self._servers is not None:
            self._servers.note(tenant)

    async def newest(self, tenant: str) -> Mark | None:
        del tenant  # a database has one log for all
        return None if self._servers is None else await self._servers.newest()

    def servers(self) -> ServersState | None:
        """What is known of several servers; None where there is one, which is not asked for itself."""
        return None if self._servers is None else self._servers.state()

    @asynccontextmanager
    async def own_connection(self) -> AsyncIterator[Connection]:
        """A connection to the primary outside the pool, to be kept long; closed without ceremony at the end."""
        with told_as_unavailable(self._timeout_s, self._about_primary):
            async with asyncio.timeout(self._timeout_s):
                pool = (await self._servers.primary()).pool if self._servers else self._pools[0]
                connection = await pool.connect()
            try:
                yield connection
            finally:
                connection.terminate()

    @asynccontextmanager
    async def _within(self, limit_s: float, begin: Callable[[], Awaitable[Lease]]) -> AsyncIterator[Connection]:
        lease: Lease | None = None
        is_committing = False

        def fate() -> str:
            if lease is None:
                return self._about_primary()
            return "" if is_committing else "Nothing of the transaction was kept."

        try:
            with told_as_unavailable(limit_s, fate):
                async with asyncio.timeout(limit_s):
                    lease = await begin()
                    try:
                        await self._enter(lease)
                        is_committing = not lease.has_begun
                        yield lease.connection
                        is_committing = True
                        await lease.commit()
                    except BaseException:
                        lease.drop()
                        raise
        except StoreUnavailable as error:
            if is_committing and isinstance(error.__cause__, (TimeoutError, *LOST)):
                raise CommitUnknown(error.message) from error
            raise

    async def _begin_single(self) -> Lease:
        # A slot is entered, a primary is told from a replica, and a PgBouncer stays with one server, in a transaction.
        if self._slots or self._servers is not None or not self.is_direct:
            return await self._begin_on_primary()
        return await self._pools[0].begin(is_single=True)

    async def _begin_on_primary(self) -> Lease:
        if self._servers is None:
            return await self._pools[0].begin()
        return await self._begin(self._servers, self._servers.primary, readonly=False)

    async def _begin_reading(self, after: Mark) -> Lease:
        if self._servers is None:
            return await self._pools[0].begin(readonly=True)
        return await self._begin(self._servers, partial(self._servers.reader, after), readonly=True)

    async def _begin(self, servers: Servers, find: Callable[[], Awaitable[Server]], *, readonly: bool) -> Lease:
        """Begin on the server that is found; where it is lost by then, find again."""
        pause_s = FIRST_PAUSE_S
        while True:
            server = await find()
            try:
                return await self._begin_on(servers, server, readonly=readonly)
            except LOST:
                servers.doubt(server)
            await asyncio.sleep(random.uniform(0.5, 1.0) * pause_s)  # noqa: S311
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _begin_on(self, servers: Servers, server: Server, *, readonly: bool) -> Lease:
        """Begin there; on a replica soon, or not at all. Raises one of `LOST`, also where a primary is none now."""
        is_primary = server is servers.leader
        async with asyncio.timeout(None if is_primary else servers.max_lag_s):
            # No lock keeps a replica from replaying that a slot has moved, between two statements.
            lease = await server.pool.begin(readonly=readonly, is_steady=not is_primary)
        if is_primary and lease.is_standby:
            lease.drop()
            raise ConnectionError
        return lease

    def _about_primary(self) -> str:
        if self._servers is None or self._servers.has_primary:
            return ""
        return f"No primary was found among the servers. {self._servers.fault}".rstrip()


@asynccontextmanager
async def open_database(
    url: Secret,
    *,
    timeout_s: float,
    rules: PoolRules = USUAL,
    replicas: Sequence[Secret] = (),
    max_lag_s: float = 1.0,
) -> AsyncIterator[Database]:
    """
    Pools that connect when they are first used, so a server that is away is no error here.

    `timeout_s` bounds each transaction, the connecting included. Where `url` and `replicas` name several servers, they
    are asked for their roles all the time, whichever of both they stand in; a replica serves while it is not later
    than `max_lag_s`.
    """
    pools = [Pool(each, rules, timeout_s) for each in one_by_one((url, *replicas))]
    sql = statements.load()
    async with AsyncExitStack() as stack:
        for pool in pools:
            stack.callback(pool.close)
        servers = None
        if len(pools) > 1:
            servers = Servers(pools, statement=sql["server_report"], max_lag_s=max_lag_s)
            await stack.enter_async_context(servers.watched())
        yield Database(pools, servers, sql, timeout_s=timeout_s)
