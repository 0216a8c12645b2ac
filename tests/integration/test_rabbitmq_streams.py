"""The stream of events on one RabbitMQ node: order, reading again, and going on after a failure."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import msgspec
import pytest
from tests.rabbit_servers import PASSWORD, QUOTED, USER, Rabbits
from tests.redis_servers import wall_before

from sutazai.adapters.rabbitmq.queue import RabbitQueue, open_rabbitmq
from sutazai.adapters.rabbitmq.streams import Entry, EventStream, StreamReader
from sutazai.core.errors import QueueUnavailable
from sutazai.settings.model import Rabbitmq
from sutazai.settings.secret import Secret

pytestmark = pytest.mark.xdist_group("rabbitmq")


@pytest.fixture
def settings(rabbit_node: Rabbits) -> Rabbitmq:
    """A stream of this test's own."""
    rabbit_node.restore()
    return rabbit_node.settings(prefix=uuid.uuid4().hex[:12])


@pytest.fixture
async def queue(settings: Rabbitmq) -> AsyncIterator[RabbitQueue]:
    """The same, opened."""
    async with open_rabbitmq(settings) as opened:
        yield opened


@pytest.fixture
def events(queue: RabbitQueue) -> EventStream:
    """An empty stream."""
    return queue.events


def bodies(count: int, *, since: int = 0) -> list[bytes]:
    return [b"event %d" % number for number in range(since, since + count)]


async def all_of(reader: StreamReader, count: int, *, at_most: int = 1000) -> list[Entry]:
    read: list[Entry] = []
    while len(read) < count:
        read += await reader.take(at_most)
    return read


async def test_events_are_read_in_the_order_they_were_added(events: EventStream) -> None:
    await events.append(bodies(1000))
    await events.append(bodies(10, since=1000))

    async with events.read() as reader:
        read = await all_of(reader, 1010, at_most=7)

    assert [entry.body for entry in read] == bodies(1010)
    assert [entry.offset for entry in read] == sorted({entry.offset for entry in read})


async def test_a_stream_can_be_read_again_from_any_offset(events: EventStream) -> None:
    await events.append(bodies(300))
    async with events.read() as reader:
        read = await all_of(reader, 300)

    async with events.read(read[123].offset) as reader:
        again = await all_of(reader, 177)

    assert again == read[123:]


async def test_a_reader_waits_for_what_is_added_later(events: EventStream) -> None:
    await events.append(bodies(5))

    async with events.read(None) as reader:
        waiting = asyncio.create_task(all_of(reader, 2))
        await events.append(bodies(2, since=5))
        assert [entry.body for entry in await waiting] == bodies(2, since=5)


async def test_a_take_that_is_cancelled_loses_no_event(events: EventStream) -> None:
    async with events.read() as reader:
        read: list[Entry] = []
        for number in range(8):
            waiting = asyncio.create_task(all_of(reader, 1))
            await asyncio.sleep(0)
            await events.append(bodies(1, since=number))
            waiting.cancel()
            await asyncio.wait({waiting})
            if not waiting.cancelled():
                read += waiting.result()
        while len(read) < 8:
            read += await reader.take(10)

    assert [entry.body for entry in read] == bodies(8)


async def test_a_reader_goes_on_where_it_was_when_the_network_falls_silent(
    rabbit_node: Rabbits, settings: Rabbitmq, events: EventStream
) -> None:
    (node,) = rabbit_node.nodes
    async with wall_before(node) as one, wall_before(node) as other:
        two_ways = msgspec.structs.replace(
            settings,
            url=Secret(f"amqp://{USER}:{QUOTED}@127.0.0.1:{one.port},127.0.0.1:{other.port}"),
            heartbeat_s=1,
            connect_timeout_s=0.5,
            confirm_timeout_s=0.5,
        )
        await events.append(bodies(10))
        async with open_rabbitmq(two_ways) as queue, queue.events.read() as reader:
            read = await all_of(reader, 10)
            for number, wall in enumerate((one, other), 1):  # each of them may be the one in use
                waiting = asyncio.create_task(all_of(reader, 10))
                wall.cut()
                await events.append(bodies(10, since=10 * number))
                read += await waiting
                wall.heal()

    assert [entry.body for entry in read] == bodies(30)


async def test_a_stream_that_is_not_there_is_told(settings: Rabbitmq) -> None:
    nobody = msgspec.structs.replace(settings, url=Secret(f"amqp://{USER}:{QUOTED}@127.0.0.1:1"), timeout_s=0.3)
    async with open_rabbitmq(nobody) as queue:
        with pytest.raises(QueueUnavailable) as caught:
            await queue.events.append(bodies(1))

    assert PASSWORD not in str(caught.value)
