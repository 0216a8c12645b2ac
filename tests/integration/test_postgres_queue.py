"""The queue in a table: turns, later messages, and consumers that die, hang or only look as if they did."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from tests.lossy_database import LossyDatabase
from tests.postgres_servers import embedded

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import Database, open_database
from sutazai.adapters.postgres.dispatch_rows import put
from sutazai.adapters.postgres.queue import BEAT_S, LEASE_S, PROMOTE_AFTER_S, PostgresQueue
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.core.errors import Overloaded, QueueUnavailable
from sutazai.core.request import Priority
from sutazai.core.task import Failed, FailureReason, Task, TaskDraft, task_id
from sutazai.policy.tasks import FULL_HOLDS_S
from sutazai.ports.queue import Delivery, Message
from sutazai.ports.tasks import Change, Start
from sutazai.settings.secret import Secret

START = datetime(2026, 11, 1, 12, tzinfo=UTC)
WAIT_S = 10.0
BEATS = int(LEASE_S / BEAT_S) + 1


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with embedded() as (url, _):
        yield url


@pytest.fixture
async def database(server: str) -> AsyncIterator[Database]:
    """An empty one."""
    connection: Any = await asyncpg.connect(server)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.close()
    async with open_database(Secret(server), timeout_s=10) as opened:
        await migrate.migrate(opened, migrate.read())
        yield opened


class Clock:
    """Monotonic and wall time of one process; both stand still until told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def wall(self) -> datetime:
        return START + timedelta(seconds=self.now_s - 100)


Opened = tuple[PostgresQueue, Clock]


@pytest.fixture
def process(database: Database) -> Callable[[], Opened]:
    """A function that gives the queue as a process of its own sees it, and its clock."""

    def opened() -> Opened:
        clock = Clock()
        return PostgresQueue(database, max_length=500, clock=clock, wall=clock.wall), clock

    return opened


async def tended(process: Opened, beats: int = BEATS) -> None:
    """So many beats of a process."""
    queue, clock = process
    for _ in range(beats):
        clock.now_s += BEAT_S
        await queue.tend()


def words(count: int, tenant: str = "acme", *, first: int = 0, **fields: Any) -> list[Message]:
    ids = [task_id(1.0, number) for number in range(first, first + count)]
    usual: dict[str, Any] = {"queue": "q", "tenant": tenant, "agent": "echo"}
    return [Message(**usual | {"task": one} | fields) for one in ids]


def tenants(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.message.tenant for delivery in deliveries]


@asynccontextmanager
async def running(queue: PostgresQueue) -> AsyncIterator[None]:
    task = asyncio.create_task(queue.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


# Turns


async def test_a_tenant_with_few_messages_does_not_wait_for_one_with_many(process: Callable[[], Opened]) -> None:
    queue, _ = process()
    await queue.put(words(200, "big"))
    await queue.put(words(5, "small"))

    async with queue.consume("q", prefetch=50) as consumer:
        first = tenants(await consumer.take(12))

    assert first.count("small") >= 4


async def test_tenants_get_turns_by_their_weights(database: Database, process: Callable[[], Opened]) -> None:
    queue, _ = process()
    async with database.transaction() as connection:
        await connection.execute(
            "INSERT INTO tenants (name, weight, priority, limits)"
            " VALUES ('heavy', 3, 'normal', '{}'), ('light', 1, 'normal', '{}')"
        )
    await queue.put(words(100, "light"))
    await queue.put(words(100, "heavy"))

    async with queue.consume("q", prefetch=50) as consumer:
        first = tenants(await consumer.take(40))

    assert 28 <= first.count("heavy") <= 32


async def test_a_tenant_that_was_idle_does_not_make_up_for_it(process: Callable[[], Opened]) -> None:
    queue, _ = process()
    await queue.put(words(1, "idle"))
    async with queue.consume("q", prefetch=200) as consumer:
        await consumer.ack(await consumer.take(1))
        await queue.put(words(100, "busy"))
        for _ in range(5):
            await consumer.ack(await consumer.take(10))
        await queue.put(words(100, "idle"))
        first = tenants(await consumer.take(40))

    assert 18 <= first.count("idle") <= 22


async def test_messages_of_a_tenant_keep_their_order(process: Callable[[], Opened]) -> None:
    queue, _ = process()
    sent = words(20)
    await queue.put(sent[:10])
    await queue.put(sent[10:])

    async with queue.consume("q", prefetch=50) as consumer:
        assert [delivery.message for delivery in await consumer.take(50)] == sent


async def test_a_higher_priority_goes_first_whoever_sent_it(process: Callable[[], Opened]) -> None:
    queue, _ = process()
    await queue.put(words(3, "one", priority=Priority.LOW))
    await queue.put(words(3, "two"))
    await queue.put(words(3, "three", priority=Priority.HIGH))

    async with queue.consume("q", prefetch=50) as consumer:
        assert tenants(await consumer.take(9)) == ["three"] * 3 + ["two"] * 3 + ["one"] * 3


async def test_a_low_priority_that_waited_long_gets_its_share_though_higher_ones_keep_coming(
    process: Callable[[], Opened],
) -> None:
    (queue, clock) = opened = process()
    lowest = words(30, "low", priority=Priority.LOW)
    await queue.put(lowest)
    clock.now_s += 1.0
    await queue.put(words(30, "normal"))
    await queue.put(words(400, "high", first=100, priority=Priority.HIGH))
    async with queue.consume("q", prefetch=50) as consumer:
        await tended(opened, 1)
        before = await consumer.take(50)
        await consumer.ack(before)

        clock.now_s += PROMOTE_AFTER_S - 1.0
        await tended(opened, 1)
        first = await consumer.take(50)
        await consumer.ack(first)
        clock.now_s += 1.0
        await tended(opened, 1)
        later: list[Delivery] = []
        while len(later) < 100:
            taken = await consumer.take(1)
            later += taken
            await consumer.ack(taken)

    assert set(tenants(before)) == {"high"}
    assert tenants(first).count("low") == 5  # and not the normal ones, which have not waited for so long
    assert tenants(first).count("high") == 45
    assert tenants(later).count("high") == 90
    assert [delivery.message for delivery in (*first, *later) if delivery.message.tenant == "low"] == lowest[:15]


async def test_many_consumers_give_lower_priorities_no_more_than_their_share(process: Callable[[], Opened]) -> None:
    """Each counts for itself; those that look at the same moment see the same message, and one of them gets it."""
    (queue, clock) = opened = process()
    await queue.put(words(100, "low", priority=Priority.LOW))
    await queue.put(words(300, "high", first=100, priority=Priority.HIGH))
    clock.now_s += PROMOTE_AFTER_S
    async with (
        queue.consume("q", prefetch=20) as one,
        queue.consume("q", prefetch=20) as two,
        queue.consume("q", prefetch=20) as three,
    ):
        consumers = (one, two, three)
        await tended(opened, 1)
        taken: list[Delivery] = []
        for _ in range(20):
            for consumer, some in zip(
                consumers, await asyncio.gather(*(one.take(4) for one in consumers)), strict=True
            ):
                taken += some
                await consumer.ack(some)

    assert len(taken) == 240
    assert 8 <= tenants(taken).count("low") <= 24


async def test_a_full_queue_gives_back_what_it_does_not_take(process: Callable[[], Opened]) -> None:
    queue, _ = process()
    sent = words(510)

    assert await queue.put(sent) == sent[500:]
    assert await queue.depth("q") == 500
    assert await queue.put(words(1, first=600, queue="other")) == []


# Later messages


async def test_a_message_for_later_is_delivered_when_it_is_due(
    database: Database, process: Callable[[], Opened]
) -> None:
    (queue, clock) = opened = process()
    later, sooner = words(2)
    async with database.transaction() as connection:
        due = [(later, START + timedelta(seconds=20)), (sooner, START + timedelta(seconds=10))]
        await put(connection, database.sql, due, now=START)

    await tended(opened, 2)
    assert await queue.depth("q") == 0
    async with queue.consume("q", prefetch=5) as consumer:
        clock.now_s = 110.0
        await queue.tend()
        (first,) = await consumer.take(5)
        clock.now_s = 120.0
        await queue.tend()
        (second,) = await consumer.take(5)

    assert [first.message, second.message] == [sooner, later]
    assert not first.is_redelivered


async def test_messages_that_are_due_at_the_same_time_keep_their_order(
    database: Database, process: Callable[[], Opened]
) -> None:
    (queue, clock) = process()
    due_at = START + timedelta(seconds=10)
    sent = words(200)
    async with database.transaction() as connection:
        await put(connection, database.sql, [(message, due_at) for message in sent], now=START)
        # Rows that were written again lie elsewhere in the table.
        await connection.execute("UPDATE dispatch SET deliveries = 0 WHERE id % 3 = 0")

    clock.now_s = 110.0
    await queue.tend()
    async with queue.consume("q", prefetch=200) as consumer:
        assert [delivery.message for delivery in await consumer.take(200)] == sent


# Tasks


async def test_tasks_of_a_tenant_wait_in_the_order_in_which_they_were_submitted(database: Database) -> None:
    """And at once: one that is not due yet when it is written waits for the next beat, behind those that follow it."""
    store, queue = PostgresTaskStore(database, max_length=500), PostgresQueue(database)
    draft = TaskDraft(tenant="acme", agent="echo", queue="q")
    made = [task for _ in range(40) for task in await store.submit([draft])]
    made += await store.submit([draft] * 20)
    made.append(await failed_and_requeued(store, made[0]))

    async with queue.consume("q", prefetch=100) as consumer:
        taken = [delivery.message.task for delivery in await consumer.take(100)]

    assert taken == [task.id for task in made]


async def failed_and_requeued(store: PostgresTaskStore, task: Task) -> Task:
    """The task, pending once more."""
    await store.begin([Start(task=task.id, may_take_over=False)], worker="w", delivery_limit=3)
    await store.change([Change(task=task.id, event=Failed(1, FailureReason.ERROR, "It broke."))])
    again = await store.requeue(None, task.id)
    assert again is not None
    return again


# Consumers


async def test_what_a_dead_consumer_held_goes_to_another(process: Callable[[], Opened]) -> None:
    (dead, _), alive = process(), process()
    async with dead.consume("q", prefetch=5) as gone, alive[0].consume("q", prefetch=5) as consumer:
        await dead.put(words(2))
        held = await gone.take(5)
        assert len(held) == 2

        await tended(alive)

        freed = await consumer.take(5)
        assert [delivery.message for delivery in freed] == [delivery.message for delivery in held]
        assert all(delivery.is_redelivered and delivery.count == 1 for delivery in freed)
        await gone.ack(held)  # it is not gone after all; these are another's now
        await consumer.ack(freed)
        assert await alive[0].depth("q") == 0


async def test_one_that_was_taken_for_gone_goes_on_as_a_new_one(process: Callable[[], Opened]) -> None:
    late, alive = process(), process()
    async with late[0].consume("q", prefetch=1) as consumer:
        await late[0].put(words(1))
        held = await consumer.take(1)
        await tended(alive)

        await late[0].tend()
        (again,) = await consumer.take(1)  # a place of its prefetch is free, for it holds nothing any more
        assert again.message == held[0].message
        await consumer.ack(held)
        await consumer.ack([again])
        await tended(alive)
        assert await alive[0].depth("q") == 0


async def test_consumers_that_beat_keep_what_they_hold(process: Callable[[], Opened]) -> None:
    one, other = process(), process()
    async with one[0].consume("q", prefetch=5) as consumer:
        await one[0].put(words(1))
        held = await consumer.take(5)
        for _ in range(5 * BEATS):
            await tended(one, 1)
            await tended(other, 1)
        assert await other[0].depth("q") == 0
        await consumer.ack(held)
    assert await other[0].depth("q") == 0


async def test_a_database_that_stood_still_kills_no_consumer(process: Callable[[], Opened]) -> None:
    one, other = process(), process()
    async with one[0].consume("q", prefetch=5) as consumer:
        await one[0].put(words(1))
        held = await consumer.take(5)
        await tended(one, 1)
        await tended(other, 2)

        for _, clock in (one, other):
            clock.now_s += 3600
        await other[0].tend()
        await tended(other, 1)
        await one[0].tend()
        await tended(other, BEATS - 2)

        assert await other[0].depth("q") == 0
        await consumer.ack(held)


async def test_what_is_held_is_free_when_its_consumer_leaves(process: Callable[[], Opened]) -> None:
    queue, _ = process()
    await queue.put(words(3))
    async with queue.consume("q", prefetch=5) as consumer:
        await consumer.take(2)
        assert await queue.depth("q") == 1

    assert await queue.depth("q") == 3


async def test_a_take_that_is_cancelled_at_any_moment_loses_nothing(process: Callable[[], Opened]) -> None:
    queue, _ = process()
    await queue.put(words(200))
    seen: list[Message] = []
    async with queue.consume("q", prefetch=200) as consumer:
        for number in range(40):
            taking = asyncio.create_task(consumer.take(3))
            with suppress(TimeoutError):
                async with asyncio.timeout(number * 0.0002):
                    await asyncio.shield(taking)
            taking.cancel()
            with suppress(asyncio.CancelledError):
                seen += [delivery.message for delivery in await taking]
        while len(seen) < 200:
            async with asyncio.timeout(WAIT_S):
                seen += [delivery.message for delivery in await consumer.take(200)]

    assert sorted(message.task for message in seen) == sorted(message.task for message in words(200))


async def test_a_consumer_that_leaves_in_the_middle_of_a_look_holds_nothing(process: Callable[[], Opened]) -> None:
    queue, _ = process()
    await queue.put(words(3))
    async with queue.consume("q", prefetch=5) as consumer:
        taking = asyncio.create_task(consumer.take(3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        taking.cancel()

    assert await queue.depth("q") == 3


async def test_messages_taken_by_a_look_whose_answer_was_lost_are_found_again(database: Database) -> None:
    lossy = LossyDatabase.of_same(database)
    queue = PostgresQueue(lossy)
    await queue.put(words(3))
    async with queue.consume("q", prefetch=5) as consumer:
        (first,) = await consumer.take(1)
        lossy.losses = 1
        with pytest.raises(QueueUnavailable):
            await consumer.take(4)

        again = await consumer.take(4)

        assert [delivery.message for delivery in (first, *again)] == words(3)
        lossy.losses = 1
        with pytest.raises(QueueUnavailable):
            await consumer.ack([first])
        await consumer.ack([first, *again])
    assert await queue.depth("q") == 0


async def test_a_waiting_consumer_is_woken_at_once(database: Database) -> None:
    queue, other = PostgresQueue(database), PostgresQueue(database)
    async with running(queue), queue.consume("q", prefetch=5) as consumer:
        await other.put(words(1))
        async with asyncio.timeout(WAIT_S):
            await consumer.ack(await consumer.take(1))  # by now it listens, or looks again
            fastest_s = 99.0
            for number in range(1, 6):
                taking = asyncio.create_task(consumer.take(1))
                await asyncio.sleep(0.05 * number)
                began = time.monotonic()
                await other.put(words(1, first=number))
                await consumer.ack(await taking)
                fastest_s = min(fastest_s, time.monotonic() - began)

    assert fastest_s < 0.3


async def test_messages_handed_back_go_to_another_at_once(process: Callable[[], Opened]) -> None:
    (one, _), (other, _) = process(), process()
    await one.put(words(2))
    async with one.consume("q", prefetch=5) as busy, other.consume("q", prefetch=5) as idle:
        held = await busy.take(5)
        await busy.hand_back(held[:1])
        (taken,) = await idle.take(5)

    assert taken.message == held[0].message
    assert taken.is_redelivered


async def test_what_others_add_is_seen_before_it_can_fill_the_queue(database: Database) -> None:
    """A count reads all that waits, so it is not made at each submission."""
    clock = Clock()
    ours, theirs = (PostgresTaskStore(database, max_length=20, clock=clock) for _ in range(2))
    draft = TaskDraft(tenant="acme", agent="echo", queue="q")

    await ours.submit([draft] * 5)
    await theirs.submit([draft] * 15)
    await ours.submit([draft])  # it knows of six
    clock.now_s += 1.0
    with pytest.raises(Overloaded):
        await ours.submit([draft])
    async with database.transaction() as connection:
        await connection.execute("DELETE FROM dispatch WHERE id IN (SELECT id FROM dispatch LIMIT 2)")
    clock.now_s += 2 * FULL_HOLDS_S
    await ours.submit([draft])
    with pytest.raises(Overloaded):
        await ours.submit([draft])
