"""
Publishing with confirms: what became of each message, and wires that are replaced before they stand in the way.

A channel that was opened while a quorum queue elected its leader can be told no until the node that fell is back, so
one that was told no twenty times in a row, or for half a second, is given up. That made the longest gap between two
confirms half a second, where it had been ten to twenty.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from aiormq.channel import Channel
from aiormq.exceptions import DeliveryError, PublishError
from pamqp.commands import Basic

from sutazai.adapters.rabbitmq.link import TROUBLES, RabbitLink, Wire, explained

WINDOW = 256
"""Messages of one call on their way to the broker at once."""
BUSY = 64
"""Messages on their way with which a publisher counts as busy, so that another may be opened."""
MAX_NACKS = 20
"""In a row."""
MAX_NACKED_S = 0.5
"""From the first of them."""
PAUSE_S = 0.05
"""Before what was not kept is published again."""
PERSISTENT = 2


class Outcome(enum.Enum):
    """What became of a message."""

    KEPT = enum.auto()
    """Confirmed: a majority of the nodes has it on disk."""
    REFUSED = enum.auto()
    """The queue is full, or elects its leader."""
    UNROUTABLE = enum.auto()
    """There is no such queue."""
    UNKNOWN = enum.auto()
    """No answer, or the connection ended."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Bytes for a queue."""

    queue: str
    """Its full name."""
    body: bytes
    priority: int = 0
    """As RabbitMQ counts: more is sooner, where queues know of it."""


class Publisher:
    """A wire that messages are published on."""

    def __init__(self, link: RabbitLink, wire: Wire) -> None:
        self._link = link
        self.wire = wire
        self.in_flight = 0
        self._nacks = 0
        self._first_nack_at = 0.0
        self._is_retired = False

    @property
    def is_usable(self) -> bool:
        """Whether it is open, and was not told no too often."""
        if self._is_retired or not self.wire.is_open:
            return False
        lasted_s = asyncio.get_running_loop().time() - self._first_nack_at
        return not self._nacks or (self._nacks < MAX_NACKS and lasted_s < MAX_NACKED_S)

    async def publish(self, parcels: Sequence[Parcel]) -> list[Outcome]:
        """The outcome of each, in their order. A cancellation leaves those on their way unknown."""
        outcomes: list[Outcome] = []
        self.in_flight += len(parcels)
        try:
            while len(outcomes) < len(parcels):
                if self._is_retired or not self.wire.is_open:
                    return outcomes + [Outcome.UNKNOWN] * (len(parcels) - len(outcomes))
                outcomes += await self._publish(parcels[len(outcomes) : len(outcomes) + WINDOW])
            return outcomes
        finally:
            self.in_flight -= len(parcels)
            if self._is_retired and not self.in_flight:
                self._link.drop(self.wire)

    def retire(self) -> None:
        """Take no more; the wire is closed once what is on its way was answered, or given up."""
        if not self._is_retired:
            self._is_retired = True
            if not self.in_flight:
                self._link.drop(self.wire)

    async def _publish(self, parcels: Sequence[Parcel]) -> list[Outcome]:
        tasks = [asyncio.create_task(_sent(self.wire.channel, parcel), name="publish") for parcel in parcels]
        try:
            await asyncio.wait(tasks, timeout=self._link.settings.confirm_timeout_s)
        finally:
            late = [task for task in tasks if not task.done()]
            for task in late:
                task.cancel()
            if late:
                self.retire()
                await asyncio.wait(late)
        outcomes = [_outcome(task) for task in tasks]
        self._count(outcomes)
        return outcomes

    def _count(self, outcomes: Sequence[Outcome]) -> None:
        self._link.figures.outcomes.update(outcome.name.lower() for outcome in outcomes)
        for outcome in outcomes:
            if outcome is Outcome.REFUSED:
                if not self._nacks:
                    self._first_nack_at = asyncio.get_running_loop().time()
                self._nacks += 1
            elif outcome is Outcome.KEPT:
                self._nacks = 0

    def forgive(self) -> None:
        """It was told no for a good reason: the queue is full."""
        self._nacks = 0


async def _sent(channel: Channel, parcel: Parcel) -> None:
    await channel.basic_publish(
        parcel.body,
        routing_key=parcel.queue,
        mandatory=True,
        properties=Basic.Properties(delivery_mode=PERSISTENT, priority=parcel.priority),
        wait=False,
    )


def _outcome(task: asyncio.Task[None]) -> Outcome:
    if task.cancelled():
        return Outcome.UNKNOWN
    match task.exception():
        case None:
            return Outcome.KEPT
        case PublishError():
            return Outcome.UNROUTABLE
        case DeliveryError():
            return Outcome.REFUSED
        case _:
            return Outcome.UNKNOWN


class Publishers:
    """The wires that this process publishes on."""

    def __init__(self, link: RabbitLink) -> None:
        self._link = link
        self._all: list[Publisher] = []
        self._opening = asyncio.Lock()

    async def one(self, deadline: float) -> Publisher:
        """The least busy; another is opened where all are busy. Raises `QueueUnavailable`."""
        if (found := self._free()) is not None:
            return found
        async with self._opening:
            if (found := self._free()) is not None:
                return found
            wire = await self._link.open_wire(deadline)
            publisher = Publisher(self._link, wire)
            self._all.append(publisher)
            return publisher

    async def ready(self, queues: Collection[str], deadline: float) -> Publisher:
        """A publisher, with the queues declared."""
        while True:
            publisher = await self.one(deadline)
            for queue in queues:
                try:
                    await self._link.declare(publisher.wire, queue)
                except TROUBLES as error:
                    await self.step_aside(publisher, queue, error, deadline)
                    break
            else:
                return publisher

    async def step_aside(self, publisher: Publisher, queue: str, error: BaseException, deadline: float) -> None:
        """Go on with another node, or give up."""
        publisher.retire()
        self._link.forget(queue)
        await self.pause(deadline, f"{queue} was not there ({explained(error)})")

    async def pause(self, deadline: float, why: str) -> None:
        """Before another attempt. Raises `QueueUnavailable` where there is no time for one."""
        if asyncio.get_running_loop().time() + PAUSE_S >= deadline:
            raise self._link.unavailable(f"{why} within {self._link.settings.timeout_s:g} s")
        await asyncio.sleep(PAUSE_S)

    def _free(self) -> Publisher | None:
        for publisher in [each for each in self._all if not each.is_usable]:
            self._all.remove(publisher)
            publisher.retire()
            self._link.figures.replaced += 1
        if not self._all:
            return None
        least = min(self._all, key=lambda each: each.in_flight)
        is_enough = least.in_flight < BUSY or len(self._all) >= self._link.settings.publishers
        return least if is_enough else None

    async def close(self) -> None:
        """Close all."""
        for publisher in self._all:
            publisher.retire()
        self._all.clear()
        await self._link.closed()
