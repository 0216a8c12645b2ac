"""
The queue over several shards: one table in each, read in turn.

A message is word of a task, and the task is found by its id wherever it is by then. So it does no harm where a message
lies in another shard than its task, and none has to be moved in haste.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime

import msgspec
import structlog

from sutazai.adapters.postgres.queue import LOOK_S, PROMOTE_AFTER_S, PostgresConsumer, PostgresQueue
from sutazai.adapters.postgres.sharded.shards import Shards
from sutazai.core.errors import QueueUnavailable, StoreUnavailable
from sutazai.policy.sharding import slot_of
from sutazai.ports.queue import Delivery, Message, QueueState

log = structlog.get_logger("sutazai.queue")


class ShardedQueue:
    """The `Queue` over shards. `run` has to run beside it."""

    def __init__(
        self,
        shards: Shards,
        *,
        max_length: int,
        promote_after_s: float = PROMOTE_AFTER_S,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """
        Args:
            max_length: of a queue in each shard.
        """
        self._shards = shards
        self._queues = {
            name: PostgresQueue(database, max_length=max_length, promote_after_s=promote_after_s, wall=wall)
            for name, database in shards.databases.items()
        }

    async def put(self, messages: Sequence[Message]) -> Sequence[Message]:
        groups: dict[str, list[Message]] = defaultdict(list)
        for message in messages:
            groups[self._owner(message)].append(message)
        refused: list[Message] = []
        for shard, own in groups.items():
            refused += await self._queues[shard].put(own)
        return refused

    @asynccontextmanager
    async def consume(self, queue: str, *, prefetch: int) -> AsyncIterator[ShardedConsumer]:
        """Read a queue in all shards."""
        async with AsyncExitStack() as stack:
            consumers = [
                await stack.enter_async_context(each.consume(queue, prefetch=prefetch))
                for each in self._queues.values()
            ]
            yield ShardedConsumer(consumers, prefetch)

    async def depth(self, queue: str) -> int:
        return sum([await each.depth(queue) for each in self._queues.values()])

    async def states(self) -> Sequence[QueueState]:
        """All queues that were ever used, by name, of all shards together."""
        found: dict[str, QueueState] = {}
        for queue in self._queues.values():
            for state in await queue.states():
                found[state.name] = _together(found[state.name], state) if state.name in found else state
        return [found[name] for name in sorted(found)]

    async def tend(self) -> None:
        """Do once what `run` does at every beat."""
        for queue in self._queues.values():
            await queue.tend()

    async def run(self) -> None:
        """Tend the tables until cancelled, each for itself."""
        async with asyncio.TaskGroup() as group:
            for name, queue in self._queues.items():
                group.create_task(queue.run(), name=f"tend the queue of {name}")

    def _owner(self, message: Message) -> str:
        try:
            return self._shards.owner(slot_of(message.tenant))
        except StoreUnavailable as error:
            raise QueueUnavailable(error.message) from error


class ShardedConsumer:
    """A reader of the same queue in all shards, who holds no more than `prefetch` of them together."""

    def __init__(self, consumers: Sequence[PostgresConsumer], prefetch: int) -> None:
        self._consumers = consumers
        self._prefetch = prefetch
        self._first = 0
        """Whose turn it is."""

    async def take(self, at_most: int) -> Sequence[Delivery]:
        while True:
            if found := await self._look(at_most):
                return found
            waits = [asyncio.create_task(one.called(), name="wait for messages") for one in self._consumers]
            try:
                await asyncio.wait(waits, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    async def _look(self, at_most: int) -> Sequence[Delivery]:
        """What the next shard has that has something. Raises `QueueUnavailable` where all are away."""
        faults: list[QueueUnavailable] = []
        count = len(self._consumers)
        for step in range(count):
            place = (self._first + step) % count
            free = self._prefetch - sum(one.held for one in self._consumers)
            try:
                found = await self._consumers[place].look(at_most, free)
            except QueueUnavailable as error:
                faults.append(error)
                continue
            if found:
                self._first = (place + 1) % count
                return [msgspec.structs.replace(delivery, tag=(place, delivery.tag)) for delivery in found]
        if len(faults) == count:
            raise faults[0]
        for fault in faults:
            log.warning("a shard's queue did not answer", why=fault.message)
        return ()

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        for consumer, own in self._by_consumer(deliveries):
            await consumer.ack(own)

    async def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        for consumer, own in self._by_consumer(deliveries):
            await consumer.hand_back(own)

    async def hold(self, prefetch: int) -> None:
        self._prefetch = prefetch
        for consumer in self._consumers:
            await consumer.hold(prefetch)

    def _by_consumer(self, deliveries: Sequence[Delivery]) -> Sequence[tuple[PostgresConsumer, Sequence[Delivery]]]:
        groups: dict[int, list[Delivery]] = defaultdict(list)
        for delivery in deliveries:
            match delivery.tag:
                case (int() as place, tag):
                    groups[place].append(msgspec.structs.replace(delivery, tag=tag))
        return [(self._consumers[place], own) for place, own in groups.items()]


def _together(one: QueueState, other: QueueState) -> QueueState:
    return replace(
        one,
        waiting=one.waiting + other.waiting,
        held=(one.held or 0) + (other.held or 0),
        later=(one.later or 0) + (other.later or 0),
        consumers=one.consumers + other.consumers,
    )
