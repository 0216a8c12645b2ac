"""What each agent did on each day, counted from tasks that were really done."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from tests.postgres_servers import PostgresServer, streaming
from tests.redis_servers import eventually

import sutazai
from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import Database, open_database
from sutazai.adapters.postgres.statistics import Statistics
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.core.errors import StoreUnavailable
from sutazai.core.task import Completed, Event, Failed, FailureReason, TaskDraft
from sutazai.ports.tasks import Change, Start

TODAY = datetime.now(UTC).date()


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with streaming(replicas=0) as (alone,):
        yield alone


@pytest.fixture
async def empty(server: PostgresServer) -> AsyncIterator[Database]:
    await server.ask("DROP SCHEMA public CASCADE")
    await server.ask("CREATE SCHEMA public")
    async with open_database(server.url, timeout_s=10) as database:
        yield database


@pytest.fixture
async def database(empty: Database) -> Database:
    await migrate.migrate(empty, migrate.read())
    return empty


@dataclass
class Clock:
    now: datetime

    def __call__(self) -> datetime:
        return self.now


async def do(database: Database, agent: str, seconds: float, *, fails: bool = False) -> None:
    """Start a task and end it so much later."""
    clock = Clock(datetime.now(UTC) + timedelta(seconds=1))
    store = PostgresTaskStore(database, max_length=100, wall=clock)
    (task,) = await store.submit([TaskDraft(tenant="acme", agent=agent)])
    await store.begin([Start(task=task.id, may_take_over=False)], worker="w", delivery_limit=3)
    clock.now += timedelta(seconds=seconds)
    end: Event = Failed(1, FailureReason.ERROR, "No.") if fails else Completed(1, "1")
    (ended,) = await store.change([Change(task=task.id, event=end)])
    assert ended is not None
    assert ended.status.is_end


async def test_tasks_are_counted_by_agent_and_day(database: Database) -> None:
    statistics = Statistics(database, every_s=3600)
    await do(database, "echo", 2)
    await do(database, "echo", 4)
    await do(database, "echo", 60, fails=True)
    await PostgresTaskStore(database, max_length=9).submit([TaskDraft(tenant="acme", agent="chat")])
    assert await statistics.days() == ()

    assert await statistics.refresh()

    chat, echo = await statistics.days()
    assert (chat.agent, chat.total_tasks, chat.completed, chat.mean_processing_s) == ("chat", 1, 0, None)
    assert (echo.agent, echo.date, echo.total_tasks, echo.completed, echo.failed) == ("echo", TODAY, 3, 2, 1)
    assert (echo.mean_processing_s, echo.mean_attempts) == (3, 1)


async def test_a_refresh_does_not_wait_for_readers(database: Database) -> None:
    statistics = Statistics(database, every_s=3600)
    await statistics.refresh()
    await do(database, "echo", 1)
    async with database.transaction() as reader:
        assert await reader.fetch(database.sql["statistics"]) == []

        assert await statistics.refresh()

        assert len(await reader.fetch(database.sql["statistics"])) == 1


async def test_one_of_many_counts_and_the_others_see_that_it_was_done(database: Database) -> None:
    await do(database, "echo", 1)
    done = await asyncio.gather(*(Statistics(database, every_s=60).refresh(older_than_s=50) for _ in range(5)))

    assert done.count(True) == 1
    assert not await Statistics(database, every_s=60).refresh(older_than_s=50)


async def test_the_loop_goes_on_counting(database: Database) -> None:
    statistics = Statistics(database, every_s=0.05)
    running = asyncio.create_task(statistics.run())
    try:
        await do(database, "echo", 1)

        async def is_counted() -> bool:
            return bool(await statistics.days())

        await eventually(is_counted)
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def test_a_database_without_the_view_is_told_of(empty: Database) -> None:
    with pytest.raises(StoreUnavailable, match="sutazai db migrate"):
        await Statistics(empty, every_s=60).days()


async def test_the_command_prints_what_was_counted(database: Database, server: PostgresServer) -> None:
    await do(database, "echo", 2)

    before = await db(server, "statistics")
    after = await db(server, "statistics", "--refresh")
    told = json.loads((await db(server, "statistics", "--json")).stdout)

    assert before.stdout.split() == ["DATE", "AGENT", "TASKS", "COMPLETED", "FAILED", "MEAN", "S", "ATTEMPTS"]
    assert after.stdout.splitlines()[1].split() == [str(TODAY), "echo", "1", "1", "0", "2.00", "1.00"]
    assert (date.fromisoformat(told[0]["date"]), told[0]["mean_processing_s"]) == (TODAY, 2)


async def db(server: PostgresServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = [sys.executable, "-W", "error", "-m", "sutazai", "db", *arguments]
    environment = {
        "PYTHONPATH": str(Path(sutazai.__file__).parents[1]),
        "PATH": os.defpath,
        "HOME": "/nowhere",
        "SUTAZAI_DATABASE_URL": server.url.reveal(),
    }
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, check=True, cwd="/", env=environment, timeout=60
    )
