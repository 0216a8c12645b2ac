"""
Ends tasks whose word the broker gave up.

A broker sets aside what it has delivered too often. The task itself would stay as it is for ever, so it is failed here,
where people find it, and can be given its attempts again.
"""

from __future__ import annotations

import asyncio
from collections import Counter

import structlog

from sutazai.core.errors import StoreUnavailable
from sutazai.ports.queue import Consumer, Queue
from sutazai.ports.tasks import Start, TaskStore

log = structlog.get_logger("sutazai.tasks")

NAME = "dead_letters"
AT_ONCE = 1000
PAUSE_S = 2.0


class DeadLetters:
    """Reads what the broker gave up."""

    def __init__(self, broker: Queue, store: TaskStore) -> None:
        self._broker = broker
        self._store = store
        self.counts = Counter(task=0, unreadable=0)
        """What came here, by whether it named a task."""

    async def run(self) -> None:
        """Until cancelled. Several processes may."""
        while True:
            try:
                async with self._broker.consume(NAME, prefetch=AT_ONCE) as consumer:
                    while True:
                        await self._end_some(consumer)
            except StoreUnavailable as error:
                log.warning("dead letters of the broker wait", why=error.message)
            except Exception:  # the border of one turn
                log.exception("dead letters of the broker wait")
            await asyncio.sleep(PAUSE_S)

    async def _end_some(self, consumer: Consumer) -> None:
        deliveries = await consumer.take(AT_ONCE)
        readable = [delivery for delivery in deliveries if delivery.message.task]
        starts = [Start(task=one.message.task, may_take_over=True) for one in readable]
        # Nobody may start them: a limit of none ends all that have not ended.
        ended = await self._store.begin(starts, worker=NAME, delivery_limit=0)
        await consumer.ack(readable)
        # What is unreadable stays where it is, for people to look at.
        unreadable = len(deliveries) - len(readable)
        self.counts.update(task=len(readable), unreadable=unreadable)
        log.warning("the broker gave up", tasks=len(ended), unreadable=unreadable)
