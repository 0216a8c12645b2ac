"""
Events and tasks as of one moment, and a copy of the tasks in the table `tasks_replayed`.

One transaction of the isolation level REPEATABLE READ sees both. Rows come through a cursor and go by COPY, so memory
is bounded by a batch; the copy is a new table without a write-ahead log, and the digests are computed by the server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import asyncpg

from sutazai.adapters.postgres.database import Connection, Database
from sutazai.adapters.postgres.tail import EventTail
from sutazai.adapters.postgres.task_rows import event_of, keys, task_of
from sutazai.core.task import Task, created_at_of, id_of, uuid_of
from sutazai.ports.replay import Comparison
from sutazai.ports.task_events import KeptEvent

LIMIT_S = 6 * 3600.0
"""Of a session; a database of years is looked through in less."""
BATCH = 5000
MOST_DIFFERING = 20
COPY = "tasks_replayed"
COLUMNS = (
    "id", "created_at", "tenant", "user_id", "agent", "queue", "status", "priority", "parent", "draft", "result",
    "result_object", "progress", "checkpoint", "version", "attempts", "deliveries", "losses", "waits_for", "worker",
    "is_cancelling", "reason", "error", "tokens", "run_at", "deadline", "started_at", "ended_at",
)  # fmt: skip
"""Of a task: all that its events decide."""
_ROW = f"ROW({', '.join(COLUMNS)})::text"
# Two seeds give 128 bits; a sum does not depend on the order of rows.
_DIGEST = (
    f"SELECT count(*), coalesce(sum(hashtextextended({_ROW}, 1)), 0)::text || ':' ||"  # noqa: S608 - constants
    f" coalesce(sum(hashtextextended({_ROW}, 2)), 0)::text FROM "
)
_DIFFERING = (
    f"SELECT coalesce(kept.id, copied.id) AS id FROM (SELECT id, {_ROW} AS told FROM tasks) AS kept"  # noqa: S608
    f" FULL JOIN (SELECT id, {_ROW} AS told FROM {COPY}) AS copied ON copied.id = kept.id"
    f" WHERE kept.told IS DISTINCT FROM copied.told ORDER BY 1 LIMIT {MOST_DIFFERING}"
)
_EVENT = "SELECT position, task, version, tenant, kind, schema, at, data FROM events"


class PostgresReplayStore:
    """The `ReplayStore` of production."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tail = EventTail(database)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[PostgresReplaySession]:
        async with self._database.transaction(within_s=LIMIT_S) as connection:
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            yield PostgresReplaySession(connection, self._database.sql)

    async def tail(self, *, after: int, limit: int) -> Sequence[KeptEvent]:
        return await self._tail.read(after=after, limit=limit)


class PostgresReplaySession:
    """One transaction."""

    def __init__(self, connection: Connection, sql: Mapping[str, str]) -> None:
        self._connection = connection
        self._sql = sql

    async def events(self, *, until: datetime | None = None, task: str = "") -> AsyncIterator[Sequence[KeptEvent]]:
        latest = until or datetime.max.replace(tzinfo=UTC)
        if task:
            arguments = (latest, uuid_of(task), created_at_of(task))
            batches = self._batches(
                f"{_EVENT} WHERE at <= $1 AND task = $2 AND created_at = $3 ORDER BY version", arguments
            )
        else:
            batches = self._batches(f"{_EVENT} WHERE at <= $1 ORDER BY task, version", (latest,))
        async for batch in batches:
            yield batch

    async def in_order(self) -> AsyncIterator[Sequence[KeptEvent]]:
        async for batch in self._batches(f"{_EVENT} ORDER BY position", ()):
            yield batch

    async def _batches(self, query: str, arguments: Sequence[object]) -> AsyncIterator[Sequence[KeptEvent]]:
        cursor = await self._connection.cursor(query, *arguments, timeout=LIMIT_S)
        while rows := await cursor.fetch(BATCH, timeout=LIMIT_S):
            yield [event_of(row) for row in rows]

    async def count(self) -> tuple[int, int]:
        tasks: int = await self._connection.fetchval("SELECT count(*) FROM tasks", timeout=LIMIT_S)
        # Exact counting would read the whole table once more; this is for a bar that fills.
        events: int = await self._connection.fetchval(
            "SELECT coalesce(sum(greatest(reltuples, 0)), 0)::bigint FROM pg_class"
            " WHERE oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'events'::regclass)"
        )
        return tasks, events

    async def newest(self) -> int:
        position: int = await self._connection.fetchval("SELECT coalesce(max(position), 0) FROM events")
        return position

    async def tasks(self, ids: Sequence[str]) -> Mapping[str, Task]:
        rows = await self._connection.fetch(self._sql["tasks_by_id"], None, *keys(ids), timeout=LIMIT_S)
        return {task.id: task for task in map(task_of, rows)}

    async def empty_copy(self) -> None:
        await self._connection.execute(
            f"DROP TABLE IF EXISTS {COPY}; CREATE UNLOGGED TABLE {COPY} (LIKE tasks INCLUDING DEFAULTS)"
        )

    async def add(self, tasks: Sequence[tuple[Task, str]]) -> None:
        await self._connection.copy_records_to_table(
            COPY, records=[row_of(task, draft) for task, draft in tasks], columns=COLUMNS, timeout=LIMIT_S
        )

    async def compare(self) -> Comparison:
        kept: asyncpg.Record = await self._connection.fetchrow(f"{_DIGEST} tasks", timeout=LIMIT_S)
        copied: asyncpg.Record = await self._connection.fetchrow(f"{_DIGEST} {COPY}", timeout=LIMIT_S)
        differing: Sequence[asyncpg.Record] = ()
        if tuple(kept) != tuple(copied):
            differing = await self._connection.fetch(_DIFFERING, timeout=LIMIT_S)
        return Comparison(
            kept=kept[0],
            replayed=copied[0],
            kept_digest=kept[1],
            replayed_digest=copied[1],
            differing=[id_of(row["id"]) for row in differing],
        )


def row_of(task: Task, draft: str) -> tuple[object, ...]:
    """In the order of `COLUMNS`."""
    asked = task.draft
    return (
        uuid_of(task.id), task.created_at, asked.tenant, asked.user, asked.agent, asked.queue, task.status.value,
        asked.priority.value, uuid_of(asked.parent) if asked.parent else None, draft, task.result, task.result_object,
        task.progress, task.checkpoint, task.version, task.attempts, task.deliveries, task.losses, task.waits_for,
        task.worker, task.is_cancelling, None if task.reason is None else task.reason.value, task.error, task.tokens,
        task.run_at, asked.deadline, task.started_at, task.ended_at,
    )  # fmt: skip
