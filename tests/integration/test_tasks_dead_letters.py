"""Messages that a broker gives up, and what becomes of their tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.postgres_databases import fresh_stores
from tests.redis_servers import eventually

from sutazai.adapters.postgres.stores import Stores
from sutazai.core.task import FailureReason, TaskDraft, TaskStatus
from sutazai.ports.tasks import TaskFilter
from sutazai.tasks.dead_letters import NAME, DeadLetters
from sutazai.tasks.relay import Relay
from sutazai.testing.queue import MemoryQueue

QUEUE = "task_processing"


@pytest.fixture
async def stores(data_dir: Path) -> AsyncIterator[Stores]:
    async with fresh_stores(data_dir) as opened:
        yield opened


@pytest.fixture
async def broker(stores: Stores) -> AsyncIterator[MemoryQueue]:
    """A broker that gives up after two deliveries, fed by the outbox."""
    queue = MemoryQueue(max_length=10, delivery_limit=1)
    work = [stores.queue.run(), Relay(stores.queue, queue, [QUEUE]).run(), DeadLetters(queue, stores.tasks).run()]
    tasks = [asyncio.create_task(each) for each in work]
    yield queue
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_a_task_whose_word_was_given_up_is_failed_and_can_be_tried_again(
    stores: Stores, broker: MemoryQueue
) -> None:
    (task,) = await stores.tasks.submit([TaskDraft(tenant="acme", agent="a")])
    async with broker.consume(QUEUE, prefetch=1) as consumer:
        for _ in range(2):
            await consumer.hand_back(await consumer.take(1))

    async def has_ended() -> bool:
        return (await stores.tasks.several("acme", [task.id]))[0].status.is_end

    await eventually(has_ended)
    (ended,) = await stores.tasks.several("acme", [task.id])
    again = await stores.tasks.requeue("acme", task.id)

    assert (ended.status, ended.reason) == (TaskStatus.FAILED, FailureReason.DELIVERY_LIMIT)
    assert again is not None
    assert again.status is TaskStatus.PENDING


async def test_what_is_unreadable_stays_among_the_dead_letters(stores: Stores) -> None:
    broker = MemoryQueue(max_length=10, delivery_limit=1)
    await broker.put_unreadable(NAME)
    ending = asyncio.create_task(DeadLetters(broker, stores.tasks).run())

    async def is_taken() -> bool:
        return await broker.depth(NAME) == 0

    await eventually(is_taken)
    await stores.tasks.page(None, TaskFilter(), limit=1)  # as long as the other needs to look at it
    ending.cancel()
    await asyncio.wait([ending])

    assert await broker.depth(NAME) == 1


async def test_a_full_broker_leaves_word_in_the_outbox_until_there_is_room(stores: Stores, broker: MemoryQueue) -> None:
    draft = TaskDraft(tenant="acme", agent="a", run_at=datetime.now(UTC))
    tasks = await stores.tasks.submit([draft] * 25)
    seen: set[str] = set()
    async with broker.consume(QUEUE, prefetch=5) as consumer:
        while len(seen) < len(tasks):
            deliveries = await consumer.take(5)
            seen.update(delivery.message.task for delivery in deliveries)
            await consumer.ack(deliveries)

    assert seen == {task.id for task in tasks}
