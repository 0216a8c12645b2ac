"""Parts of the tables of tasks: made ahead, filled from the default one, taken out, written and read back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.postgres_servers import embedded

from sutazai.adapters.objects.archive import archived
from sutazai.adapters.objects.store import open_objects
from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import Database, open_database
from sutazai.adapters.postgres.partitions import Partitions, Period, Writer, span_named, span_of
from sutazai.adapters.postgres.replay import PostgresReplayStore
from sutazai.adapters.postgres.task_changes import TaskChanges
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.bootstrap import upkeep
from sutazai.core.errors import StoreUnavailable
from sutazai.core.task import Cancelled, Completed, Submitted, Task, TaskDraft, TaskStatus, task_id
from sutazai.ports.tasks import Change, Start
from sutazai.settings.model import Settings
from sutazai.settings.model import Tasks as TaskSettings
from sutazai.settings.secret import Secret
from sutazai.tasks.replay import verify

NOVEMBER = datetime(2026, 11, 15, 12, tzinfo=UTC)
DAY_S = 86_400.0
PERIODS: Sequence[Period] = ("month", "quarter")


@given(st.sampled_from(PERIODS), st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001
def test_spans_hold_their_moment_meet_without_a_gap_and_are_known_by_their_names(
    period: Period, moment: datetime
) -> None:
    span = span_of(period, moment)

    assert span.begin <= moment < span.end
    assert span_of(period, span.end).begin == span.end
    assert span_named(f"tasks_{span.suffix}") == span


@pytest.mark.parametrize(
    "name", ["tasks", "tasks_default", "tasks_2026_13", "tasks_2026_00", "tasks_2026_q5", "x_2026_01"]
)
def test_other_tables_are_no_parts(name: str) -> None:
    assert span_named(name) is None


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with embedded() as (url, _):
        yield url


class Place:
    """A database, a wall clock that stands still, and an archive in memory."""

    def __init__(self, url: str, database: Database) -> None:
        self.url = url
        self.database = database
        self.now = NOVEMBER
        self.archived: dict[str, bytes] = {}
        self.is_full = False
        """The archive takes nothing."""
        self.aside: dict[str, Sequence[str]] = {}
        """Objects that were set aside, by part."""
        self.store = PostgresTaskStore(database, max_length=10_000, wall=lambda: self.now)
        self._made = 0

    def partitions(self, period: Period = "month", *, keep_days: float | None = None) -> Partitions:
        keep_s = None if keep_days is None else keep_days * DAY_S
        return Partitions(
            self.database,
            period=period,
            keep_s=keep_s,
            archive=self.archive,
            set_aside=self.set_aside,
            wall=lambda: self.now,
        )

    async def set_aside(self, name: str, objects: Sequence[str]) -> None:
        self.aside[name] = objects

    @asynccontextmanager
    async def archive(self, name: str) -> AsyncIterator[Writer]:
        parts: list[bytes] = []

        async def write(chunk: bytes) -> None:
            if self.is_full:
                raise StoreUnavailable("The archive was full. Make room.")
            parts.append(chunk)

        yield write
        self.archived[name] = b"".join(parts)

    async def task(self, at: datetime, *, ends: bool = True, key: str = "") -> str:
        """A task that was made then."""
        self._made += 1
        made = task_id(at.timestamp(), self._made)
        async with self.database.transaction() as connection:
            changes = TaskChanges(connection, self.database, at)
            changes.submit(made, Submitted(TaskDraft(tenant="acme", agent="echo", idempotency_key=key)))
            if ends:
                changes.apply(made, Cancelled())
            await changes.write()
            if key:
                statement = "INSERT INTO task_keys VALUES ('acme', $1, $2::text::uuid)"
                await connection.execute(statement, key, made.removeprefix("task_"))
        return made

    async def fetch(self, statement: str) -> list[Any]:
        async with self.database.transaction() as connection:
            return [row[0] for row in await connection.fetch(statement)]

    async def parts(self, table: str = "tasks") -> list[str]:
        return sorted(
            await self.fetch(
                "SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid"  # noqa: S608
                f" WHERE inhparent = '{table}'::regclass AND relname NOT LIKE '%default'"
            )
        )

    async def rows(self, table: str) -> int:
        (count,) = await self.fetch(f"SELECT count(*) FROM {table}")  # noqa: S608
        return int(count)


@pytest.fixture
async def place(server: str) -> AsyncIterator[Place]:
    connection: Any = await asyncpg.connect(server)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.close()
    async with open_database(Secret(server), timeout_s=20) as database:
        await migrate.migrate(database, migrate.read())
        yield Place(server, database)


async def _chunks(packed: bytes) -> AsyncIterator[bytes]:
    for begin in range(0, len(packed), 7):
        yield packed[begin : begin + 7]


async def test_this_month_and_two_ahead_are_made_once(place: Place) -> None:
    for _ in range(2):
        await place.partitions().tend()

    assert await place.parts() == ["tasks_2026_11", "tasks_2026_12", "tasks_2027_01"]
    assert await place.parts("events") == ["events_2026_11", "events_2026_12", "events_2027_01"]


async def test_none_is_analysed_whenever_a_tenth_of_it_has_changed(place: Place) -> None:
    """At thousands of tasks a second that was every ten seconds, and took half a second of a core each time."""
    await place.partitions().tend()

    options = await place.fetch(
        "SELECT array_to_string(reloptions, ',') FROM pg_class"
        " WHERE relkind = 'r' AND relname ~ '^(tasks|events)_(default|20)'"
    )

    assert options == ["autovacuum_analyze_scale_factor=2"] * 8


async def test_many_processes_make_them_together(place: Place) -> None:
    await asyncio.gather(*(place.partitions("quarter").tend() for _ in range(8)))

    assert await place.parts() == ["tasks_2026_q4", "tasks_2027_q1", "tasks_2027_q2"]


async def test_time_goes_on_and_another_is_made(place: Place) -> None:
    await place.partitions().tend()
    place.now += timedelta(days=30)
    await place.partitions().tend()

    assert (await place.parts())[-1] == "tasks_2027_02"


async def test_months_fill_up_the_quarter_in_which_the_period_was_changed(place: Place) -> None:
    place.now = datetime(2026, 8, 1, tzinfo=UTC)
    await place.partitions().tend()  # August to October
    place.now = NOVEMBER
    await place.partitions("quarter").tend()
    await place.task(datetime(2026, 12, 24, tzinfo=UTC))
    await place.partitions("quarter").tend()

    parts = await place.parts()
    assert {"tasks_2026_10", "tasks_2026_11", "tasks_2026_12", "tasks_2027_q1", "tasks_2027_q2"} <= set(parts)
    assert await place.rows("tasks_default") == 0


async def test_rows_of_the_default_partition_are_moved_where_they_belong(place: Place) -> None:
    moments = [datetime(2026, month, 3, tzinfo=UTC) for month in (3, 3, 11, 12)]
    tasks = [await place.task(moment) for moment in moments]
    assert await place.rows("tasks_default") == 4

    await place.partitions().tend()

    assert await place.rows("tasks_default") == await place.rows("events_default") == 0
    assert (await place.rows("tasks_2026_03"), await place.rows("events_2026_03")) == (2, 4)
    for task in tasks:
        found = await place.store.get("acme", task)
        assert found is not None
        assert [kept.version for kept in await place.store.events("acme", task, limit=9)] == [1, 2]
    requeued = await place.store.requeue("acme", tasks[0])
    assert requeued is not None
    async with PostgresReplayStore(place.database).session() as session:
        assert (await verify(session, note=lambda _: None)).is_whole


async def test_writers_go_on_while_parts_are_made(place: Place) -> None:
    async def write() -> None:
        for _ in range(30):
            await place.task(place.now)

    await asyncio.gather(write(), write(), place.partitions().tend(), place.partitions().tend())

    assert await place.rows("tasks") == await place.rows("tasks_2026_11") == 60


async def test_a_task_is_found_while_it_is_moved(place: Place) -> None:
    """A reader that has looked where tasks are, and waits, must not look in the old place after it was emptied."""
    task = await place.task(place.now)
    holder: Any = await asyncpg.connect(place.url)
    held = holder.transaction()
    await held.start()
    await holder.execute("LOCK TABLE tasks_default IN ACCESS SHARE MODE")
    tending = asyncio.create_task(place.partitions().tend())
    await _waiting(place, 1)
    reading = asyncio.create_task(place.store.get("acme", task))
    await _waiting(place, 2)

    await held.rollback()
    await holder.close()
    await tending

    assert await reading is not None


async def _waiting(place: Place, count: int) -> None:
    """Return once so many locks are waited for."""
    statement = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    while (await place.fetch(statement)) != [count]:
        await asyncio.sleep(0.01)


async def test_an_old_part_is_written_out_and_can_be_read_back(place: Place) -> None:
    old = [await place.task(datetime(2026, 3, day, tzinfo=UTC)) for day in range(1, 20)]
    new = await place.task(place.now)
    partitions = place.partitions(keep_days=90)

    await partitions.tend()

    assert sorted(place.archived) == ["events_2026_03.csv.zst", "tasks_2026_03.csv.zst"]
    assert "tasks_2026_03" not in await place.parts()
    assert await place.fetch("SELECT relname FROM pg_class WHERE relname LIKE '%2026_03'") == []
    assert await place.store.get("acme", old[0]) is None
    assert await place.store.get("acme", new) is not None

    assert await partitions.restore("tasks_2026_03", _chunks(place.archived["tasks_2026_03.csv.zst"])) == 19
    assert await partitions.restore("events_2026_03", _chunks(place.archived["events_2026_03.csv.zst"])) == 38
    ids = await place.fetch("SELECT id FROM archived_tasks_2026_03 ORDER BY id")
    assert [f"task_{one.hex}" for one in ids] == sorted(old)
    await partitions.tend()
    assert await place.rows("archived_tasks_2026_03") == 19


async def test_large_results_of_an_old_part_are_set_aside(place: Place) -> None:
    for day in (1, 2):
        task = await place.task(datetime(2026, 3, day, tzinfo=UTC), ends=False)
        (begun,) = await place.store.begin([Start(task=task, may_take_over=False)], worker="w", delivery_limit=9)
        assert isinstance(begun, Task)
        event = Completed(1, "", result_object="t-acme/results/1/1-abc") if day == 1 else Completed(1, "1")
        await place.store.change([Change(task=task, event=event)])

    await place.partitions(keep_days=90).tend()

    assert place.aside == {"tasks_2026_03": ["t-acme/results/1/1-abc"]}
    assert await place.fetch("SELECT relname FROM pg_class WHERE relname LIKE '%2026_03'") == []


async def test_rows_come_back_as_they_were(place: Place) -> None:
    text = '{"a": "\\\\u0000 \\", \\n,é"}'
    made = task_id(datetime(2026, 3, 1, 1, 2, 3, 456000, tzinfo=UTC).timestamp(), 1)
    async with place.database.transaction() as connection:
        changes = TaskChanges(connection, place.database, datetime(2026, 3, 1, 1, 2, 3, 456789, tzinfo=UTC))
        changes.submit(made, Submitted(replace(TaskDraft(tenant="acme", agent="", input=text), user='a"b,\n')))
        changes.apply(made, Cancelled())
        await changes.write()
    before = await place.fetch("SELECT tasks::text FROM tasks")
    partitions = place.partitions(keep_days=90)
    await partitions.tend()

    await partitions.restore("tasks_2026_03", _chunks(place.archived["tasks_2026_03.csv.zst"]))

    assert await place.fetch("SELECT t::text FROM archived_tasks_2026_03 AS t") == before


async def test_a_part_with_a_task_that_has_not_ended_stays(place: Place) -> None:
    await place.task(datetime(2026, 3, 1, tzinfo=UTC))
    late = await place.task(datetime(2026, 3, 2, tzinfo=UTC), ends=False)
    partitions = place.partitions(keep_days=90)
    await partitions.tend()
    assert place.archived == {}
    assert (await place.store.get("acme", late)) is not None

    await place.store.cancel("acme", late)
    await partitions.tend()
    assert len(place.archived) == 2


async def test_a_part_that_the_archive_did_not_take_is_written_the_next_time(place: Place) -> None:
    await place.task(datetime(2026, 3, 1, tzinfo=UTC))
    partitions = place.partitions(keep_days=90)
    place.is_full = True
    with pytest.raises(StoreUnavailable, match="full"):
        await partitions.tend()
    assert await place.rows("tasks_2026_03") == 1

    place.is_full = False
    await partitions.tend()

    assert len(place.archived) == 2
    assert await partitions.restore("tasks_2026_03", _chunks(place.archived["tasks_2026_03.csv.zst"])) == 1


@pytest.mark.parametrize(("shard", "name"), [("", "tasks_2020_q1.csv.zst"), ("eu1", "eu1/tasks_2020_q1.csv.zst")])
async def test_old_parts_go_to_the_object_store_of_the_settings_and_come_back(
    place: Place, tmp_path: Path, shard: str, name: str
) -> None:
    """Those of each shard below its name, for all shards have parts of the same names."""
    place.now = datetime.now(UTC)
    await place.task(datetime(2020, 3, 1, tzinfo=UTC))
    await place.task(place.now)
    settings = Settings(tasks=TaskSettings(partition="quarter", keep_months=12))
    partitions = await upkeep.partitions(settings, place.database, tmp_path, shard=shard)
    await partitions.tend()

    assert await place.rows("tasks") == 1
    packed = archived(open_objects(settings.objects, tmp_path), name)
    assert await partitions.restore("tasks_2020_q1", packed) == 1
    assert await place.rows("archived_tasks_2020_q1") == 1


async def test_the_key_of_a_task_that_was_taken_out_makes_a_new_one(place: Place) -> None:
    old = await place.task(datetime(2026, 3, 1, tzinfo=UTC), key="k")
    await place.partitions(keep_days=90).tend()

    (new,) = await place.store.submit([TaskDraft(tenant="acme", agent="echo", idempotency_key="k")])

    assert new.id != old
    assert new.status is TaskStatus.PENDING


async def test_without_an_age_or_an_archive_all_stay(place: Place) -> None:
    await place.task(datetime(2020, 3, 1, tzinfo=UTC))
    await place.partitions().tend()
    await Partitions(place.database, keep_s=1.0, wall=lambda: place.now).tend()

    assert "tasks_2020_03" in await place.parts()


async def test_what_is_no_part_is_not_read_back(place: Place) -> None:
    for name, packed in (("tasks_2026_03; DROP TABLE tasks", b""), ("tasks_2026_03", b"no zstd")):
        with pytest.raises(StoreUnavailable):
            await place.partitions().restore(name, _chunks(packed))
    assert await place.rows("tasks") == 0


def test_months_follow_each_other() -> None:
    moments = [NOVEMBER + timedelta(days=31 * number) for number in range(24)]

    assert all(span_of("month", one).end == span_of("month", other).begin for one, other in pairwise(moments))
