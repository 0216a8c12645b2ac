"""
Keeps the tables `tasks` and `events` in parts of a month or a quarter, and takes the old ones out.

Parts are made ahead of time. What came too early for one lies in the default partition and is moved when its part is
made. An old part goes in three steps that each can be repeated: it is detached once all its tasks have ended, its rows
are written as CSV compressed with zstd, and only then it is dropped. PostgreSQL detaches concurrently only where there
is no default partition, so detaching waits for the tables, for `LOCK_S` at most, and is tried again an hour later.

A transaction with DDL and no rows to move takes milliseconds; everything else is read while nobody is kept waiting.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

import structlog
import zstandard

from sutazai.adapters.postgres.database import Connection, Database
from sutazai.core.errors import Conflict, StoreUnavailable
from sutazai.core.task import TaskStatus, task_id, uuid_of

log = structlog.get_logger("sutazai.partitions")

Period = Literal["month", "quarter"]
Writer = Callable[[bytes], Awaitable[None]]
Archive = Callable[[str], AbstractAsyncContextManager[Writer]]
"""Opens a file of that name for writing; whatever was written is kept safely once its context has ended well."""
SetAside = Callable[[str, Sequence[str]], Awaitable[None]]
"""Takes objects that rows of the part of that name speak of out of the way; may be repeated."""

TABLES = ("tasks", "events")
AHEAD = 2
ANALYSIS = "autovacuum_analyze_scale_factor = 2"
"""As `migrations/0015_analysis.sql` says, of those that were there."""
TEND_S = 3600.0
AGAIN_S = 60.0
"""After a failure."""
LOCK_ID = 0x53575450
LOCK_S = 2.0
"""How long to wait for the tables: everybody else waits behind us."""
MAKE_S = 60.0
"""Of one part, with the rows that are moved into it."""
EXPORT_S = 3600.0
MOST_AT_ONCE = 240
_NAME = re.compile(r"(?P<table>tasks|events)_(?P<year>\d{4})_(?:(?P<month>\d\d)|q(?P<quarter>[1-4]))")
_UNFINISHED = ", ".join(f"'{status.value}'" for status in TaskStatus if not status.is_end)


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The time of one part: from `begin` until before `end`."""

    begin: datetime
    end: datetime
    suffix: str

    def overlaps(self, other: Span) -> bool:
        """Whether they have a moment in common."""
        return self.begin < other.end and other.begin < self.end


def span_of(period: Period, moment: datetime) -> Span:
    """The month or quarter of UTC that holds it."""
    moment = moment.astimezone(UTC)
    months = 1 if period == "month" else 3
    first = (moment.month - 1) // months * months + 1
    begin = datetime(moment.year, first, 1, tzinfo=UTC)
    after = first + months
    end = begin.replace(year=moment.year + (after > 12), month=after - 12 * (after > 12))
    return Span(begin, end, f"{moment.year}_{first:02d}" if months == 1 else f"{moment.year}_q{(first + 2) // 3}")


def span_named(name: str) -> Span | None:
    """That of a part's name; None for any other name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    if found["quarter"]:
        return span_of("quarter", datetime(int(found["year"]), 3 * int(found["quarter"]), 1, tzinfo=UTC))
    if not 1 <= int(found["month"]) <= 12:
        return None
    return span_of("month", datetime(int(found["year"]), int(found["month"]), 1, tzinfo=UTC))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One partition as it is."""

    name: str
    belongs_to: str
    begin: datetime | None
    """None for the default partition, which takes what no other does."""
    end: datetime | None
    """Nothing of this moment or after it."""
    rows: int
    """As PostgreSQL last estimated."""
    size_bytes: int
    """With its indexes."""


async def all_parts(database: Database) -> Sequence[Part]:
    """Those that belong to their tables, oldest first. Raises `StoreUnavailable`."""
    async with database.reading() as connection:
        rows = await connection.fetch(database.sql["all_partitions"])
    spans = [span_named(row["name"]) for row in rows]
    return [
        Part(begin=span.begin if span else None, end=span.end if span else None, **row)
        for row, span in zip(rows, spans, strict=True)
    ]


class Partitions:
    """What `run` does at the start and every hour, in any number of processes."""

    def __init__(
        self,
        database: Database,
        *,
        period: Period = "month",
        keep_s: float | None = None,
        archive: Archive | None = None,
        set_aside: SetAside | None = None,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """
        Args:
            keep_s: parts that ended longer ago are taken out; None = all stay.
            archive: where they are written; without it none is taken out.
            set_aside: what becomes of the large results of their tasks; None leaves them.
        """
        self._database = database
        self._period = period
        self._keep_s = keep_s
        self._archive = archive
        self._set_aside = set_aside
        self._wall = wall

    async def run(self) -> None:
        """Tend until cancelled."""
        while True:
            pause_s = TEND_S
            try:
                await self.tend()
            except StoreUnavailable as error:
                log.warning("partitions were not tended", why=error.message)
                pause_s = AGAIN_S
            except Exception:  # the border of one turn
                log.exception("partitions were not tended")
            await asyncio.sleep(pause_s)

    async def tend(self) -> None:
        """Make parts ahead, move what lies in the default partition, and take out what is old."""
        for table in TABLES:
            await self._make_ahead(table)
            await self._empty_default(table)
        if self._archive is None or self._keep_s is None:
            return
        oldest = self._wall() - timedelta(seconds=self._keep_s)
        for span in await self._attached("tasks"):
            if span.end <= oldest:
                await self._detach(span)
        for name in await self._detached():
            await self._export(name, self._archive)

    async def restore(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        """
        Read a part that was written out into the new table `archived_NAME`; how many rows.

        Raises `StoreUnavailable` where such a table is there already, or the bytes are no such part.
        """
        if span_named(name) is None:
            raise StoreUnavailable(f"{name!r} is no name of a part. Give one such as `tasks_2026_01`.")
        async with self._database.transaction(within_s=EXPORT_S) as connection:
            table = name.partition("_")[0]
            await connection.execute(f"CREATE TABLE archived_{name} (LIKE {table} INCLUDING ALL)")
            try:
                done = await connection.copy_to_table(
                    f"archived_{name}", source=_unpacked(chunks), format="csv", header=True, timeout=EXPORT_S
                )
            except zstandard.ZstdError as error:
                raise StoreUnavailable(f"What was to be {name} was not compressed with zstd: {error}.") from error
        return int(done.split()[-1])

    async def _make_ahead(self, table: str) -> None:
        known = await self._attached(table)
        moment = self._wall()
        for _ in range(1 + AHEAD):
            span = self._span(moment, known)
            if span is not None:
                await self._make(table, span)
            moment = span_of(self._period, moment).end

    def _span(self, moment: datetime, known: Sequence[Span]) -> Span | None:
        """The part to make for a moment; None where one holds it."""
        span = span_of(self._period, moment)
        if any(other.begin <= moment < other.end for other in known):
            return None
        # Where the period was changed, months fill up the quarter that was begun.
        return span_of("month", moment) if any(map(span.overlaps, known)) else span

    async def _empty_default(self, table: str) -> None:
        for _ in range(MOST_AT_ONCE):
            async with self._database.transaction() as connection:
                oldest: datetime | None = await connection.fetchval(f"SELECT min(created_at) FROM {table}_default")  # noqa: S608
            if oldest is None:
                return
            span = self._span(oldest, await self._attached(table))
            if span is None:
                return
            await self._make(table, span)

    async def _make(self, table: str, span: Span) -> None:
        """Make a part and move its rows out of the default partition."""
        name, begin, end = f"{table}_{span.suffix}", span.begin.isoformat(), span.end.isoformat()
        within = f"created_at >= '{begin}' AND created_at < '{end}'"
        async with self._database.transaction(within_s=MAKE_S) as connection:
            await self._take_turn(connection)
            if await connection.fetchval("SELECT to_regclass($1)", name) is not None:
                return
            # The table itself first, and from readers too: whoever has chosen the default partition already and waits
            # for it would look there after the rows have left, and a worker would take its task for one that is gone.
            await connection.execute(f"LOCK TABLE ONLY {table} IN ACCESS EXCLUSIVE MODE")
            await connection.execute(f"LOCK TABLE {table}_default IN ACCESS EXCLUSIVE MODE")
            await connection.execute(f"CREATE TABLE {name} (LIKE {table} INCLUDING ALL) WITH ({ANALYSIS})")
            moved = await connection.execute(
                f"WITH moved AS (DELETE FROM {table}_default WHERE {within} RETURNING *)"  # noqa: S608
                f" INSERT INTO {name} SELECT * FROM moved",
                timeout=MAKE_S,
            )
            await connection.execute(
                f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ('{begin}') TO ('{end}')", timeout=MAKE_S
            )
        log.info("partition made", name=name, rows=int(moved.split()[-1]))

    async def _take_turn(self, connection: Connection) -> None:
        """One process at a time; the lock ends with the transaction."""
        await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_S:.0f}s'")
        await connection.execute(f"SELECT pg_advisory_xact_lock({LOCK_ID})")

    async def _attached(self, table: str) -> Sequence[Span]:
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                "SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid"
                " WHERE inhparent = to_regclass($1)",
                table,
            )
        return sorted(span for row in rows if (span := span_named(row["relname"])) is not None)

    async def _detached(self) -> Sequence[str]:
        """Parts that are no partitions any more: to be written out."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                "SELECT relname FROM pg_class WHERE relkind = 'r' AND NOT relispartition"
                " AND relnamespace = current_schema()::regnamespace AND relname ~ '^(tasks|events)_'"
            )
        return sorted(row["relname"] for row in rows if span_named(row["relname"]) is not None)

    async def _detach(self, span: Span) -> None:
        """Take a part of both tables out, and the keys of its tasks; not where one of them has not ended."""
        tasks, events = (f"{table}_{span.suffix}" for table in TABLES)
        first, last = (uuid_of(task_id(moment.timestamp(), 0)) for moment in (span.begin, span.end))
        try:
            async with self._database.transaction(within_s=MAKE_S) as connection:
                await self._take_turn(connection)
                await connection.execute(f"ALTER TABLE tasks DETACH PARTITION {tasks}")
                if await connection.fetchval("SELECT relispartition FROM pg_class WHERE oid = to_regclass($1)", events):
                    await connection.execute(f"ALTER TABLE events DETACH PARTITION {events}")
                unfinished = await connection.fetchval(
                    f"SELECT count(*) FROM {tasks} WHERE status IN ({_UNFINISHED})",  # noqa: S608
                    timeout=MAKE_S,
                )
                if unfinished:
                    raise _StillAtWork(f"{unfinished} of its tasks had not ended. It is tried again later.")
                await connection.execute("DELETE FROM task_keys WHERE task >= $1 AND task < $2", first, last)
        except _StillAtWork as error:
            log.warning("an old partition stays", name=tasks, why=error.message)
        else:
            log.info("partition detached", name=tasks)

    async def _export(self, name: str, archive: Archive) -> None:
        """Write a detached part out and drop it; what fails is begun anew the next time."""
        async with self._database.transaction(within_s=EXPORT_S) as connection:
            await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_S:.0f}s'")
            if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1, hashtext($2))", LOCK_ID, name):
                return  # another process writes it
            if await connection.fetchval("SELECT to_regclass($1)", name) is None:
                return
            async with archive(f"{name}.csv.zst") as write:
                packer = zstandard.ZstdCompressor(level=6, write_checksum=True).compressobj()

                async def pack(chunk: bytes) -> None:
                    if packed := packer.compress(chunk):
                        await write(packed)

                done = await connection.copy_from_table(name, output=pack, format="csv", header=True, timeout=EXPORT_S)
                await write(packer.flush())
            if self._set_aside is not None and name.startswith("tasks_"):
                rows = await connection.fetch(
                    f"SELECT result_object FROM {name} WHERE result_object <> ''",  # noqa: S608
                    timeout=EXPORT_S,
                )
                await self._set_aside(name, [row["result_object"] for row in rows])
            await connection.execute(f"DROP TABLE {name}")
        log.info("partition written out", name=name, rows=int(done.split()[-1]))


class _StillAtWork(Conflict):
    """Some tasks of the part have not ended."""


async def _unpacked(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    unpacker = zstandard.ZstdDecompressor().decompressobj()
    async for chunk in chunks:
        if unpacked := unpacker.decompress(chunk):
            yield unpacked
