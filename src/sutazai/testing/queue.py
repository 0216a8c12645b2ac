"""A `Queue` in memory that can be away or full, for tests."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace

from sutazai.core.errors import QueueUnavailable
from sutazai.ports.queue import Consumer, Delivery, Message


@dataclass(frozen=True, slots=True)
class _Waiting:
    message: Message
    count: int = 0


class MemoryQueue:
    """One broker for all who are given it. `is_away` is its fault, to be set."""

    def __init__(
        self, *, max_length: int = 100_000, delivery_limit: int = 20, dead_letters: str = "dead_letters"
    ) -> None:
        self._queues: dict[str, deque[_Waiting]] = {}
        self._max_length = max_length
        self._delivery_limit = delivery_limit
        self._dead_letters = dead_letters
        self._tags = itertools.count(1)
        self._stirred = asyncio.Condition()
        self.is_away = False

    async def put(self, messages: Sequence[Message]) -> Sequence[Message]:
        await self.arrive()
        refused = []
        for message in messages:
            waiting = self._of(message.queue)
            if len(waiting) >= self._max_length:
                refused.append(message)
            else:
                waiting.append(_Waiting(message))
        await self._stir()
        return refused

    async def put_unreadable(self, queue: str) -> None:
        """A message that nobody understands."""
        self._of(queue).append(_Waiting(Message(task="", queue=queue, tenant="", agent="")))
        await self._stir()

    def consume(self, queue: str, *, prefetch: int) -> AbstractAsyncContextManager[Consumer]:
        return self._consume(queue, prefetch)

    async def depth(self, queue: str) -> int:
        await self.arrive()
        return len(self._of(queue))

    @asynccontextmanager
    async def _consume(self, queue: str, prefetch: int) -> AsyncIterator[Consumer]:
        await self.arrive()
        consumer = _MemoryConsumer(self, queue, prefetch)
        try:
            yield consumer
        finally:
            await self.give_back(queue, consumer.release())

    async def arrive(self) -> None:
        """As every call begins."""
        await asyncio.sleep(0)
        if self.is_away:
            raise QueueUnavailable("The queue is away.")

    async def some(self, queue: str, at_most: int) -> Sequence[Delivery]:
        """Wait for at least one, and take what is there."""
        async with self._stirred:
            await self._stirred.wait_for(lambda: self.is_away or self._of(queue))
            if self.is_away:
                raise QueueUnavailable("The queue is away.")
            waiting = self._of(queue)
            taken = [waiting.popleft() for _ in range(min(at_most, len(waiting)))]
        return [
            Delivery(message=each.message, tag=next(self._tags), is_redelivered=each.count > 0, count=each.count)
            for each in taken
        ]

    async def give_back(self, queue: str, deliveries: Sequence[Delivery]) -> None:
        """They wait again where they came from, first of all; those that did so too often are dead letters."""
        for delivery in reversed(deliveries):
            back = replace(_Waiting(delivery.message), count=delivery.count + 1)
            if back.count > self._delivery_limit and queue != self._dead_letters:
                self._of(self._dead_letters).append(_Waiting(delivery.message))
            else:
                self._of(queue).appendleft(back)
        await self._stir()

    async def fall(self, *, is_away: bool = True) -> None:
        """Be away, or there again; who waits is told."""
        self.is_away = is_away
        await self._stir()

    def _of(self, queue: str) -> deque[_Waiting]:
        return self._queues.setdefault(queue, deque())

    async def _stir(self) -> None:
        async with self._stirred:
            self._stirred.notify_all()


class _MemoryConsumer:
    def __init__(self, queue: MemoryQueue, name: str, prefetch: int) -> None:
        self._queue = queue
        self._name = name
        self._prefetch = prefetch
        self._held: dict[object, Delivery] = {}
        self._freed = asyncio.Event()

    async def take(self, at_most: int) -> Sequence[Delivery]:
        await self._queue.arrive()
        while len(self._held) >= self._prefetch:
            self._freed.clear()
            await self._freed.wait()
        taken = await self._queue.some(self._name, min(at_most, self._prefetch - len(self._held)))
        self._held.update((each.tag, each) for each in taken)
        return taken

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        await self._queue.arrive()
        self._drop(deliveries)

    async def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        await self._queue.arrive()
        await self._queue.give_back(self._name, self._drop(deliveries))

    async def hold(self, prefetch: int) -> None:
        self._prefetch = prefetch
        self._freed.set()

    def release(self) -> Sequence[Delivery]:
        """All that is held, and no longer."""
        return self._drop(list(self._held.values()))

    def _drop(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        dropped = [each for each in deliveries if self._held.pop(each.tag, None) is not None]
        self._freed.set()
        return dropped
