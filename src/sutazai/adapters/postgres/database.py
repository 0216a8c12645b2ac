"""
The one way to PostgreSQL: short transactions on the right server, and every failure as `StoreUnavailable`.

Everything runs inside an explicit transaction, and prepared statements have names only where no pooler stands in
between, so a PgBouncer in transaction mode may.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from copy import copy

from sutazai.adapters.postgres import statements
from sutazai.adapters.postgres.addresses import one_by_one
from sutazai.adapters.postgres.faults import LOST, CommitUnknown, SlotMoved, told_as_unavailable
from sutazai.adapters.postgres.pool import Connection, Lease, Pool, PoolRules
from sutazai.adapters.postgres.servers import Position, Servers
from sutazai.core.errors import StoreUnavailable
from sutazai.settings.secret import Secret

__all__ = [
    "CommitUnknown",
    "Connection",
    "Database",
    "PoolRules",
    "Position",
    "SlotMoved",
    "open_database",
    "told_as_unavailable",
]

USUAL = PoolRules()
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.5
"""Between two tries to begin on a primary."""


class Database:
    """One server, or a primary with its replicas. Made by `open_database`."""

    def __init__(
        self, pools: Sequence[Pool], servers: Servers | None, sql: Mapping[str, str], timeout_s: float
    ) -> None:
        self._pools = pools
        self._servers = servers
        self._timeout_s = timeout_s
        self._slots: Sequence[int] = ()
        self.sql = sql
        """Statements by name."""

    @property
    def is_direct(self) -> bool:
        """Whether servers themselves answer, as far as is known; a PgBouncer passes no notifications on."""
        return all(pool.is_direct for pool in self._pools)

    def of(self, slots: Iterable[int]) -> Database:
        """
        The same database, for the data of these shard slots.

        A transaction on it holds them here until its end; it raises `SlotMoved`, before anything was read or written,
        where one of them is not here. It reads from the primary: a replica does not know yet what has just left.
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
    async def reading(self, after: Position | None = None) -> AsyncIterator[Connection]:
        """
        The same for reading alone, from a replica that is hardly late, else from the primary.

        `after` is what `token` gave: all that was committed before it is seen. Where there is no primary,
        replicas answer however late they are, but not before `after`.
        """
        async with self._within(self._timeout_s, lambda: self._begin_reading(after)) as connection:
            yield connection

    async def token(self) -> Position | None:
        """For `reading` after what is committed by now; None where there is one server, which needs none."""
        if self._servers is None:
            return None
        async with self.transaction() as connection:
            return int(await connection.fetchval(self.sql["log_position"]))

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
                        if self._slots:
                            await lease.connection.execute(self.sql["enter_slots"], self._slots)
                        yield lease.connection
                        is_committing = True
                        await lease.commit()
                    except BaseException:
                        lease.drop()
                        raise
        except StoreUnavailable as error:
            if is_committing:
                raise CommitUnknown(error.message) from error
            raise

    async def _begin_on_primary(self, *, readonly: bool = False) -> Lease:
        if self._servers is None:
            return await self._pools[0].begin(readonly=readonly)
        pause_s = FIRST_PAUSE_S
        while True:
            server = await self._servers.primary()
            try:
                lease = await server.pool.begin(readonly=readonly)
            except LOST:
                pass
            else:
                if not lease.is_standby:
                    return lease
                lease.drop()
            self._servers.doubt(server)
            await asyncio.sleep(random.uniform(0.5, 1.0) * pause_s)  # noqa: S311
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _begin_reading(self, after: Position | None) -> Lease:
        if self._servers is not None and not self._slots:
            for server in await self._servers.replicas(after):
                try:
                    async with asyncio.timeout(self._servers.max_lag_s):
                        return await server.pool.begin(readonly=True)
                except LOST:
                    self._servers.doubt(server)
        return await self._begin_on_primary(readonly=True)

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
        yield Database(pools, servers, sql, timeout_s)
