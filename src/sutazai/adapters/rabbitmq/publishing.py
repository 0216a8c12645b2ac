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
from dataclasses import dataclass, field
from itertools import takewhile

from sutazai.adapters.rabbitmq.frames import Returned, Settled
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


@dataclass(slots=True, eq=False)
class _Burst:
    """Messages that were written together."""

    parcels: Sequence[Parcel]
    outcomes: list[Outcome]
    """`UNKNOWN` until something is known."""
    left: int
    answered: asyncio.Event = field(default_factory=asyncio.Event)


class Publisher:
    """A wire that messages are published on."""

    def __init__(self, link: RabbitLink, wire: Wire) -> None:
        self._link = link
        self.wire = wire
        self.in_flight = 0
        self._nacks = 0
        self._first_nack_at = 0.0
        self._is_retired = False
        self._on_their_way: dict[int, tuple[_Burst, int]] = {}
        """By their numbers, in the order of these: each with its place in a burst."""
        self._returned: list[Returned] = []
        """Whose confirm is about to follow."""
        wire.lane.on_settled = self._settled
        wire.lane.on_returned = self._returned.append
        wire.channel.closing.add_done_callback(lambda _: self._broken())

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
        burst = _Burst(parcels, [Outcome.UNKNOWN] * len(parcels), len(parcels))
        numbers = range(0)
        try:
            numbers = self.wire.lane.publish([(each.queue, each.body, each.priority) for each in parcels])
            self._on_their_way.update((number, (burst, place)) for place, number in enumerate(numbers))
            async with asyncio.timeout(self._link.settings.confirm_timeout_s):
                await burst.answered.wait()
        except TROUBLES:
            pass
        finally:
            if burst.left:
                self.retire()
                for number in numbers:
                    self._on_their_way.pop(number, None)
        self._count(burst.outcomes)
        return burst.outcomes

    def _settled(self, settled: Settled) -> None:
        numbers = [settled.tag]
        if settled.is_multiple:
            numbers = list(takewhile(lambda number: number <= settled.tag, self._on_their_way))
        for number in numbers:
            burst, place = self._on_their_way.pop(number, (None, 0))
            if burst is not None:
                parcel = burst.parcels[place]
                burst.outcomes[place] = self._outcome(parcel) if settled.has_kept else Outcome.REFUSED
                burst.left -= 1
                if not burst.left:
                    burst.answered.set()

    def _outcome(self, parcel: Parcel) -> Outcome:
        """Of one that was confirmed, which is said also of what was returned, because no queue is to keep it."""
        if self._returned:
            returned = Returned(parcel.queue, parcel.body)
            if returned in self._returned:
                self._returned.remove(returned)
                return Outcome.UNROUTABLE
        return Outcome.KEPT

    def _broken(self) -> None:
        """The wire ended: nothing more will be heard of what is on its way."""
        for burst, _ in self._on_their_way.values():
            burst.answered.set()

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
