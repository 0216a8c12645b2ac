"""The `Queue` port on RabbitMQ: what `put` took is kept while a majority of the nodes stands, whatever else falls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import msgspec
from aiormq.exceptions import ChannelNotFoundEntity

from sutazai.adapters.rabbitmq.address import parse
from sutazai.adapters.rabbitmq.consuming import RabbitConsumer
from sutazai.adapters.rabbitmq.link import TROUBLES, Figures, RabbitLink, explained, quiet_the_driver
from sutazai.adapters.rabbitmq.publishing import Outcome, Parcel, Publisher, Publishers
from sutazai.adapters.rabbitmq.streams import EventStream
from sutazai.adapters.rabbitmq.topology import declaration_of, full_name
from sutazai.core.errors import SettingsError
from sutazai.core.request import Priority
from sutazai.ports.queue import Consumer, Message, QueueState
from sutazai.settings import model

FULL_RATIO = 0.8
"""A quorum queue that refused once goes on to refuse until it is no longer than this part of its length."""
PRIORITIES = {Priority.HIGH: 8, Priority.NORMAL: 4, Priority.LOW: 0}
"""RabbitMQ 4 lets what is above 4 go first; RabbitMQ 3 has no priorities in quorum queues."""


class RabbitQueue:
    """Made by `open_rabbitmq`."""

    def __init__(self, link: RabbitLink) -> None:
        self._link = link
        self._publishers = Publishers(link)
        self._readers = asyncio.Semaphore(link.settings.consumers)
        self.events = EventStream(link, self._publishers, self._readers)
        """The stream `agent_coordination`."""

    @property
    def figures(self) -> Figures:
        """What was seen so far."""
        return self._link.figures

    @property
    def wires(self) -> int:
        """Connections that are open now."""
        return self._link.wires

    async def put(self, messages: Sequence[Message]) -> Sequence[Message]:
        deadline = self._link.deadline()
        left, refused = list(messages), list[Message]()
        while left:
            publisher = await self._publishers.ready({message.queue for message in left}, deadline)
            outcomes = await publisher.publish([self._parcel(message) for message in left])
            full = await self._full(publisher, _queues_of(left, outcomes, Outcome.REFUSED))
            for queue in _queues_of(left, outcomes, Outcome.UNROUTABLE):
                self._link.forget(queue)
            again = list[Message]()
            for message, outcome in zip(left, outcomes, strict=True):
                if outcome is Outcome.REFUSED and message.queue in full:
                    refused.append(message)
                elif outcome is not Outcome.KEPT:
                    again.append(message)
            left = again
            if left:
                await self._publishers.pause(deadline, f"{len(left)} messages were not confirmed")
        return refused

    def consume(self, queue: str, *, prefetch: int) -> AbstractAsyncContextManager[Consumer]:
        return self._consume(queue, prefetch)

    async def depth(self, queue: str) -> int:
        deadline = self._link.deadline()
        while True:
            publisher = await self._publishers.ready({queue}, deadline)
            try:
                return await self._link.waiting(publisher.wire, queue)
            except TROUBLES as error:
                await self._publishers.step_aside(publisher, queue, error, deadline)

    async def states(self, names: Collection[str]) -> Sequence[QueueState]:
        """Those of these queues that are there, by name. Nothing is declared. Raises `QueueUnavailable`."""
        publisher = await self._publishers.one(self._link.deadline())
        found = []
        for name in sorted(names):
            try:
                waiting, consumers = await self._link.counts(publisher.wire, name)
            except ChannelNotFoundEntity:
                continue
            except TROUBLES as error:
                raise self._link.unavailable(f"{name} could not be looked at ({explained(error)})") from None
            kind = str(declaration_of(name, self._link.settings).arguments["x-queue-type"])
            found.append(QueueState(name=name, kind=kind, waiting=waiting, consumers=consumers))
        return found

    async def close(self) -> None:
        """Say goodbye to all nodes."""
        await self._publishers.close()

    @asynccontextmanager
    async def _consume(self, queue: str, prefetch: int) -> AsyncIterator[Consumer]:
        async with self._readers:
            consumer = RabbitConsumer(self._link, queue, prefetch=prefetch)
            try:
                await consumer.open()
                yield consumer
            finally:
                await consumer.close()

    async def _full(self, publisher: Publisher, queues: Collection[str]) -> Collection[str]:
        """Those that refuse because they are full, and not because they elect a leader."""
        full = set()
        for queue in queues:
            try:
                depth = await self._link.waiting(publisher.wire, queue)
            except TROUBLES:
                continue
            if depth >= FULL_RATIO * self._link.settings.max_length:
                full.add(queue)
        if full:
            publisher.forgive()
        return full

    def _parcel(self, message: Message) -> Parcel:
        return Parcel(
            full_name(message.queue, self._link.settings),
            msgspec.json.encode(message),
            PRIORITIES[message.priority],
        )


def _queues_of(messages: Sequence[Message], outcomes: Sequence[Outcome], which: Outcome) -> Collection[str]:
    return {message.queue for message, outcome in zip(messages, outcomes, strict=True) if outcome is which}


@asynccontextmanager
async def open_rabbitmq(settings: model.Rabbitmq) -> AsyncIterator[RabbitQueue]:
    """
    The queues of a cluster; no node is asked before the first call.

    Raises `SettingsError` where `url` is missing or was not understood.
    """
    if settings.url is None:
        raise SettingsError(["`rabbitmq.url` is missing; give amqp://user:password@host:5672."])
    quiet_the_driver()
    queue = RabbitQueue(RabbitLink(parse(settings.url, heartbeat_s=settings.heartbeat_s), settings))
    try:
        yield queue
    finally:
        await queue.close()
