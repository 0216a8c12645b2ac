"""Tasks made anew from their events in a real database: equal to those kept, at any time, and faults are found."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from tests.postgres_servers import embedded

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import open_database
from sutazai.adapters.postgres.replay import PostgresReplaySession, PostgresReplayStore
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.core.task import (
    Completed,
    Event,
    Failed,
    FailureReason,
    Progressed,
    Task,
    TaskDraft,
    TaskStatus,
)
from sutazai.ports.tasks import Change, Start
from sutazai.settings.secret import Secret
from sutazai.tasks.replay import Found, as_it_stood, replay, verify

NOON = datetime(2126, 11, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with embedded() as (url, _):
        yield url


class Place:
    """A store whose wall clock a test moves, and what it sees of the database."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.now = NOON
        self.noted: list[int] = []

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        await self.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        async with open_database(Secret(self.url), timeout_s=20) as database:
            await migrate.migrate(database, migrate.read())
            self.store = PostgresTaskStore(database, max_length=10_000, wall=lambda: self.now)
            self.replays = PostgresReplayStore(database)
            yield

    async def execute(self, statement: str) -> list[Any]:
        connection: Any = await asyncpg.connect(self.url)
        try:
            if statement.startswith("SELECT"):
                return list(await connection.fetch(statement))
            await connection.execute(statement)
            return []
        finally:
            await connection.close()

    def session(self) -> Any:
        return self.replays.session()

    async def submit(self, count: int = 1, **fields: Any) -> list[Task]:
        return list(await self.store.submit([TaskDraft(tenant="acme", agent="echo", **fields) for _ in range(count)]))

    async def begin(self, *tasks: Task) -> None:
        starts = [Start(task=task.id, may_take_over=True) for task in tasks]
        await self.store.begin(starts, worker="anna", delivery_limit=20)

    async def change(self, task: Task, event: Event) -> None:
        assert (await self.store.change([Change(task=task.id, event=event)]))[0] is not None

    async def replayed(self, until: datetime | None = None) -> Found:
        async with self.session() as session:
            return await replay(session, until=until, note=self.noted.append)

    async def verified(self) -> Found:
        async with self.session() as session:
            return await verify(session, note=self.noted.append)


@pytest.fixture
async def place(server: str) -> AsyncIterator[Place]:
    made = Place(server)
    async with made.opened():
        yield made


async def lived(place: Place) -> tuple[Task, Task, Task]:
    """A task that completed, one that failed with one that waits for it, and one under way: minute by minute."""
    good, bad, busy = await place.submit(3, input='{"text": "Grüße \\u0000"}')
    await place.submit(1, after=(bad.id,), deadline=NOON + timedelta(days=1))
    place.now += timedelta(minutes=1)
    await place.begin(good, bad, busy)
    place.now += timedelta(minutes=1)
    await place.change(good, Progressed(1, '{"done": 0.5}'))
    await place.begin(busy)
    place.now += timedelta(minutes=1)
    await place.change(good, Completed(1, '{"a": "b"}', tokens=5))
    await place.change(bad, Failed(1, FailureReason.ERROR, 'It "broke"\n\0, (really).'))
    return good, bad, busy


async def test_tasks_made_anew_equal_those_that_are_kept(place: Place) -> None:
    await lived(place)

    found = await place.replayed()

    assert found.comparison is not None
    assert found.comparison.is_equal
    assert found.is_whole
    assert (found.tasks, found.comparison.kept, found.comparison.replayed) == (4, 4, 4)
    assert found.statuses == {TaskStatus.COMPLETED: 1, TaskStatus.FAILED: 2, TaskStatus.PROCESSING: 1}
    assert place.noted[-1] == found.events == 12
    copied = await place.execute("SELECT status FROM tasks_replayed ORDER BY status")
    assert [row["status"] for row in copied] == ["completed", "failed", "failed", "processing"]


async def test_an_empty_database_is_whole(place: Place) -> None:
    assert (await place.replayed()).is_whole
    assert (await place.verified()).is_whole


async def test_a_second_replay_begins_anew(place: Place) -> None:
    await lived(place)
    await place.replayed()

    assert (await place.replayed()).is_whole


@pytest.mark.parametrize(
    "spoil",
    [
        "UPDATE tasks SET result = '{}' WHERE status = 'completed'",
        "UPDATE tasks SET tokens = tokens + 1 WHERE status = 'completed'",
        "UPDATE tasks SET status = 'pending' WHERE status = 'processing'",
        "UPDATE tasks SET draft = replace(draft, 'echo', 'eche') WHERE status = 'completed'",
        "UPDATE tasks SET ended_at = ended_at + interval '1 microsecond' WHERE status = 'completed'",
        "DELETE FROM tasks WHERE status = 'completed'",
    ],
)
async def test_a_task_that_was_changed_past_its_events_is_found(place: Place, spoil: str) -> None:
    good, _, busy = await lived(place)
    spoiled = busy if "pending" in spoil else good
    await place.execute(spoil)

    replayed, verified = await place.replayed(), await place.verified()

    assert not replayed.is_whole
    assert replayed.comparison is not None
    assert replayed.comparison.differing == [spoiled.id]
    assert [fault.task for fault in verified.faults] == [spoiled.id]


@pytest.mark.parametrize(
    ("spoil", "version", "why"),
    [
        ("DELETE FROM events WHERE version = 2 AND task = '{task}'", 2, "missing"),
        ("DELETE FROM events WHERE version = 1 AND task = '{task}'", 1, "missing"),
        ("UPDATE events SET kind = 'task.exploded' WHERE version = 3 AND task = '{task}'", 3, "not known"),
        ("UPDATE events SET schema = 7 WHERE version = 3 AND task = '{task}'", 3, "not known"),
        ("UPDATE events SET data = '{{' WHERE version = 1 AND task = '{task}'", 1, "form"),
        ("UPDATE events SET data = '{{}}' WHERE version = 4 AND task = '{task}'", 4, "form"),
        ("UPDATE events SET kind = 'task.requeued', data = '{{\"run_at\":\"2026-01-01T00:00:00Z\"}}'"
         " WHERE version = 3 AND task = '{task}'", 3, "cannot happen"),
    ],
)  # fmt: skip
async def test_events_that_are_not_whole_are_found_and_the_others_go_on(
    place: Place, spoil: str, version: int, why: str
) -> None:
    good, _, _ = await lived(place)
    await place.execute(spoil.format(task=good.id.removeprefix("task_")))

    verified, replayed = await place.verified(), await place.replayed()

    (fault,) = verified.faults
    assert (fault.task, fault.version) == (good.id, version)
    assert why in fault.why
    assert verified.fault_count == replayed.fault_count == 1
    assert replayed.comparison is not None
    assert replayed.comparison.differing == [good.id]


async def test_tasks_without_any_event_are_found(place: Place) -> None:
    (task,) = await place.submit()
    await place.execute(f"DELETE FROM events WHERE task = '{task.id.removeprefix('task_')}'")  # noqa: S608

    assert [fault.why for fault in (await place.verified()).faults] == ["1 tasks had no events."]


async def test_tasks_are_seen_as_they_stood(place: Place) -> None:
    good, bad, busy = await lived(place)

    counts = [
        {
            status.value: count
            for status, count in (await place.replayed(NOON + timedelta(minutes=minute))).statuses.items()
        }
        for minute in (-1, 0, 1, 3)
    ]
    assert counts == [
        {},
        {"pending": 3, "waiting": 1},
        {"processing": 3, "waiting": 1},
        {"completed": 1, "failed": 2, "processing": 1},
    ]
    async with place.session() as session:
        early = await as_it_stood(session, good.id, until=NOON + timedelta(minutes=2))
        latest = await as_it_stood(session, busy.id, until=None)
        before = await as_it_stood(session, bad.id, until=NOON - timedelta(minutes=1))
    assert early is not None
    assert early.task is not None
    assert (early.task.progress, early.task.status) == ('{"done": 0.5}', TaskStatus.PROCESSING)
    assert latest is not None
    assert latest.task == await place.store.get("acme", busy.id)
    assert before is None


async def test_what_happens_meanwhile_is_not_seen(place: Place) -> None:
    tasks = await place.submit(50)
    async with place.session() as session:
        assert isinstance(session, PostgresReplaySession)
        await session.empty_copy()
        await place.begin(*tasks)
        await place.submit(5)
        found = await replay(session, until=None, note=place.noted.append)

    assert found.is_whole
    assert found.statuses == {TaskStatus.PENDING: 50}


async def test_many_batches_make_the_same_tasks(place: Place) -> None:
    tasks = await place.submit(1800)
    for part in range(0, 1800, 600):
        await place.begin(*tasks[part : part + 600])
        await place.begin(*tasks[part : part + 600])

    found = await place.replayed()

    assert found.is_whole
    assert found.events == 5400
    assert len(place.noted) == 2
