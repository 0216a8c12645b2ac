"""What every queue does, run over the one in memory, PostgreSQL's table and a real RabbitMQ."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from tests.postgres_databases import fresh_database
from tests.rabbit_servers import Rabbits, eventually, plain_channel
from tests.shards import two_shards

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import open_database
from sutazai.adapters.postgres.dispatch_rows import put
from sutazai.adapters.postgres.queue import PostgresQueue
from sutazai.adapters.postgres.sharded.queue import ShardedQueue
from sutazai.adapters.rabbitmq.queue import open_rabbitmq
from sutazai.adapters.rabbitmq.topology import full_name
from sutazai.core.request import Priority
from sutazai.ports.queue import Consumer, Delivery, Message, Queue
from sutazai.settings.secret import Secret
from sutazai.testing.queue import MemoryQueue

TASKS = "task_processing"
MAX_LENGTH = 20
DELIVERY_LIMIT = 2
SOON_S = 0.3
"""What does not happen within this time is taken not to happen."""


@dataclass(slots=True)
class Place:
    """A queue that holds `MAX_LENGTH` messages, or somewhat more before it notices, and delivers a message thrice."""

    queue: Queue
    put_unreadable: Callable[[], Awaitable[None]]
    """Put bytes that are no message into `TASKS`."""


@asynccontextmanager
async def in_memory(_: pytest.FixtureRequest) -> AsyncIterator[Place]:
    queue = MemoryQueue(max_length=MAX_LENGTH, delivery_limit=DELIVERY_LIMIT)
    yield Place(queue, lambda: queue.put_unreadable(TASKS))


@asynccontextmanager
async def in_rabbitmq(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    node: Rabbits = request.getfixturevalue("rabbit_node")
    settings = node.settings(prefix=uuid.uuid4().hex[:12], max_length=MAX_LENGTH, delivery_limit=DELIVERY_LIMIT)

    async def put_unreadable() -> None:
        async with plain_channel(settings) as channel:
            await channel.basic_publish(b"\xff{no JSON", routing_key=full_name(TASKS, settings), mandatory=True)

    async with open_rabbitmq(settings) as queue:
        await queue.depth(TASKS)  # declares it
        yield Place(queue, put_unreadable)


@asynccontextmanager
async def in_postgresql(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    async with (
        fresh_database(request.getfixturevalue("data_dir")) as url,
        open_database(Secret(url), timeout_s=5.0) as database,
    ):
        await migrate.migrate(database, migrate.read())
        queue = PostgresQueue(database, max_length=MAX_LENGTH)

        async def put_unreadable() -> None:
            nothing = Message(task="", queue=TASKS, tenant="", agent="")
            async with database.transaction() as connection:
                now = datetime.now(UTC)
                await put(connection, database.sql, [(nothing, now)], now=now)

        tending = asyncio.create_task(queue.run(), name="tend the queue")
        try:
            yield Place(queue, put_unreadable)
        finally:
            tending.cancel()
            await asyncio.wait([tending])


@asynccontextmanager
async def in_two_shards(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    async with two_shards(request.getfixturevalue("two_databases")) as shards:
        queue = ShardedQueue(shards, max_length=MAX_LENGTH)

        async def put_unreadable() -> None:
            nothing = Message(task="", queue=TASKS, tenant="", agent="")
            database = shards.databases["odd"]
            async with database.transaction() as connection:
                now = datetime.now(UTC)
                await put(connection, database.sql, [(nothing, now)], now=now)

        tending = asyncio.create_task(queue.run(), name="tend the queue")
        try:
            yield Place(queue, put_unreadable)
        finally:
            tending.cancel()
            await asyncio.wait([tending])


Factory = Callable[[pytest.FixtureRequest], AbstractAsyncContextManager[Place]]
FACTORIES: Mapping[str, Factory] = {
    "memory": in_memory,
    "rabbitmq": in_rabbitmq,
    "postgresql": in_postgresql,
    "two shards": in_two_shards,
}


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FACTORIES],
)
def kind(request: pytest.FixtureRequest) -> str:
    """Which queue; its server is started here, outside any event loop."""
    name = str(request.param)
    if name == "postgresql":
        request.getfixturevalue("data_dir")
    if name == "two shards":
        request.getfixturevalue("two_databases")
    return name


@pytest.fixture
async def place(request: pytest.FixtureRequest, kind: str) -> AsyncIterator[Place]:
    """An empty queue."""
    async with FACTORIES[kind](request) as made:
        yield made


@pytest.fixture
def queue(place: Place) -> Queue:
    """The queue alone."""
    return place.queue


def word_of(number: int, *, queue: str = TASKS) -> Message:
    return Message(task=f"task_{number:032x}", queue=queue, tenant="acme", agent="chat", priority=Priority.LOW)


def words(count: int, *, since: int = 0) -> list[Message]:
    return [word_of(number) for number in range(since, since + count)]


async def all_of(consumer: Consumer, count: int) -> list[Delivery]:
    taken: list[Delivery] = []
    while len(taken) < count:
        taken += await consumer.take(count - len(taken))
    return taken


def tasks_of(deliveries: Sequence[Delivery]) -> list[str]:
    return [each.message.task for each in deliveries]


async def takes_nothing(consumer: Consumer) -> bool:
    try:
        async with asyncio.timeout(SOON_S):
            await consumer.take(1)
    except TimeoutError:
        return True
    return False


async def test_what_was_put_is_taken_whole_and_in_order(queue: Queue) -> None:
    assert await queue.put(words(10)) == []

    async with queue.consume(TASKS, prefetch=10) as consumer:
        taken = await all_of(consumer, 10)

    assert [each.message for each in taken] == words(10)
    assert not any(each.is_redelivered for each in taken)
    assert {each.count for each in taken} == {0}


async def test_a_queue_hands_out_no_message_of_another(queue: Queue) -> None:
    await queue.put([word_of(1), word_of(2, queue="llm_inference"), word_of(3)])

    async with queue.consume("llm_inference", prefetch=5) as consumer:
        taken = await consumer.take(5)

    assert [each.message for each in taken] == [word_of(2, queue="llm_inference")]
    assert await eventually(lambda: is_depth(queue, 2)) >= 0


async def test_nothing_is_put_where_nothing_is_given(queue: Queue) -> None:
    assert await queue.put([]) == []
    assert await queue.depth(TASKS) == 0


async def test_what_was_acknowledged_never_comes_back(queue: Queue) -> None:
    await queue.put(words(6))

    async with queue.consume(TASKS, prefetch=6) as consumer:
        taken = await all_of(consumer, 6)
        await consumer.ack([taken[4], taken[0], taken[1], taken[2]])
    async with queue.consume(TASKS, prefetch=6) as consumer:
        again = await all_of(consumer, 2)
        assert await takes_nothing(consumer)

    assert sorted(tasks_of(again)) == sorted([taken[3].message.task, taken[5].message.task])


async def test_what_was_handed_back_is_delivered_again_and_says_so(queue: Queue) -> None:
    await queue.put(words(2))

    async with queue.consume(TASKS, prefetch=1) as consumer:
        (first,) = await consumer.take(1)
        await consumer.hand_back([first])
        seen = [await consumer.take(1)]
        await consumer.ack(seen[0])
        seen.append(await consumer.take(1))
        await consumer.ack(seen[1])

    again = next(each for (each,) in seen if each.message == first.message)
    other = next(each for (each,) in seen if each.message != first.message)
    assert (again.is_redelivered, again.count) == (True, 1)
    assert not other.is_redelivered


@pytest.mark.parametrize(
    "kind",
    [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("memory", "rabbitmq")],
    indirect=True,
)  # in the table nobody counts but the store of tasks, whose own limit ends them
async def test_what_is_delivered_too_often_becomes_a_dead_letter_that_can_be_handed_back(queue: Queue) -> None:
    await queue.put(words(1))

    async with queue.consume(TASKS, prefetch=1) as consumer:
        for _ in range(DELIVERY_LIMIT + 1):
            await consumer.hand_back(await consumer.take(1))
        assert await takes_nothing(consumer)
    async with queue.consume("dead_letters", prefetch=1) as consumer:
        await consumer.hand_back(await consumer.take(1))
        (letter,) = await consumer.take(1)

    assert letter.message == word_of(0)


async def test_leaving_the_consumer_hands_back_what_it_held(queue: Queue) -> None:
    await queue.put(words(5))

    async with queue.consume(TASKS, prefetch=4) as consumer:
        held = await all_of(consumer, 3)
    async with queue.consume(TASKS, prefetch=5) as consumer:
        again = await all_of(consumer, 5)

    assert sorted(tasks_of(again)) == sorted(word.task for word in words(5))
    assert all(each.is_redelivered for each in again if each.message in [one.message for one in held])


async def test_an_error_in_the_consumer_hands_back_too(queue: Queue) -> None:
    await queue.put(words(1))

    async def fail() -> None:
        async with queue.consume(TASKS, prefetch=1) as consumer:
            await consumer.take(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()

    async with queue.consume(TASKS, prefetch=1) as consumer:
        (again,) = await consumer.take(1)
    assert again.is_redelivered


async def test_no_more_is_held_than_the_prefetch(queue: Queue) -> None:
    await queue.put(words(6))

    async with queue.consume(TASKS, prefetch=2) as consumer:
        held = await all_of(consumer, 2)
        assert await takes_nothing(consumer)
        await consumer.ack(held[:1])
        assert len(await consumer.take(6)) == 1
        assert await takes_nothing(consumer)


async def test_a_consumer_that_is_to_hold_less_gives_what_it_did_not_take_to_others(queue: Queue) -> None:
    await queue.put(words(6))

    async with queue.consume(TASKS, prefetch=5) as consumer, queue.consume(TASKS, prefetch=6) as other:
        held = await consumer.take(2)
        await consumer.hold(0)
        taken = await all_of(other, 6 - len(held))
        assert await takes_nothing(consumer)
        await consumer.ack(held)

    assert sorted(tasks_of([*held, *taken])) == sorted(word.task for word in words(6))


async def test_a_consumer_that_is_to_hold_less_takes_nothing_before_it_does(queue: Queue) -> None:
    await queue.put(words(6))

    async with queue.consume(TASKS, prefetch=3) as consumer:
        held = await all_of(consumer, 3)
        await consumer.hold(2)
        await consumer.ack(held[:1])
        await consumer.hold(2)
        assert await takes_nothing(consumer)
        await consumer.ack(held[1:])
        await consumer.hold(2)
        assert len(await all_of(consumer, 2)) == 2
        assert await takes_nothing(consumer)


async def test_a_consumer_that_may_hold_more_takes_more(queue: Queue) -> None:
    await queue.put(words(6))

    async with queue.consume(TASKS, prefetch=1) as consumer:
        held = await all_of(consumer, 1)
        await consumer.hold(4)
        held += await all_of(consumer, 3)
        assert await takes_nothing(consumer)
        await consumer.ack(held)
        await consumer.hold(4)
        held += await all_of(consumer, 2)

    assert sorted(tasks_of(held)) == sorted(word.task for word in words(6))


async def test_no_more_is_taken_than_was_asked_for(queue: Queue) -> None:
    await queue.put(words(4))

    async with queue.consume(TASKS, prefetch=4) as consumer:
        assert len(await consumer.take(1)) == 1
        assert len(await all_of(consumer, 3)) == 3


async def test_one_who_waits_is_woken_by_what_is_put(queue: Queue) -> None:
    async with queue.consume(TASKS, prefetch=1) as consumer:
        waiting = asyncio.create_task(taken_by(consumer))
        assert not waiting.done()
        await queue.put(words(1))

        async with asyncio.timeout(5.0):
            assert tasks_of(await waiting) == [word_of(0).task]


async def test_a_take_that_is_cancelled_loses_nothing(queue: Queue) -> None:
    async with queue.consume(TASKS, prefetch=5) as consumer:
        taken: list[Delivery] = []
        for number in range(8):
            waiting = asyncio.create_task(taken_by(consumer))
            await asyncio.sleep(0)
            await queue.put([word_of(number)])
            waiting.cancel()
            await asyncio.wait({waiting})
            if not waiting.cancelled():
                taken += waiting.result()
            while len(taken) <= number:
                taken += await consumer.take(5)
            await consumer.ack(taken[number:])

    assert sorted(tasks_of(taken)) == [word.task for word in words(8)]


async def test_a_full_queue_returns_what_it_did_not_keep(queue: Queue) -> None:
    kept: list[Message] = []
    refused: list[Message] = []
    for start in range(0, 6 * MAX_LENGTH, MAX_LENGTH):
        batch = words(MAX_LENGTH, since=start)
        returned = await queue.put(batch)
        refused += returned
        kept += [word for word in batch if word not in returned]

    assert refused
    assert refused == sorted(refused, key=lambda word: word.task)
    assert len(kept) >= MAX_LENGTH
    assert await eventually(lambda: is_depth(queue, len(kept))) >= 0
    async with queue.consume(TASKS, prefetch=200) as consumer:
        assert sorted(tasks_of(await all_of(consumer, len(kept)))) == sorted(word.task for word in kept)
        assert await takes_nothing(consumer)


async def test_a_queue_that_was_full_takes_more_when_it_was_emptied(queue: Queue) -> None:
    while not await queue.put(words(MAX_LENGTH)):
        pass
    left = await queue.depth(TASKS)

    async with queue.consume(TASKS, prefetch=200) as consumer:
        await consumer.ack(await all_of(consumer, left))

        async def is_taken() -> bool:
            return not await queue.put([word_of(999)])

        await eventually(is_taken)
        assert word_of(999).task in tasks_of(await consumer.take(1))


async def test_two_consumers_share_a_queue(queue: Queue) -> None:
    async with queue.consume(TASKS, prefetch=1) as first, queue.consume(TASKS, prefetch=1) as second:
        await queue.put(words(2))
        one, other = await asyncio.gather(first.take(5), second.take(5))

    assert sorted(tasks_of([*one, *other])) == [word.task for word in words(2)]


async def test_what_one_consumer_held_cannot_be_acknowledged_by_the_next(queue: Queue) -> None:
    await queue.put(words(1))
    async with queue.consume(TASKS, prefetch=1) as gone:
        held = await gone.take(1)

    async with queue.consume(TASKS, prefetch=1) as consumer:
        await consumer.take(1)
        await consumer.ack(held)
        await consumer.hand_back(held)
        assert await takes_nothing(consumer)
    async with queue.consume(TASKS, prefetch=1) as consumer:
        assert tasks_of(await consumer.take(1)) == [word_of(0).task]


async def test_an_acknowledgement_that_is_said_twice_does_no_harm(queue: Queue) -> None:
    await queue.put(words(2))

    async with queue.consume(TASKS, prefetch=1) as consumer:
        first = await consumer.take(1)
        await consumer.ack(first)
        await consumer.ack(first)
        await consumer.hand_back(first)
        second = await consumer.take(1)
        await consumer.ack(second)
        assert await takes_nothing(consumer)

    assert tasks_of([*first, *second]) == [word.task for word in words(2)]


async def test_an_unreadable_message_is_delivered_without_a_task(place: Place) -> None:
    await place.put_unreadable()

    async with place.queue.consume(TASKS, prefetch=1) as consumer:
        (delivery,) = await consumer.take(1)
        await consumer.ack([delivery])

    assert (delivery.message.task, delivery.message.queue) == ("", TASKS)


async def test_the_depth_is_what_waits(queue: Queue) -> None:
    await queue.put(words(3))
    assert await eventually(lambda: is_depth(queue, 3)) >= 0

    async with queue.consume(TASKS, prefetch=1) as consumer:
        await consumer.ack(await consumer.take(1))
        await consumer.take(1)
        assert await eventually(lambda: is_depth(queue, 1)) >= 0


async def is_depth(queue: Queue, expected: int) -> bool:
    return await queue.depth(TASKS) == expected


async def taken_by(consumer: Consumer) -> Sequence[Delivery]:
    return await consumer.take(5)
