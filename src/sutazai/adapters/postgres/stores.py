"""Opens the stores: starts our own PostgreSQL where none was named, and brings its tables up to date."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.audit import PostgresAuditLog
from sutazai.adapters.postgres.clock import DatabaseClock
from sutazai.adapters.postgres.database import Database, PoolRules, open_database
from sutazai.adapters.postgres.embedded import EmbeddedPostgres
from sutazai.adapters.postgres.files import PostgresFileStore
from sutazai.adapters.postgres.keys import PostgresKeyStore
from sutazai.adapters.postgres.messages import PostgresMessageStore
from sutazai.adapters.postgres.queue import MAX_LENGTH, PROMOTE_AFTER_S, PostgresQueue
from sutazai.adapters.postgres.replay import PostgresReplayStore
from sutazai.adapters.postgres.schedules import PostgresScheduleStore
from sutazai.adapters.postgres.sessions import PostgresSessionStore
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.adapters.postgres.tenants import PostgresTenantStore
from sutazai.adapters.postgres.usage import PostgresUsageStore
from sutazai.adapters.postgres.webhooks import PostgresWebhookStore
from sutazai.ports.audit import AuditLog
from sutazai.ports.files import FileStore
from sutazai.ports.keys import KeyStore, UsageStore
from sutazai.ports.messages import MessageStore
from sutazai.ports.replay import ReplayStore
from sutazai.ports.schedules import ScheduleStore
from sutazai.ports.sessions import SessionStore
from sutazai.ports.tasks import TaskStore
from sutazai.ports.tenants import TenantStore
from sutazai.ports.webhooks import WebhookStore
from sutazai.settings.model import Database as DatabaseSettings
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
    queue: PostgresQueue
    messages: MessageStore
    files: FileStore
    webhooks: WebhookStore
    schedules: ScheduleStore
    database: Database | None = None
    """What they are kept in, for its upkeep; None in memory."""
    clock: DatabaseClock | None = None
    """Its time; None in memory."""
    replay: ReplayStore | None = None
    """None in memory, where nothing can have gone astray."""

    def wall(self) -> datetime:
        """The time that all who share these stores go by."""
        return datetime.now(UTC) if self.clock is None else self.clock()


@asynccontextmanager
async def open_stores(
    settings: DatabaseSettings,
    data_dir: Path,
    *,
    max_length: int = MAX_LENGTH,
    promote_after_s: float = PROMOTE_AFTER_S,
) -> AsyncIterator[Stores]:
    """
    The stores, ready to use.

    Raises `StoreUnavailable` where the server did not start or answer, or its tables do not fit this program.
    `data_dir` is used only where `settings.url` is None.

    Args:
        max_length: bounds the tasks that wait in one queue.
        promote_after_s: bounds how long tasks of lower priorities are passed over altogether.
    """
    async with AsyncExitStack() as stack:
        url = settings.url
        if url is None:
            url = await stack.enter_async_context(_own_server(data_dir))
        yield await stack.enter_async_context(_connected(url, settings, max_length, promote_after_s))


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


@asynccontextmanager
async def _connected(
    url: Secret, settings: DatabaseSettings, max_length: int, promote_after_s: float
) -> AsyncIterator[Stores]:
    async with connected(url, settings) as database:
        await migrate.migrate(database, migrate.read())
        clock = DatabaseClock(database)
        await clock.ask()
        yield Stores(
            database=database,
            clock=clock,
            keys=PostgresKeyStore(database),
            usage=PostgresUsageStore(database),
            tenants=PostgresTenantStore(database),
            audit=PostgresAuditLog(database),
            sessions=PostgresSessionStore(database),
            tasks=PostgresTaskStore(database, max_length=max_length, wall=clock),
            queue=PostgresQueue(database, max_length=max_length, promote_after_s=promote_after_s, wall=clock),
            messages=PostgresMessageStore(database),
            replay=PostgresReplayStore(database),
            webhooks=PostgresWebhookStore(database),
            schedules=PostgresScheduleStore(database),
            files=PostgresFileStore(database),
        )


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
