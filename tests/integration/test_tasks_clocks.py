"""Clocks of processes that are wrong, or are set while they run: tasks go by the time of the database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.postgres_databases import fresh_stores

from sutazai.adapters.postgres.clock import DatabaseClock
from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.partitions import Partitions, all_parts
from sutazai.adapters.postgres.queue import PostgresQueue
from sutazai.adapters.postgres.stores import Stores
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.core.errors import BadRequest
from sutazai.core.task import FailureReason, Retried, Task, TaskStatus
from sutazai.ports.agent import TASK_PROCESSING
from sutazai.ports.queue import Consumer
from sutazai.ports.tasks import Change, Start
from sutazai.tasks.recurring import Recurring
from sutazai.tasks.submit import Submission, Submitter, Wanted
from sutazai.testing.plain_agents import plain_agents

JUMPS = [timedelta(minutes=10), timedelta(minutes=-10), timedelta(days=40)]
CLOSE = timedelta(seconds=5)
ACME = Submitter(tenant="acme")


class Clock:
    """The clock of a process, which somebody sets."""

    def __init__(self) -> None:
        self.off = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.off


@pytest.fixture(params=JUMPS, ids=str)
async def process(request: pytest.FixtureRequest, data_dir: Path) -> AsyncIterator[Stores]:
    """What a process has whose clock was set after it had begun."""
    async with fresh_stores(data_dir) as stores:
        own = Clock()
        clock = DatabaseClock(stores.databases[""], wall=own)
        await clock.ask()
        own.off = request.param
        yield replace(
            stores,
            clock=clock,
            tasks=PostgresTaskStore(stores.databases[""], max_length=1000, wall=clock),
            queue=PostgresQueue(stores.databases[""], wall=clock),
        )


@pytest.fixture
async def submission(process: Stores) -> AsyncIterator[Submission]:
    """The process's way in."""
    made = Submission(process.tasks, plain_agents(), wall=process.wall)
    running = asyncio.create_task(made.run())
    yield made
    running.cancel()
    await asyncio.wait([running])


async def submitted(submission: Submission, **wanted: Any) -> Task:
    return await submission.submit(Wanted(agent="anything", **wanted), ACME)


async def taken(process: Stores, consumer: Consumer) -> list[str]:
    """Tasks that can be started now."""
    await process.queue.tend()
    if not await process.queue.depth(TASK_PROCESSING):
        return []
    return [delivery.message.task for delivery in await consumer.take(10)]


async def test_the_time_is_that_of_the_database(process: Stores) -> None:
    assert abs(process.wall() - datetime.now(UTC)) < CLOSE


async def test_until_the_database_has_answered_its_own_clock_is_all_that_a_process_has(database: Database) -> None:
    own = Clock()
    own.off = timedelta(days=1)

    assert abs(DatabaseClock(database, wall=own)() - own()) < CLOSE


async def test_tasks_start_at_their_time_and_no_earlier(process: Stores, submission: Submission) -> None:
    soon = await submitted(submission)
    late = await submitted(submission, run_at=datetime.now(UTC) + timedelta(minutes=5))
    async with process.queue.consume(TASK_PROCESSING, prefetch=10) as consumer:
        assert await taken(process, consumer) == [soon.id]
        assert await taken(process, consumer) == []

    assert late.status is TaskStatus.PENDING
    assert abs(soon.created_at - datetime.now(UTC)) < CLOSE


async def test_a_deadline_ends_no_task_before_it_is_over(process: Stores, submission: Submission) -> None:
    task = await submitted(submission, deadline=datetime.now(UTC) + timedelta(minutes=5))

    assert await process.tasks.expire(process.wall(), limit=10) == 0
    (begun,) = await process.tasks.begin([Start(task=task.id, may_take_over=False)], worker="w", delivery_limit=3)
    assert isinstance(begun, Task)


async def test_a_deadline_that_is_over_is_refused_and_one_that_is_not_is_taken(submission: Submission) -> None:
    with pytest.raises(BadRequest, match="deadline was over"):
        await submitted(submission, deadline=datetime.now(UTC) - timedelta(minutes=1))


async def test_an_attempt_is_tried_again_after_its_pause(process: Stores, submission: Submission) -> None:
    """The pause is counted from the time of the worker that failed."""
    task = await submitted(submission)
    await process.tasks.begin([Start(task=task.id, may_take_over=False)], worker="w", delivery_limit=3)
    again_at = process.wall() + timedelta(seconds=0.5)
    await process.tasks.change([Change(task=task.id, event=Retried(1, FailureReason.ERROR, "It broke.", again_at))])

    async with process.queue.consume(TASK_PROCESSING, prefetch=10) as consumer:
        assert await taken(process, consumer) == [task.id]  # word of its submission, which nobody has taken
        async with asyncio.timeout(10):
            while await taken(process, consumer) != [task.id]:
                await asyncio.sleep(0.05)
    assert process.wall() >= again_at


async def test_a_schedule_is_due_at_its_time(process: Stores, submission: Submission) -> None:
    recurring = Recurring(process.schedules, submission, wall=process.wall)
    at = datetime.now(UTC) + timedelta(minutes=5)
    schedule = await recurring.add(
        f"{at.minute} {at.hour} * * *", "UTC", submission.draft(Wanted(agent="anything"), ACME)
    )

    assert await recurring.submit_due() == 0
    assert abs(schedule.due_at - at) < timedelta(minutes=1)


async def test_partitions_are_those_of_the_time_of_the_database(process: Stores) -> None:
    await Partitions(process.databases[""], wall=process.wall).tend()

    months = {part.name.removeprefix("tasks_") for part in await all_parts(process.databases[""]) if part.begin}
    assert f"{datetime.now(UTC):%Y_%m}" in {month.removeprefix("events_") for month in months}
    assert min(months) >= f"{datetime.now(UTC):%Y_%m}"


async def test_nobody_is_taken_for_gone(process: Stores, submission: Submission) -> None:
    task = await submitted(submission)
    async with process.queue.consume(TASK_PROCESSING, prefetch=10) as consumer:
        assert await taken(process, consumer) == [task.id]
        for _ in range(10):
            await process.queue.tend()
        assert await process.queue.depth(TASK_PROCESSING) == 0


@pytest.fixture
async def database(data_dir: Path) -> AsyncIterator[Database]:
    async with fresh_stores(data_dir) as stores:
        yield stores.databases[""]
