"""Schedules on PostgreSQL: each due time makes one task, whoever looks and whenever they are killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.shards import addresses

from sutazai.adapters.postgres.stores import Stores
from sutazai.core.errors import NotFound
from sutazai.core.schedule import Schedule
from sutazai.core.task import TaskDraft
from sutazai.ports.tasks import TaskFilter
from sutazai.tasks.recurring import Recurring
from sutazai.tasks.submit import Submission
from sutazai.testing.plain_agents import plain_agents

DRAFT = TaskDraft(tenant="acme", agent="echo", queue="of before")
LONG_AGO = datetime(2025, 1, 1, tzinfo=UTC)


@pytest.fixture(params=["postgres", "two shards"])
def urls(request: pytest.FixtureRequest) -> Sequence[str]:
    return addresses(request)


@asynccontextmanager
async def recurring(stores: Stores, **options: Any) -> AsyncIterator[Recurring]:
    """One gateway's, which looks only when it is told to."""
    submission = Submission(stores.tasks, plain_agents())
    run = asyncio.create_task(submission.run())
    try:
        yield Recurring(stores.schedules, submission, **options)
    finally:
        run.cancel()
        with suppress(asyncio.CancelledError):
            await run


async def made(stores: Stores) -> list[str]:
    """The idempotency keys of all tasks."""
    return [task.draft.idempotency_key for task in await stores.tasks.page("acme", TaskFilter(), limit=100)]


async def missed(stores: Stores, cron: str = "0 0 * * *", draft: TaskDraft = DRAFT) -> Schedule:
    """A schedule that has been due since long ago: nobody looked."""
    async with recurring(stores, wall=lambda: LONG_AGO) as one:
        return await one.add(cron, "UTC", draft)


async def test_what_was_missed_is_made_up_for_by_its_latest_time_alone(stores: Stores) -> None:
    schedule = await missed(stores)
    async with recurring(stores) as one:
        assert await one.submit_due() == 1
        assert await one.submit_due() == 0
    kept = await stores.schedules.get("acme", schedule.id)
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    (task,) = await stores.tasks.page("acme", TaskFilter(), limit=10)

    assert kept is not None
    assert kept.last_due_at is not None
    assert kept.last_due_at - today in {timedelta(0), timedelta(days=-1)}  # midnight may have passed meanwhile
    assert kept.due_at == kept.last_due_at + timedelta(days=1)
    assert (kept.last_task, kept.last_error) == (task.id, "")
    assert task.draft.queue == plain_agents()["echo"].queue


async def test_several_gateways_make_one_task_of_each_time(stores: Stores) -> None:
    for _ in range(5):
        await missed(stores)
    async with recurring(stores) as one, recurring(stores) as two, recurring(stores) as three:
        await asyncio.gather(*(gateway.submit_due() for gateway in (one, two, three)))

    keys = await made(stores)
    assert len(keys) == len(set(keys)) == 5


async def test_one_that_was_killed_before_it_noted_what_it_did_is_followed_by_the_same_task(stores: Stores) -> None:
    schedule = await missed(stores)
    async with recurring(stores) as one:
        await one.submit_due()
        (first,) = await stores.tasks.page("acme", TaskFilter(), limit=10)
        kept = await stores.schedules.get("acme", schedule.id)
        assert kept is not None
        await stores.schedules.replace(replace(kept, due_at=schedule.due_at))
        assert await one.submit_due() == 1

    (same,) = await stores.tasks.page("acme", TaskFilter(), limit=10)
    assert same.id == first.id


async def test_a_schedule_whose_agent_is_gone_says_so_and_stays(stores: Stores) -> None:
    schedule = await missed(stores, draft=replace(DRAFT, agent="gone"))
    async with recurring(stores) as one:
        await one.submit_due()
    kept = await stores.schedules.get("acme", schedule.id)

    assert kept is not None
    assert "'gone'" in kept.last_error
    assert kept.due_at > datetime.now(UTC)
    assert await made(stores) == []


async def test_the_loop_submits_what_is_due_without_being_told(stores: Stores) -> None:
    await missed(stores)
    async with recurring(stores) as one, asyncio.timeout(10):
        run = asyncio.create_task(one.run())
        while not await made(stores):
            await asyncio.sleep(0.02)
        run.cancel()
        with suppress(asyncio.CancelledError):
            await run


async def test_a_replaced_schedule_is_due_by_its_new_times(stores: Stores) -> None:
    async with recurring(stores) as one:
        schedule = await one.add("0 0 * * *", "UTC", DRAFT)
        changed = await one.replace(schedule.id, "30 12 * * *", "UTC", replace(DRAFT, input='{"text": "x"}'))
        with pytest.raises(NotFound):
            await one.replace(schedule.id, "30 12 * * *", "UTC", replace(DRAFT, tenant="other"))

    assert (changed.due_at.hour, changed.due_at.minute, changed.draft.input) == (12, 30, '{"text": "x"}')
    assert changed.created_at == schedule.created_at


async def test_tenants_have_their_own_and_not_too_many(stores: Stores) -> None:
    async with recurring(stores) as one:
        schedule = await one.add("0 0 * * *", "UTC", DRAFT)
    assert await stores.schedules.get("other", schedule.id) is None
    assert await stores.schedules.page("other", limit=10) == []
    assert not await stores.schedules.delete("other", schedule.id)
    assert not await stores.schedules.add(replace(schedule, id="sched_" + "0" * 32), at_most=1)
    assert await stores.schedules.delete("acme", schedule.id)
    assert await stores.schedules.next_in_s() is None
