"""Opens the stores: starts our own PostgreSQL where none was named, and brings its tables up to date."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.audit import PostgresAuditLog
from sutazai.adapters.postgres.broadcasts import PostgresBroadcastStore
from sutazai.adapters.postgres.clock import DatabaseClock
from sutazai.adapters.postgres.database import Database, PoolRules, open_database
from sutazai.adapters.postgres.embedded import EmbeddedPostgres
from sutazai.adapters.postgres.files import PostgresFileStore
from sutazai.adapters.postgres.keys import PostgresKeyStore
from sutazai.adapters.postgres.messages import PostgresMessageStore
from sutazai.adapters.postgres.queue import MAX_LENGTH, PROMOTE_AFTER_S, PostgresQueue
from sutazai.adapters.postgres.refill import PostgresRefillStore
from sutazai.adapters.postgres.replay import PostgresReplayStore
from sutazai.adapters.postgres.schedules import PostgresScheduleStore
from sutazai.adapters.postgres.sessions import PostgresSessionStore
from sutazai.adapters.postgres.sharded.homes import HomedTenantStore
from sutazai.adapters.postgres.sharded.queue import ShardedQueue
from sutazai.adapters.postgres.sharded.shards import ANY, Shards, check_unsharded
from sutazai.adapters.postgres.sharded.stores import (
    ShardedFileStore,
    ShardedMarks,
    ShardedMessageStore,
    ShardedScheduleStore,
    ShardedSessionStore,
    ShardedWebhookStore,
)
from sutazai.adapters.postgres.sharded.tasks import ShardedTaskStore
from sutazai.adapters.postgres.sharded.watching import MoveWatch
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.adapters.postgres.tenants import PostgresTenantStore
from sutazai.adapters.postgres.usage import PostgresUsageStore
from sutazai.adapters.postgres.webhooks import PostgresWebhookStore
from sutazai.ports.audit import AuditLog
from sutazai.ports.broadcasts import BroadcastStore
from sutazai.ports.files import FileStore
from sutazai.ports.keys import KeyStore, UsageStore
from sutazai.ports.marks import Marks
from sutazai.ports.messages import MessageStore
from sutazai.ports.refill import RefillStore
from sutazai.ports.replay import ReplayStore
from sutazai.ports.schedules import ScheduleStore
from sutazai.ports.sessions import SessionStore
from sutazai.ports.tasks import TaskStore
from sutazai.ports.tenants import TenantStore
from sutazai.ports.webhooks import WebhookStore
from sutazai.settings.model import Database as DatabaseSettings
from sutazai.settings.model import Shard
from sutazai.settings.secret import Secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """What PostgreSQL keeps for us."""

    keys: KeyStore
    usage: UsageStore
    tenants: TenantStore
    audit: AuditLog
    sessions: SessionStore
    tasks: TaskStore
    queue: PostgresQueue | ShardedQueue
    messages: MessageStore
    files: FileStore
    webhooks: WebhookStore
    schedules: ScheduleStore
    marks: Marks
    databases: Mapping[str, Database] = field(default_factory=dict)
    """Where tenants' data is kept, for its upkeep, by the name of the shard: empty where there are no shards. None in
    memory."""
    clock: DatabaseClock | None = None
    """The time of the first database; None in memory."""
    replays: Mapping[str, ReplayStore] = field(default_factory=dict)
    """As `databases`. None in memory, where nothing goes astray."""
    broadcasts: Sequence[BroadcastStore] = ()
    """One of each database; none in memory, which no broker is beside."""
    refills: Sequence[RefillStore] = ()
    """One of each database; none in memory, which loses nothing."""

    def wall(self) -> datetime:
        """The time that all who share these stores go by."""
        return datetime.now(UTC) if self.clock is None else self.clock()


@asynccontextmanager
async def open_stores(
    settings: DatabaseSettings,
    data_dir: Path,
    *,
    shards: Sequence[Shard] = (),
    max_length: int = MAX_LENGTH,
    promote_after_s: float = PROMOTE_AFTER_S,
) -> AsyncIterator[Stores]:
    """
    The stores, ready to use.

    Args:
        data_dir: used only where `settings.url` is None.
        shards: those of `[[shards]]`; those of other regions are left alone.
        max_length: of the tasks that wait in one queue, in each shard.
        promote_after_s: bounds how long tasks of lower priorities are passed over altogether.

    Raises `StoreUnavailable` where a server did not start or answer, or its tables do not fit this program.
    """
    async with open_bare(settings, data_dir) as database:
        await migrate.migrate(database, migrate.read())
        clock = DatabaseClock(database)
        await clock.ask()
        if not shards:
            await check_unsharded(database)
            yield _stores(database, clock, max_length, promote_after_s)
            return
        async with open_shards(database, settings, shards) as opened:
            await opened.refresh()
            # No task group: it would wrap what the caller raises.
            beside = [
                asyncio.create_task(opened.run(), name="follow the shards"),
                asyncio.create_task(MoveWatch(database, opened).run(), name="watch movers of shard slots"),
            ]
            try:
                yield _sharded_stores(database, opened, clock, max_length, promote_after_s)
            finally:
                for one in beside:
                    one.cancel()
                await asyncio.wait(beside)


@asynccontextmanager
async def _own_server(data_dir: Path) -> AsyncIterator[Secret]:
    server = EmbeddedPostgres()
    url = await server.start(data_dir)
    # No task group: it would wrap what the caller raises.
    tending = asyncio.create_task(server.tend(), name="tend embedded PostgreSQL")
    try:
        yield Secret(url)
    finally:
        tending.cancel()
        await asyncio.wait([tending])
        await server.stop()


def _stores(database: Database, clock: DatabaseClock, max_length: int, promote_after_s: float) -> Stores:
    queue = PostgresQueue(database, max_length=max_length, promote_after_s=promote_after_s, wall=clock)
    return Stores(
        databases={"": database},
        marks=database,
        keys=PostgresKeyStore(database),
        usage=PostgresUsageStore(database),
        tenants=PostgresTenantStore(database),
        audit=PostgresAuditLog(database),
        sessions=PostgresSessionStore(database),
        clock=clock,
        tasks=PostgresTaskStore(database, max_length=max_length, queue=queue, wall=clock),
        queue=queue,
        messages=PostgresMessageStore(database),
        replays={"": PostgresReplayStore(database)},
        broadcasts=[PostgresBroadcastStore(database)],
        refills=[PostgresRefillStore(database)],
        webhooks=PostgresWebhookStore(database),
        schedules=PostgresScheduleStore(database),
        files=PostgresFileStore(database),
    )


def _sharded_stores(
    directory: Database, shards: Shards, clock: DatabaseClock, max_length: int, promote_after_s: float
) -> Stores:
    return Stores(
        databases=shards.databases,
        marks=ShardedMarks(shards),
        keys=PostgresKeyStore(directory),
        usage=PostgresUsageStore(directory),
        tenants=HomedTenantStore(PostgresTenantStore(directory), shards),
        audit=PostgresAuditLog(directory),
        sessions=ShardedSessionStore(shards),
        clock=clock,
        tasks=ShardedTaskStore(shards, max_length=max_length, wall=clock),
        queue=ShardedQueue(shards, max_length=max_length, promote_after_s=promote_after_s, wall=clock),
        replays={name: PostgresReplayStore(database) for name, database in shards.databases.items()},
        messages=ShardedMessageStore(shards),
        broadcasts=[PostgresBroadcastStore(database, shard=name) for name, database in shards.databases.items()],
        refills=[PostgresRefillStore(database.of(ANY)) for database in shards.databases.values()],
        webhooks=ShardedWebhookStore(shards),
        schedules=ShardedScheduleStore(shards),
        files=ShardedFileStore(shards),
    )


@asynccontextmanager
async def open_shards(
    directory: Database, settings: DatabaseSettings, shards: Sequence[Shard]
) -> AsyncIterator[Shards]:
    """Those of this process's region, their tables brought up to date. Raises `StoreUnavailable`."""
    async with AsyncExitStack() as stack:
        databases: dict[str, Database] = {}
        for shard in shards:
            if shard.region == settings.region and shard.url is None:
                databases[shard.name] = directory
            elif shard.region == settings.region and shard.url is not None:
                own = msgspec.structs.replace(settings, replicas=shard.replicas)
                databases[shard.name] = await stack.enter_async_context(connected(shard.url, own))
        opened = Shards(directory, databases, region=settings.region)
        for database in databases.values():
            await migrate.migrate(database, migrate.read())
        await opened.check_names()
        yield opened


def connected(url: Secret, settings: DatabaseSettings) -> AbstractAsyncContextManager[Database]:
    """The database at this address, with the pool and the replicas of the settings."""
    return open_database(
        url,
        timeout_s=settings.timeout_s,
        rules=PoolRules(
            size=settings.pool_size,
            overflow=settings.max_overflow,
            recycle_s=settings.pool_recycle_s,
            pre_ping=settings.pool_pre_ping,
        ),
        replicas=settings.replicas,
        max_lag_s=settings.replica_max_lag_s,
    )


@asynccontextmanager
async def open_bare(settings: DatabaseSettings, data_dir: Path) -> AsyncIterator[Database]:
    """The database as it is, whatever tables it has. Takes and raises what `open_stores` does."""
    async with AsyncExitStack() as stack:
        url = settings.url
        if url is None:
            url = await stack.enter_async_context(_own_server(data_dir))
        yield await stack.enter_async_context(connected(url, settings))
