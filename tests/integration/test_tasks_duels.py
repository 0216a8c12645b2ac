"""Two workers that both take a task for theirs: the late one changes nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import msgspec
import pytest
from tests.duel_worker import TABLE
from tests.postgres_databases import fresh_database
from tests.redis_servers import eventually

from sutazai.adapters.postgres.stores import Stores, open_stores
from sutazai.core.task import Checkpointed, Completed, Progressed, Started, Task, TaskDraft, TaskStatus
from sutazai.settings.model import Database
from sutazai.settings.secret import Secret

ROOT = Path(__file__).parents[2]
WITHIN_S = 30.0
WORK_S = 4.0
"""Longer than a lease."""

pytestmark = pytest.mark.deadline(120)


@pytest.fixture
async def url(data_dir: Path) -> AsyncIterator[str]:
    """A database with a table of what was paid."""
    async with fresh_database(data_dir) as address:
        connection = await asyncpg.connect(address)
        await connection.execute(TABLE)
        await connection.close()
        yield address


@asynccontextmanager
async def worker(url: str, name: str) -> AsyncIterator[int]:
    """The pid of one that works, killed at the end, also where it was stopped."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.duel_worker", url, name, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"works\n"
        yield process.pid
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize("wakes", ["while the other works", "after the other has ended"])
async def test_a_worker_that_was_stopped_past_its_lease_changes_nothing_when_it_wakes(
    url: str, data_dir: Path, wakes: str
) -> None:
    async with open_stores(Database(url=Secret(url)), data_dir) as stores:
        (task,) = await stores.tasks.submit([TaskDraft(tenant="acme", agent="duel", input=str(WORK_S))])
        async with worker(url, "sleeper") as sleeper:
            await eventually(lambda: has_entered(url, task), WITHIN_S)
            os.kill(sleeper, signal.SIGSTOP)
            async with worker(url, "second"):
                await eventually(lambda: is_in(stores, task, TaskStatus.PROCESSING, deliveries=2), WITHIN_S)
                if wakes == "while the other works":
                    os.kill(sleeper, signal.SIGCONT)
                await eventually(lambda: is_in(stores, task, TaskStatus.COMPLETED), WITHIN_S)
            if wakes == "after the other has ended":
                os.kill(sleeper, signal.SIGCONT)
            (last,) = await stores.tasks.submit([TaskDraft(tenant="acme", agent="duel", input="0")])
            await eventually(lambda: is_in(stores, last, TaskStatus.COMPLETED), WITHIN_S)  # it is awake, and works on

        done = (await stores.tasks.several("acme", [task.id]))[0]
        events = [one.event for one in await stores.tasks.events("acme", task.id, limit=100)]

    assert (done.result, done.deliveries, done.losses) == ("2", 2, 1)
    assert msgspec.json.decode(done.checkpoint) == msgspec.json.decode(done.progress) == {"by": 2}
    assert [one.worker for one in events if isinstance(one, Started)] == ["sleeper", "second"]
    assert {one.fence for one in events if isinstance(one, Progressed | Checkpointed | Completed)} == {2}
    assert await account(url, task) == (2, 1)


async def is_in(stores: Stores, task: Task, status: TaskStatus, *, deliveries: int = 1) -> bool:
    found = (await stores.tasks.several("acme", [task.id]))[0]
    return found.status is status and found.deliveries >= deliveries


async def has_entered(url: str, task: Task) -> bool:
    return await account(url, task) == (1, 0)


async def account(url: str, task: Task) -> tuple[int, int] | None:
    """Which attempt was the last to enter, and how often was paid."""
    connection = await asyncpg.connect(url)
    try:
        row = await connection.fetchrow("SELECT fence, paid FROM account WHERE task = $1", task.id)
    finally:
        await connection.close()
    return None if row is None else (row["fence"], row["paid"])
