"""
The stream `agent_coordination`: events that stay for days, and can be read again from any place.

It is spoken to like a queue, by the same wires with the same confirms, and so through the same failures.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sutazai.adapters.rabbitmq.frames import Arrival
from sutazai.adapters.rabbitmq.link import RabbitLink
from sutazai.adapters.rabbitmq.publishing import Outcome, Parcel, Publishers
from sutazai.adapters.rabbitmq.reading import Reader, Tag, acknowledged
from sutazai.adapters.rabbitmq.topology import STREAM, full_name

PREFETCH = 256
"""Entries on their way to one reader."""
OFFSET_HEADER = "x-stream-offset"


@dataclass(frozen=True, slots=True)
class Entry:
    """One event in the stream."""

    offset: int
    """Its place: each is greater than those of all entries before it."""
    body: bytes


class EventStream:
    """Made by `open_rabbitmq`."""

    def __init__(self, link: RabbitLink, publishers: Publishers, readers: asyncio.Semaphore) -> None:
        self._link = link
        self._publishers = publishers
        self._readers = readers
        self._name = full_name(STREAM, link.settings)

    async def append(self, bodies: Sequence[bytes]) -> None:
        """
        Add events at the end, in their order; on return all are kept safely.

        Where a node fails meanwhile, some are there twice: all from the first that was not confirmed are added again,
        so that a reader who passes over what it knows sees their order.

        Raises `QueueUnavailable` where nobody can tell about some: add them again.
        """
        deadline = self._link.deadline()
        left = [Parcel(self._name, body) for body in bodies]
        while left:
            publisher = await self._publishers.ready({STREAM}, deadline)
            outcomes = await publisher.publish(left)
            kept = next((at for at, outcome in enumerate(outcomes) if outcome is not Outcome.KEPT), len(left))
            left = left[kept:]
            if Outcome.UNROUTABLE in outcomes:
                self._link.forget(STREAM)
            if left:
                await self._publishers.pause(deadline, f"{len(left)} events were not confirmed")

    def read(self, since: int | None = 0) -> AbstractAsyncContextManager[StreamReader]:
        """
        Read all from an offset on, then what is added.

        Args:
            since: offset of the first entry wanted, or of where it was, if it is forgotten; None = what is added later.
        """
        return self._read(since)

    @asynccontextmanager
    async def _read(self, since: int | None) -> AsyncIterator[StreamReader]:
        async with self._readers:
            reader = StreamReader(self._link, since)
            try:
                await reader.open()
                yield reader
            finally:
                await reader.close()


class StreamReader(Reader):
    """One reader of the stream; goes on where it was when a node fails, and passes no entry twice."""

    def __init__(self, link: RabbitLink, since: int | None) -> None:
        super().__init__(link, STREAM, prefetch=PREFETCH)
        self._next = since
        self._done: list[Tag] = []
        """Taken, and not acknowledged yet: a cancellation while that is said would lose what was taken."""

    def arguments(self) -> dict[str, Any]:
        self._done.clear()
        return {OFFSET_HEADER: "next" if self._next is None else self._next}

    async def take(self, at_most: int) -> Sequence[Entry]:
        """Wait for at least one. A cancellation loses none. Raises `QueueUnavailable`."""
        while True:
            done, self._done = self._done, []
            self.settle(done, acknowledged)
            messages = await self.raw(at_most)
            self._done = [self.tag_of(message) for message in messages]
            entries = [entry for entry in map(_entry, messages) if self._next is None or entry.offset >= self._next]
            if entries:
                self._next = entries[-1].offset + 1
                return entries


def _entry(message: Arrival) -> Entry:
    offset = message.headers.get(OFFSET_HEADER)
    return Entry(offset if isinstance(offset, int) else 0, message.body)
