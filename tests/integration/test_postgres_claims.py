"""Word of new tasks that a consumer of the same process holds from the start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.lossy_database import LossyDatabase
from tests.postgres_databases import fresh_database

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import CommitUnknown, Database, open_database
from sutazai.adapters.postgres.queue import BEAT_S, FREE_S, LEASE_S, PostgresConsumer, PostgresQueue
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.core.errors import StoreUnavailable
from sutazai.core.request import Priority
from sutazai.core.task import TaskDraft
from sutazai.settings.secret import Secret

DRAFT = TaskDraft(tenant="acme", agent="echo", queue="q")
LIMIT_S = 10.0
SHORT_S = 0.2
"""Long enough to find out that nothing comes."""


@pytest.fixture
async def database(data_dir: Path) -> AsyncIterator[Database]:
    async with fresh_database(data_dir) as url, open_database(Secret(url), timeout_s=LIMIT_S) as opened:
        await migrate.migrate(opened, migrate.read())
        yield opened


@asynccontextmanager
async def drained(queue: PostgresQueue, *, prefetch: int = 5) -> AsyncIterator[PostgresConsumer]:
    """A consumer that has looked and found nothing."""
    async with queue.consume("q", prefetch=prefetch) as consumer:
        assert await consumer.look(prefetch, prefetch) == []
        yield consumer


async def rows(database: Database) -> list[tuple[Any, int]]:
    """Who holds each, and how often it was delivered."""
    async with database.statement() as connection:
        found = await connection.fetch("SELECT consumer, deliveries FROM dispatch ORDER BY id")
    return [(row["consumer"], row["deliveries"]) for row in found]


async def is_nothing_there(consumer: PostgresConsumer) -> bool:
    try:
        async with asyncio.timeout(SHORT_S):
            await consumer.take(5)
    except TimeoutError:
        return True
    return False


async def test_an_idle_consumer_holds_what_is_submitted_beside_it(database: Database) -> None:
    """Nobody tends the queue here, so nobody but the submission itself can have woken it."""
    queue = PostgresQueue(database)
    store = PostgresTaskStore(database, max_length=100, queue=queue)
    async with drained(queue) as consumer:
        taking = asyncio.create_task(consumer.take(5))
        await asyncio.sleep(0)
        high, low = await store.submit([replace(DRAFT, priority=Priority.HIGH), DRAFT])
        async with asyncio.timeout(LIMIT_S):
            first, second = await taking

        held = await rows(database)
        assert [delivery.message.task for delivery in (first, second)] == [high.id, low.id]
        assert (first.message.priority, first.is_redelivered, first.count) == (Priority.HIGH, False, 0)
        assert {deliveries for _, deliveries in held} == {1}
        assert None not in {consumer_id for consumer_id, _ in held}

        await consumer.hand_back([second])
        (again,) = await consumer.take(5)
        assert (again.message, again.is_redelivered) == (second.message, True)
        await consumer.ack([first, again])
    assert await rows(database) == []


@pytest.mark.parametrize(
    "draft",
    [
        pytest.param(replace(DRAFT, queue="other"), id="of another queue"),
        pytest.param(replace(DRAFT, run_at=datetime.now(UTC) + timedelta(hours=1)), id="for later"),
    ],
)
async def test_it_does_not_hold_what_is_not_for_it(database: Database, draft: TaskDraft) -> None:
    queue = PostgresQueue(database)
    store = PostgresTaskStore(database, max_length=100, queue=queue)
    async with drained(queue) as consumer:
        await store.submit([draft])
        assert await rows(database) == [(None, 0)]
        assert await is_nothing_there(consumer)


async def test_a_task_that_waits_for_another_is_held_by_nobody_and_one_that_failed_is_not_there(
    database: Database,
) -> None:
    queue = PostgresQueue(database)
    store = PostgresTaskStore(database, max_length=100, queue=queue)
    (lost,) = await store.submit([replace(DRAFT, run_at=datetime.now(UTC) + timedelta(hours=1))])
    await store.cancel("acme", lost.id)
    async with drained(queue) as consumer:
        (first,) = await store.submit([DRAFT])
        await store.submit([replace(DRAFT, after=(first.id,)), replace(DRAFT, after=(lost.id,))])
        taken = await consumer.take(5)
        assert [delivery.message.task for delivery in taken] == [first.id]
        assert await is_nothing_there(consumer)


async def test_more_than_it_may_hold_waits_for_everybody(database: Database) -> None:
    queue, other = PostgresQueue(database), PostgresQueue(database)
    store = PostgresTaskStore(database, max_length=100, queue=queue)
    async with drained(queue, prefetch=3) as consumer, other.consume("q", prefetch=5) as elsewhere:
        await store.submit([DRAFT] * 2)
        await store.submit([DRAFT] * 2)  # of which it might hold one
        assert [consumer_id is None for consumer_id, _ in await rows(database)] == [False, False, True, True]

        assert len(await consumer.take(1)) == 1
        assert len(await elsewhere.take(5)) == 2


async def test_one_that_is_to_hold_nothing_more_does_not(database: Database) -> None:
    queue = PostgresQueue(database)
    store = PostgresTaskStore(database, max_length=100, queue=queue)
    async with drained(queue) as consumer:
        await consumer.hold(0)
        await store.submit([DRAFT])
        assert await rows(database) == [(None, 0)]


async def test_while_others_bring_word_too_nothing_is_passed_over(database: Database) -> None:
    queue, other = PostgresQueue(database), PostgresQueue(database)
    here = PostgresTaskStore(database, max_length=100, queue=queue)
    there = PostgresTaskStore(database, max_length=100, queue=other)
    async with drained(queue, prefetch=50) as consumer:
        made = [task.id for _ in range(5) for store in (there, here) for task in await store.submit([DRAFT])]
        consumer.wake(frozenset({"q"}))

        taken = [delivery.message.task for _ in range(2) for delivery in await consumer.take(len(made) // 2)]

    assert sorted(taken) == made


async def test_what_was_kept_though_nobody_heard_of_it_is_found(database: Database) -> None:
    lossy = LossyDatabase.of_same(database)
    queue = PostgresQueue(database)
    store = PostgresTaskStore(lossy, max_length=100, queue=queue)
    async with drained(queue) as consumer:
        lossy.losses = 1
        with pytest.raises(CommitUnknown):
            await store.submit([DRAFT])
        async with asyncio.timeout(LIMIT_S):
            (found,) = await consumer.take(5)
        assert found.is_redelivered
        assert consumer.held == 1


async def test_what_was_not_kept_leaves_its_place_free(database: Database) -> None:
    queue = PostgresQueue(database)
    store = PostgresTaskStore(database, max_length=100, queue=queue)
    async with drained(queue, prefetch=1) as consumer:
        async with database.statement() as connection:
            await connection.execute("ALTER TABLE tasks ADD CONSTRAINT none_of_acme CHECK (tenant <> 'acme')")
        with pytest.raises(StoreUnavailable):
            await store.submit([DRAFT])
        assert consumer.held == 0
        (task,) = await store.submit([replace(DRAFT, tenant="other")])
        (taken,) = await consumer.take(1)
        assert taken.message.task == task.id


async def test_a_submission_that_is_called_off_loses_nothing(database: Database) -> None:
    queue = PostgresQueue(database)
    store = PostgresTaskStore(database, max_length=1000, queue=queue)
    async with drained(queue, prefetch=100) as consumer:
        for pause_s in (0.0, 0.0005, 0.001, 0.002, 0.004):
            submitting = asyncio.create_task(store.submit([DRAFT]))
            await asyncio.sleep(pause_s)
            submitting.cancel()
            await asyncio.wait([submitting])
        await store.submit([DRAFT])
        async with database.statement() as connection:
            kept = {row["id"].hex for row in await connection.fetch("SELECT id FROM tasks")}
        taken: set[str] = set()
        async with asyncio.timeout(LIMIT_S):
            while taken != kept:
                taken |= {delivery.message.task.removeprefix("task_") for delivery in await consumer.take(100)}


async def test_one_that_was_taken_for_gone_meanwhile_holds_nothing_and_everybody_may_take_it(
    database: Database,
) -> None:
    now_s = 100.0
    queue, other = PostgresQueue(database), PostgresQueue(database, clock=lambda: now_s)
    store = PostgresTaskStore(database, max_length=100, queue=queue)
    async with drained(queue) as late, other.consume("q", prefetch=5) as elsewhere:
        for _ in range(int(LEASE_S / BEAT_S) + 2):
            now_s += BEAT_S
            await other.tend()
        await store.submit([DRAFT])  # it does not know yet
        assert [consumer_id is None for consumer_id, _ in await rows(database)] == [True]
        (taken,) = await elsewhere.take(5)
        await elsewhere.hand_back([taken])

        await queue.tend()
        (again,) = await late.take(5)
        assert again.message == taken.message


async def test_what_a_consumer_held_that_left_meanwhile_is_freed(database: Database) -> None:
    now_s = 100.0
    queue, other = PostgresQueue(database), PostgresQueue(database, clock=lambda: now_s)
    async with drained(queue) as consumer:
        known_as = consumer.expect(1)
    async with database.statement() as connection:
        await connection.execute(
            "INSERT INTO dispatch (queue, tenant, agent, priority, turn, is_due, available_at, consumer, deliveries)"
            " VALUES ('q', 'acme', 'echo', 1, 0, true, now(), $1, 1)",
            known_as,
        )
    consumer.receive(known_as, {}, expected=1)
    now_s += FREE_S
    await other.tend()
    assert await rows(database) == [(None, 1)]
