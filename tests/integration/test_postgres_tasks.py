"""Transactions of tasks that want the same rows: none waits for another while it holds what that one wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.postgres_databases import fresh_database
from tests.redis_servers import eventually

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import Database, open_database
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.core.task import Completed, Submitted, Suspended, Task, TaskDraft, TaskStatus, digits_of
from sutazai.ports.task_events import encode
from sutazai.ports.tasks import Change, Start
from sutazai.settings.secret import Secret

LIMIT_S = 10.0
AN_HOUR = timedelta(hours=1)
LOCK = "SELECT FROM tasks WHERE id = $1 FOR UPDATE"


@pytest.fixture
async def database(data_dir: Path) -> AsyncIterator[Database]:
    async with fresh_database(data_dir) as url, open_database(Secret(url), timeout_s=LIMIT_S) as opened:
        await migrate.migrate(opened, migrate.read())
        yield opened


async def test_what_holds_one_task_and_needs_another_begins_anew_instead_of_waiting(database: Database) -> None:
    """The end of a task releases an older one that somebody else holds, who then wants the task that ended."""
    store = PostgresTaskStore(database, max_length=100, wall=lambda: datetime.now(UTC))
    older, newer = await store.submit([TaskDraft(tenant="acme", agent="echo")] * 2)
    starts = [Start(task=task.id, may_take_over=False) for task in (older, newer)]
    await store.begin(starts, worker="anna", delivery_limit=3)
    await store.suspend(Change(task=older.id, event=Suspended(1, 0)), [newer.id])

    async with database.transaction() as connection:
        await connection.execute(LOCK, digits_of(older.id))
        ending = asyncio.create_task(store.change([Change(task=newer.id, event=Completed(1, "1"))]), name="end")
        await eventually(lambda: is_waiting(connection))
        await connection.execute(LOCK, digits_of(newer.id))  # which it does not hold while it waits

        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert await connection.fetchval(deadlocks) == 0

    (ended,) = await ending
    released = await store.get("acme", older.id)
    assert ended is not None
    assert released is not None
    assert (ended.status, released.status) == (TaskStatus.COMPLETED, TaskStatus.PENDING)


async def test_a_submission_is_kept_as_the_event_that_the_codec_would_write(database: Database) -> None:
    """The statement puts it together, so that the draft is sent once."""
    store = PostgresTaskStore(database, max_length=100)
    odd = TaskDraft(
        tenant='a"c\\me',
        agent="echo",
        input='{"text": "\u2028 ☃ \\u0000 \\\\ \'"}',
        deadline=datetime.now(UTC) + AN_HOUR,
    )
    (first,) = await store.submit([odd])
    (second,) = await store.submit([replace(odd, after=(first.id,))])

    for task, waits_for in ((first, 0), (second, 1)):
        (event,) = await store.events(None, task.id, limit=10)
        assert (event.kind, event.schema, event.data) == encode(Submitted(task.draft, waits_for))
        assert (event.version, event.task, event.tenant) == (1, task.id, odd.tenant)


async def test_of_several_workers_that_begin_the_same_tasks_at_once_each_has_its_own(database: Database) -> None:
    store = PostgresTaskStore(database, max_length=10_000, wall=lambda: datetime.now(UTC))
    tasks = await store.submit([TaskDraft(tenant="acme", agent="echo")] * 300)
    ids = [task.id for task in tasks]

    async def began(worker: str, order: Sequence[str]) -> list[Task]:
        mine: list[Task] = []
        for first in range(0, len(order), 10):
            starts = [Start(task=one, may_take_over=False) for one in order[first : first + 10]]
            begun = await store.begin(starts, worker=worker, delivery_limit=3)
            mine += [task for task in begun if isinstance(task, Task)]
        return mine

    orders = [ids, ids[::-1], ids[150:] + ids[:150], sorted(ids, key=lambda one: one[::-1])]
    begun = await asyncio.gather(*(began(f"w{number}", order) for number, order in enumerate(orders)))

    assert sorted(task.id for mine in begun for task in mine) == ids
    assert {(task.version, task.deliveries) for mine in begun for task in mine} == {(2, 1)}
    assert set((await store.versions(ids)).values()) == {2}


async def is_waiting(connection: Any) -> bool:
    """Whether somebody waits for what this connection holds."""
    waiting = "SELECT EXISTS (SELECT FROM pg_locks WHERE pg_backend_pid() = ANY (pg_blocking_pids(pid)))"
    return bool(await connection.fetchval(waiting))
