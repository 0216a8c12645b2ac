"""What becomes of tasks when nodes of a RabbitMQ cluster are killed, stall, or are too few."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from tests.rabbit_servers import PASSWORD, QUOTED, Rabbits, eventually

from sutazai.adapters.rabbitmq.queue import RabbitQueue, open_rabbitmq
from sutazai.adapters.rabbitmq.topology import full_name
from sutazai.core.errors import QueueUnavailable
from sutazai.ports.queue import Message
from sutazai.settings.model import Rabbitmq

pytestmark = [pytest.mark.xdist_group("rabbitmq_cluster"), pytest.mark.alone, pytest.mark.deadline(120)]

TASKS = "task_processing"
OTHERS = "llm_inference"
PUBLISHERS = 8
KILLED_S = 8.0
"""Far above the 0.6 s that were measured without another confirm: the machine may be busy."""
STALLED_S = 40.0
"""Measured were 15 s, of which the other nodes need `net_ticktime` and a quarter to give the leader up."""


@pytest.fixture
def cluster(rabbit_cluster: Rabbits) -> Iterator[Rabbits]:
    """Three nodes, all of them there before the test and after it."""
    rabbit_cluster.restore()
    yield rabbit_cluster
    rabbit_cluster.restore()


@pytest.fixture
def settings(cluster: Rabbits) -> Rabbitmq:
    """Queues of this test's own."""
    return cluster.settings(prefix=uuid.uuid4().hex[:12], timeout_s=40.0)


def word_of(number: int) -> Message:
    return Message(task=f"task_{number:032x}", queue=TASKS, tenant="acme", agent="chat")


class Traffic:
    """Tasks that are put and read all the time, and what is known of them."""

    def __init__(self, queue: RabbitQueue) -> None:
        self._queue = queue
        self._numbers = itertools.count()
        self.kept: set[str] = set()
        self.read: list[str] = []
        self.longest_gap_s = 0.0
        self._last_kept_at = time.monotonic()
        self._is_over = False

    async def has_kept(self, number: int) -> None:
        """Wait until so many more were confirmed."""
        goal = len(self.kept) + number
        await eventually(lambda: _is(len(self.kept) >= goal), within_s=40.0)

    async def has_read_all(self) -> None:
        """Put no more, and wait until all that was confirmed was read."""
        self._is_over = True
        await eventually(lambda: _is(self.kept <= set(self.read)), within_s=40.0)

    async def put(self) -> None:
        """One task after the other."""
        while not self._is_over:
            word = word_of(next(self._numbers))
            assert await self._queue.put([word]) == []
            now = time.monotonic()
            self.longest_gap_s = max(self.longest_gap_s, now - self._last_kept_at)
            self._last_kept_at = now
            self.kept.add(word.task)

    async def take(self) -> None:
        """All that comes."""
        async with self._queue.consume(TASKS, prefetch=10) as consumer:
            while True:
                deliveries = await consumer.take(10)
                self.read += [each.message.task for each in deliveries]
                await consumer.ack(deliveries)


async def _is(value: bool) -> bool:
    return value


@asynccontextmanager
async def traffic(settings: Rabbitmq) -> AsyncIterator[Traffic]:
    """Eight that put, and two that read."""
    async with open_rabbitmq(settings) as queue:
        await queue.depth(TASKS)
        made = Traffic(queue)
        tasks = [asyncio.create_task(made.put()) for _ in range(PUBLISHERS)]
        tasks += [asyncio.create_task(made.take()) for _ in range(2)]
        try:
            await made.has_kept(200)
            yield made
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            for end in ends:
                assert end is None or isinstance(end, asyncio.CancelledError), end


@pytest.mark.deadline(120)
async def test_the_leader_is_killed_and_no_confirmed_task_is_lost(cluster: Rabbits, settings: Rabbitmq) -> None:
    async with traffic(settings) as under_way:
        leader = await asyncio.to_thread(cluster.leader_of, full_name(TASKS, settings))
        await asyncio.to_thread(leader.kill)
        await under_way.has_kept(500)
        await under_way.has_read_all()

    assert under_way.longest_gap_s < KILLED_S


@pytest.mark.deadline(120)
async def test_the_leader_stalls_and_tasks_go_through_another_node(cluster: Rabbits, settings: Rabbitmq) -> None:
    async with traffic(settings) as under_way:
        leader = await asyncio.to_thread(cluster.leader_of, full_name(TASKS, settings))
        leader.stall()
        try:
            await under_way.has_kept(100)
        finally:
            leader.resume()
        await under_way.has_read_all()

    assert under_way.longest_gap_s < STALLED_S


@pytest.mark.deadline(120)
async def test_without_a_majority_the_caller_is_told_and_all_goes_on_when_it_is_back(
    cluster: Rabbits, settings: Rabbitmq
) -> None:
    brief = cluster.settings(prefix=settings.prefix, timeout_s=2.0, confirm_timeout_s=1.0)
    async with open_rabbitmq(brief) as queue:
        assert await queue.put([word_of(0)]) == []
        await asyncio.to_thread(cluster.settle)
        for node in cluster.nodes[:2]:
            await asyncio.to_thread(node.kill)

        began = time.monotonic()
        with pytest.raises(QueueUnavailable) as caught:
            await queue.put([word_of(1)])
        took_s = time.monotonic() - began
        with pytest.raises(QueueUnavailable):
            async with queue.consume(OTHERS, prefetch=1):
                pass

        await asyncio.to_thread(cluster.restore)
        await eventually(lambda: is_put(queue, word_of(2)), within_s=30.0)
        async with queue.consume(TASKS, prefetch=5) as consumer:
            seen: set[str] = set()
            while not seen >= {word_of(0).task, word_of(2).task}:
                taken = await consumer.take(5)  # some came often: nobody could tell whether they had been kept
                await consumer.ack(taken)
                seen |= {each.message.task for each in taken}

    assert took_s < brief.timeout_s + brief.confirm_timeout_s + 2.0
    assert "rabbitmq.url" in caught.value.message
    assert PASSWORD not in caught.value.message
    assert QUOTED not in caught.value.message


async def is_put(queue: RabbitQueue, message: Message) -> bool:
    try:
        return not await queue.put([message])
    except QueueUnavailable:
        return False
