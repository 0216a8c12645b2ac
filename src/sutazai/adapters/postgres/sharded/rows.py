"""
Rows of some shard slots, from one database to another.

Tasks and their events are found by the positions of events: whatever happens to a task adds one, so that what changed
since the last pass is known without a look at the rest. All other tables are compared by checksums of their rows,
but for what each database gives them itself. What was written is read back, and its checksum compared with the one of
the source as of the moment it was read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from typing import Any
from uuid import UUID

from sutazai.adapters.postgres.database import Connection, Database
from sutazai.adapters.postgres.dispatch_rows import put
from sutazai.adapters.postgres.sharded.handover import OVERTAKEN
from sutazai.adapters.postgres.tables import metadata
from sutazai.core.errors import StoreUnavailable
from sutazai.core.request import Priority
from sutazai.core.task import id_of
from sutazai.ports.queue import Message

AT_ONCE = 500
ROWS_AT_ONCE = 2000
MAX_BYTES = 4 * 2**20
"""Of tasks in one piece, about."""
PIECE_S = 120.0
"""For one piece."""
WRITER_S = 30.0
"""For those who write events, until what they wrote is seen."""
POLL_S = 0.02
NIL = UUID(int=0)

TaskKey = tuple[UUID, datetime]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A table whose rows are compared one by one."""

    table: str
    key: tuple[str, ...]
    whose: str
    """Which of its rows belong to the tenants $1 or the slots $2."""
    needs: str = "true"
    """What must be at the other side before a row can be."""
    own: str = ""
    """A column that each database gives itself."""

    @property
    def columns(self) -> Sequence[str]:
        """What both sides have to have."""
        return [column.name for column in metadata.tables[self.table].columns if column.name != self.own]

    @property
    def hash(self) -> str:
        """The checksum of a row, as SQL."""
        columns = ", ".join(f"{self.table}.{column}" for column in self.columns)
        return f"hashtextextended(ROW({columns})::text, 1)"

    @property
    def keys(self) -> str:
        """The columns of its key, as SQL."""
        return ", ".join(self.key)


OF_TENANTS = "tenant = ANY ($1::text[])"
TASKS = Kept(table="tasks", key=("id", "created_at"), whose=OF_TENANTS)
TABLES = (
    Kept(table="task_keys", key=("tenant", "key"), whose=OF_TENANTS),
    Kept(table="task_waits", key=("waits_for", "waiter"), whose="sutazai_slot(waits_for) = ANY ($2::integer[])"),
    Kept(table="webhooks", key=("task", "version"), whose="sutazai_slot(task) = ANY ($2::integer[])"),
    Kept(table="schedules", key=("id",), whose=OF_TENANTS),
    Kept(table="files", key=("id",), whose=OF_TENANTS),
    Kept(table="agent_messages", key=("tenant", "name", "number"), whose=OF_TENANTS, own="position"),
    Kept(table="sessions", key=("id",), whose=OF_TENANTS),
    Kept(
        table="session_messages",
        key=("session_id", "number"),
        whose=f"session_id IN (SELECT id FROM sessions WHERE {OF_TENANTS})",
        needs="EXISTS (SELECT FROM sessions WHERE sessions.id = session_id)",
    ),
)
"""In the order in which they can be written."""
TENANTS_IN = ("tasks", "task_keys", "schedules", "files", "agent_messages", "sessions")

# ruff: noqa: S608 - names of our own tables


class Rows:
    """The rows of some slots in two databases."""

    def __init__(self, source: Database, target: Database, slots: Sequence[int], mover: str) -> None:
        """
        Args:
            mover: who has to be the one that moves them, for anything to be written; empty where nothing is.
        """
        self._source = source
        self._target = target
        self._sql = source.sql
        self._slots = list(slots)
        self._mover = mover
        self.copied = 0
        """Tasks and other rows written so far."""

    async def tenants(self) -> Sequence[str]:
        """Whose rows these are: all that have some at the source."""
        found: set[str] = set()
        async with self._source.transaction(within_s=PIECE_S) as connection:
            for table in TENANTS_IN:
                found.update(row[0] for row in await connection.fetch(_tenants(table), self._slots))
        return sorted(found)

    async def count(self, tenants: Sequence[str]) -> int:
        """The tasks at the source."""
        async with self._source.transaction(within_s=PIECE_S) as connection:
            return int((await connection.fetchrow(self._sql["count_tasks_of_tenants"], tenants))["tasks"])

    async def mark(self) -> int:
        """A position: what was done to tasks up to it can be seen by now."""
        async with self._source.transaction() as connection:
            position = int(await connection.fetchval(self._sql["given_position"]))
            writers = set(await connection.fetchval(self._sql["writers"], "events"))
        until = monotonic() + WRITER_S
        while writers:
            if monotonic() > until:
                raise StoreUnavailable(f"A transaction wrote events for more than {WRITER_S:g} s. {GIVEN_UP}")
            await asyncio.sleep(POLL_S)
            async with self._source.transaction() as connection:
                writers &= set(await connection.fetchval(self._sql["writers"], "events"))
        return position

    async def copy_tasks(self, tenants: Sequence[str], note: Callable[[], None]) -> None:
        """All tasks with their events."""
        for tenant in tenants:
            last = NIL
            while True:
                async with self._source.transaction(within_s=PIECE_S) as connection:
                    page = await connection.fetch(self._sql["task_keys_of_tenant"], tenant, last, AT_ONCE)
                if not page:
                    break
                for piece in _pieces(page):
                    await self._copy_tasks(piece)
                    note()
                last = page[-1]["id"]

    async def copy_changed(self, since: int) -> int:
        """Tasks that something happened to past that position; how many."""
        count = 0
        while True:
            async with self._source.transaction(within_s=PIECE_S) as connection:
                page = await connection.fetch(self._sql["tasks_changed_since"], since, self._slots, ROWS_AT_ONCE)
            if not page:
                return count
            for piece in _pieces(page):
                await self._copy_tasks(piece)
                count += len(piece)
            since = page[-1]["position"]

    async def _copy_tasks(self, keys: Sequence[TaskKey]) -> None:
        columns = [[one for one, _ in keys], [created_at for _, created_at in keys]]
        async with self._writing() as target:
            there = {row["id"]: row["version"] for row in await target.fetch(self._sql["task_versions"], *columns)}
            async with self._source.transaction(within_s=PIECE_S) as connection:
                await connection.execute(self._sql["plain_forms"])
                since = [there.get(one, 0) for one, _ in keys]
                packed = await connection.fetchrow(self._sql["pack_tasks"], *columns, since, timeout=PIECE_S)
            if packed["tasks"]:
                await target.execute(_write(TASKS), packed["tasks"], timeout=PIECE_S)
            if packed["events"]:
                await target.execute(self._sql["unpack_events"], packed["events"], timeout=PIECE_S)
            written = await target.fetchrow(self._sql["pack_tasks"], *columns, [2**31 - 1] * len(keys), timeout=PIECE_S)
            for what in ("tasks", "events"):
                if packed[f"{what}_checksum"] != written[f"{what}_checksum"]:
                    raise StoreUnavailable(f"Some {what} were not at the target as they were written. {GIVEN_UP}")
        self.copied += len(keys)

    async def copy_tables(self, tenants: Sequence[str], note: Callable[[], None]) -> None:
        """What differs in all other tables."""
        ours, theirs = await self._sums(tenants)
        differing = [kept for kept in TABLES if ours[kept.table] != theirs[kept.table]]
        for kept in differing:
            await self._copy_table(kept, tenants, note)
        for kept in differing:
            await self._drop_extra(kept, tenants)

    async def _copy_table(self, kept: Kept, tenants: Sequence[str], note: Callable[[], None]) -> None:
        last: Sequence[Any] = ()
        while True:
            async with self._source.transaction(within_s=PIECE_S) as connection:
                await connection.execute(self._sql["plain_forms"])
                page = await connection.fetch(_page(kept, last), tenants, self._slots, *last, timeout=PIECE_S)
            if not page:
                return
            asked = f"[{','.join(row['row_key'] for row in page)}]"
            async with self._writing() as target:
                rows = await target.fetch(_hashes(kept), asked, timeout=PIECE_S)
                there = {row["row_key"]: row["hash"] for row in rows}
                differing = [row["row_key"] for row in page if there.get(row["row_key"]) != row["hash"]]
                if differing:
                    async with self._source.transaction(within_s=PIECE_S) as connection:
                        await connection.execute(self._sql["plain_forms"])
                        packed = await connection.fetchval(_pack(kept), f"[{','.join(differing)}]", timeout=PIECE_S)
                    if packed:
                        await target.execute(_write(kept), packed, timeout=PIECE_S)
                    self.copied += len(differing)
            note()
            last = [page[-1][column] for column in kept.key]

    async def _drop_extra(self, kept: Kept, tenants: Sequence[str]) -> None:
        """Rows of the target that the source has no more."""
        last: Sequence[Any] = ()
        while True:
            async with self._writing() as target:
                page = await target.fetch(_page(kept, last), tenants, self._slots, *last, timeout=PIECE_S)
                if not page:
                    return
                asked = f"[{','.join(row['row_key'] for row in page)}]"
                async with self._source.transaction(within_s=PIECE_S) as connection:
                    rows = await connection.fetch(_hashes(kept), asked, timeout=PIECE_S)
                extra = {row["row_key"] for row in page} - {row["row_key"] for row in rows}
                if extra:
                    await target.execute(_drop(kept), f"[{','.join(extra)}]", timeout=PIECE_S)
                last = [page[-1][column] for column in kept.key]

    async def verify(self, tenants: Sequence[str]) -> Mapping[str, int]:
        """
        How many rows of each table both sides have. Raises `StoreUnavailable` where they are not the same.

        Of tasks and events, whose every piece was compared when it was written, the numbers are compared.
        """
        ours, theirs = await self._sums(tenants)
        for table, (count, checksum) in ours.items():
            if theirs[table] != (count, checksum):
                other = theirs[table][0]
                raise StoreUnavailable(
                    f"{table} were not the same: {count} rows at the source, {other} at the target. {GIVEN_UP}"
                )
        return {table: count for table, (count, _) in ours.items()}

    async def _sums(self, tenants: Sequence[str]) -> Sequence[Mapping[str, tuple[int, str]]]:
        """The number of rows of each table and their checksum, at the source and at the target."""

        async def sums(database: Database) -> Mapping[str, tuple[int, str]]:
            async with database.transaction(within_s=PIECE_S) as connection:
                await connection.execute(self._sql["plain_forms"])
                row = await connection.fetchrow(self._sql["count_tasks_of_tenants"], tenants, timeout=PIECE_S)
                others = await connection.fetch(_SUMS, tenants, self._slots, timeout=PIECE_S)
            tasks = {"tasks": (row["tasks"], ""), "events": (row["events"], "")}
            return tasks | {name: (count, checksum) for name, count, checksum in others}

        return await asyncio.gather(sums(self._source), sums(self._target))

    async def move_words(self) -> None:
        """Word of tasks in the queue of the source, to that of the target. What is held by a worker stays."""
        while True:
            async with self._source.transaction(within_s=PIECE_S) as connection:
                rows = await connection.fetch(self._sql["words_of_slots"], self._slots, AT_ONCE)
            if not rows:
                return
            words = [(_message(row), row["available_at"]) for row in rows]
            delivered = [row for row in rows if row["deliveries"]]
            async with self._target.transaction(within_s=PIECE_S) as connection:
                await put(connection, self._sql, words, now=datetime.now(UTC))
                if delivered:
                    columns = [[row[name] for row in delivered] for name in ("task", "deliveries")]
                    await connection.execute(self._sql["mark_words_delivered"], *columns)
            async with self._source.transaction(within_s=PIECE_S) as connection:
                await connection.execute(self._sql["drop_words"], [row["id"] for row in rows])

    async def drop(self, tenants: Sequence[str]) -> None:
        """The rows of the source, once it has left them."""
        for tenant in tenants:
            while True:
                async with self._leaving() as connection:
                    page = await connection.fetch(self._sql["task_keys_of_tenant"], tenant, NIL, AT_ONCE)
                    columns = [[row["id"] for row in page], [row["created_at"] for row in page]]
                    await connection.execute(self._sql["drop_events_of_tasks"], *columns, timeout=PIECE_S)
                    await connection.execute(self._sql["drop_tasks"], *columns, timeout=PIECE_S)
                if len(page) < AT_ONCE:
                    break
        for kept in reversed(TABLES):
            last: Sequence[Any] = ()
            while True:
                async with self._leaving() as connection:
                    page = await connection.fetch(_page(kept, last), tenants, self._slots, *last, timeout=PIECE_S)
                    if not page:
                        break
                    asked = f"[{','.join(row['row_key'] for row in page)}]"
                    await connection.execute(_drop(kept), asked, timeout=PIECE_S)
                    last = [page[-1][column] for column in kept.key]

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[Connection]:
        async with _held(self._target, self._slots, "arriving", self._mover) as connection:
            await connection.execute(self._sql["plain_forms"])
            yield connection

    @asynccontextmanager
    async def _leaving(self) -> AsyncIterator[Connection]:
        async with _held(self._source, self._slots, "left", self._mover) as connection:
            yield connection


GIVEN_UP = "Nothing was handed over; begin the move again."


@asynccontextmanager
async def _held(database: Database, slots: Sequence[int], state: str, mover: str) -> AsyncIterator[Connection]:
    """A transaction in which the slots stay as they are. Raises `StoreUnavailable` where they are something else."""
    async with database.transaction(within_s=PIECE_S) as connection:
        rows = await connection.fetch(database.sql["hold_slots"], slots, state, mover)
        if len(rows) != len(slots):
            raise StoreUnavailable(OVERTAKEN)
        yield connection


def _pieces(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[TaskKey]]:
    """Tasks that fit together, each once."""
    piece: dict[TaskKey, None] = {}
    size = 0
    for row in rows:
        piece[row["id"], row["created_at"]] = None
        size += row["size_bytes"]
        if size > MAX_BYTES:
            yield list(piece)
            piece, size = {}, 0
    if piece:
        yield list(piece)


def _message(row: Mapping[str, Any]) -> Message:
    return Message(
        task=id_of(row["task"]),
        queue=row["queue"],
        tenant=row["tenant"],
        agent=row["agent"],
        priority=Priority(row["priority"]),
    )


def _tenants(table: str) -> str:
    """The tenants in a table, from one to the next: an index has them together."""
    live = " AND deleted_at IS NULL" if table == "tasks" else ""
    return (
        f"WITH RECURSIVE found AS ((SELECT tenant FROM {table} WHERE true{live} ORDER BY tenant LIMIT 1) UNION ALL"
        f" SELECT (SELECT tenant FROM {table} WHERE tenant > found.tenant{live} ORDER BY tenant LIMIT 1) FROM found"
        " WHERE found.tenant IS NOT NULL)"
        " SELECT tenant FROM found WHERE tenant IS NOT NULL AND sutazai_slot(tenant) = ANY ($1::integer[])"
    )


def _key_json(kept: Kept) -> str:
    pairs = ", ".join(f"'{column}', {kept.table}.{column}" for column in kept.key)
    return f"json_build_object({pairs})::text"


def _page(kept: Kept, last: Sequence[Any]) -> str:
    """Keys and checksums past a key."""
    past = f" AND ({kept.keys}) > ({', '.join(f'${3 + place}' for place in range(len(last)))})" if last else ""
    unused = " AND $1::text[] IS NOT NULL AND $2::integer[] IS NOT NULL"
    return (
        f"SELECT {kept.keys}, {_key_json(kept)} AS row_key, {kept.hash} AS hash"
        f" FROM {kept.table} WHERE {kept.whose}{unused}{past} ORDER BY {kept.keys} LIMIT {ROWS_AT_ONCE}"
    )


def _hashes(kept: Kept) -> str:
    return (
        f"SELECT {_key_json(kept)} AS row_key, {kept.hash} AS hash FROM {kept.table}"
        f" WHERE ({kept.keys}) IN (SELECT {kept.keys} FROM json_populate_recordset(NULL::{kept.table}, $1::json))"
    )


def _pack(kept: Kept) -> str:
    return (
        f"SELECT json_agg({kept.table} ORDER BY {kept.keys})::text FROM {kept.table}"  # so they get positions in order
        f" WHERE ({kept.keys}) IN (SELECT {kept.keys} FROM json_populate_recordset(NULL::{kept.table}, $1::json))"
    )


def _write(kept: Kept) -> str:
    columns = ", ".join(kept.columns)
    news = ", ".join(f"{column} = excluded.{column}" for column in kept.columns if column not in kept.key)
    return (
        f"INSERT INTO {kept.table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns}"
        f" FROM json_populate_recordset(NULL::{kept.table}, $1::json) WHERE {kept.needs}"
        f" ON CONFLICT ({kept.keys}) DO UPDATE SET {news}"
    )


def _drop(kept: Kept) -> str:
    return (
        f"DELETE FROM {kept.table}"
        f" WHERE ({kept.keys}) IN (SELECT {kept.keys} FROM json_populate_recordset(NULL::{kept.table}, $1::json))"
    )


_SUMS = " UNION ALL ".join(
    f"SELECT '{kept.table}', count(*), coalesce(sum({kept.hash}), 0)::text"
    f" FROM {kept.table} WHERE {kept.whose} AND $1::text[] IS NOT NULL AND $2::integer[] IS NOT NULL"
    for kept in TABLES
)
