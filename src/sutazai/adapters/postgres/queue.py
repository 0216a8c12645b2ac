"""
The queue in a table: for one machine, and as the outbox before a broker.

A row is held by one consumer at a time. Each process beats in `dispatch_consumers`; one whose beat another process has
seen stand still for `LEASE_S` of its own monotonic time is gone, and what it held is free. No clocks are compared. The
time between two looks counts as one beat at most, so a database that stands still lets nobody die.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta

import asyncpg
import structlog

from sutazai.adapters.postgres.database import Connection, Database
from sutazai.adapters.postgres.dispatch_rows import put, ripen
from sutazai.adapters.postgres.ear import heard
from sutazai.adapters.postgres.grown import tend_grown
from sutazai.core.errors import QueueUnavailable, StoreUnavailable
from sutazai.core.request import Priority
from sutazai.core.task import id_of
from sutazai.policy.passed_over import PassedOver
from sutazai.policy.stillness import Stillness
from sutazai.ports.queue import Delivery, Message, QueueState

log = structlog.get_logger("sutazai.queue")

BEAT_S = 0.4
LEASE_S = 1.6
"""Four beats: a process whose event loop stands still for so long loses what it holds, which does no harm. Those who
look need up to a beat more to see it."""
LOOK_S = 5.0
"""Between two looks of a consumer that nobody woke."""
FREE_S = 5.0
"""Between two looks for what is held by nobody, where nobody was seen to go."""
RIPE_AT_ONCE = 1000
MAX_LENGTH = 100_000
PROMOTE_AFTER_S = 60.0
CHANNEL = "sutazai_queues"


class PostgresQueue:
    """The `Queue` of one machine. `run` has to run beside it."""

    def __init__(
        self,
        database: Database,
        *,
        max_length: int = MAX_LENGTH,
        promote_after_s: float = PROMOTE_AFTER_S,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            promote_after_s: a message that waited for so long while higher priorities went first gets a place of its
                class among those that are taken.
        """
        self._database = database
        self._sql = database.sql
        self._max_length = max_length
        self._promote_after = timedelta(seconds=promote_after_s)
        self._wall = wall
        self._clock = clock
        self._consumers: set[PostgresConsumer] = set()
        self._frees_at = clock()
        self._stillness = Stillness[uuid.UUID](longest_step_s=BEAT_S, now=clock())

    async def put(self, messages: Sequence[Message]) -> Sequence[Message]:
        now = self._wall()
        with _as_queue():
            async with self._database.transaction() as connection:
                room = {
                    queue: self._max_length
                    - await connection.fetchval(self._sql["depth_dispatch"], queue, self._max_length)
                    for queue in {message.queue for message in messages}
                }
                refused = []
                for message in messages:
                    room[message.queue] -= 1
                    if room[message.queue] < 0:
                        refused.append(message)
                kept = [message for message in messages if message not in refused] if refused else messages
                await put(connection, self._sql, [(message, now) for message in kept], now=now)
        return refused

    @asynccontextmanager
    async def consume(self, queue: str, *, prefetch: int) -> AsyncIterator[PostgresConsumer]:
        """Read a queue; what is held at the end goes to others."""
        consumer = PostgresConsumer(self._database, queue, prefetch)
        self._consumers.add(consumer)
        try:
            yield consumer
        finally:
            self._consumers.discard(consumer)
            await consumer.leave()

    def idle(self, queue: str, count: int) -> PostgresConsumer | None:
        """One here that found all that there was, and has room for so many more."""
        return next((one for one in self._consumers if one.queue == queue and one.is_idle(count)), None)

    async def depth(self, queue: str) -> int:
        with _as_queue():
            async with self._database.statement() as connection:
                depth: int = await connection.fetchval(self._sql["depth_dispatch"], queue, 10 * self._max_length)
        return depth

    async def states(self) -> Sequence[QueueState]:
        """All queues that were ever used, by name."""
        with _as_queue():
            async with self._database.statement() as connection:
                rows = await connection.fetch(self._sql["queue_states"])
        return [QueueState(kind="table", **row) for row in rows]

    async def run(self) -> None:
        """Beat, free what dead processes held, and give messages their turn when they are due. Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._wake(), name="hear of messages")
            group.create_task(tend_grown(self._database), name="look at tables that grow")
            while True:
                await asyncio.sleep(BEAT_S)
                try:
                    await self.tend()
                except StoreUnavailable as error:
                    log.warning("the queue was not tended", why=error.message)
                except Exception:  # the border of one turn
                    log.exception("the queue was not tended")

    async def _wake(self) -> None:
        async for queues in heard(self._database, CHANNEL, look_s=LOOK_S):
            for consumer in list(self._consumers):
                consumer.wake(queues)

    async def tend(self) -> None:
        """Do once what `run` does at every beat."""
        consumers = list(self._consumers)
        async with self._database.transaction() as connection:
            for consumer in consumers:
                await consumer.beat(connection)
            beats = {row["id"]: row["beat"] for row in await connection.fetch(self._sql["all_beats"])}
            still = self._stillness.look(beats, now=self._clock())
            gone = [consumer for consumer, still_s in still.items() if still_s >= LEASE_S]
            if gone:
                await connection.execute(self._sql["drop_consumers"], gone)
                log.warning("consumers gone; what they held is free", consumers=len(gone))
            if gone or self._clock() >= self._frees_at:
                self._frees_at = self._clock() + FREE_S
                freed = {row["queue"] for row in await connection.fetch(self._sql["free_dispatch"])}
                await connection.execute(self._sql["tell_queues"], sorted(freed))
            now = self._wall()
            await ripen(connection, self._sql, now=now, limit=RIPE_AT_ONCE)
            await self._look_at_lower_classes(connection, consumers, before=now - self._promote_after)

    async def _look_at_lower_classes(
        self, connection: Connection, consumers: Sequence[PostgresConsumer], *, before: datetime
    ) -> None:
        """Tell consumers whether lower priorities have waited since then, so that a take need not look for nothing."""
        queues = sorted({consumer.queue for consumer in consumers})
        rows = await connection.fetch(self._sql["passed_over_dispatch"], queues, before) if queues else ()
        passed_over = {row["queue"] for row in rows}
        for consumer in consumers:
            consumer.lower_waited_since = before if consumer.queue in passed_over else None


class PostgresConsumer:
    """One reader. Whoever calls `take` waits for word, not in a loop."""

    def __init__(self, database: Database, queue: str, prefetch: int) -> None:
        self._database = database
        self._sql = database.sql
        self.queue = queue
        self.lower_waited_since: datetime | None = None
        """Messages of lower priorities have waited since then or longer; None where there are none."""
        self._passed_over = PassedOver()
        self._prefetch = prefetch
        self._id: uuid.UUID | None = None
        self._called = asyncio.Event()
        self._rests_until = 0.0
        """By the loop's clock: the last look found all that there was, and whoever brings more calls."""
        self._found_all = False
        """By the last look, whoever has brought more since."""
        self._held: dict[int, int] = {}
        """Rows, each with the number of its delivery: one that comes back is another delivery."""
        self._expected = 0
        """Rows that are about to be ours from the start."""
        self._look: asyncio.Task[Sequence[Delivery]] | None = None
        """Under way. It outlives a cancellation of `take`: what it finds is for the next one."""
        self._found: list[Delivery] = []
        """More than the last `take` wanted."""
        self._is_unsure = False
        """Something failed that may have left rows which nobody knows of."""

    def wake(self, queues: frozenset[str]) -> None:
        """Look again, should these be ours, or nobody know."""
        if not queues or self.queue in queues:
            self._look_again()

    async def beat(self, connection: Connection) -> None:
        """Say that we are there. Where we were taken for gone, we hold nothing any more and begin anew."""
        if self._id is not None and await connection.fetchval(self._sql["beat_consumer"], self._id) is None:
            self._id, self._found_all = None, False
            self._held.clear()
            self._found.clear()
            self._look_again()

    # word that is ours from the start

    def is_idle(self, count: int) -> bool:
        """Whether it found all that there was, and has room for so many more."""
        is_free = self._found_all and self._look is None and self.lower_waited_since is None
        return is_free and self.held + count <= self._prefetch

    def expect(self, count: int) -> uuid.UUID | None:
        """So many are written as held by this id, and then `receive` or `doubt` is called."""
        self._expected += count
        return self._id

    def receive(self, consumer: uuid.UUID | None, messages: Mapping[int, Message], *, expected: int) -> None:
        """They are kept, each by the number of its row. Where we were taken for gone meanwhile, others free them."""
        self._expected -= expected
        if consumer == self._id:
            self._held.update(dict.fromkeys(messages, 1))
            self._found += [_first_delivery(number, message) for number, message in messages.items()]
            self._called.set()

    def doubt(self, *, expected: int) -> None:
        """Nobody knows whether they are kept."""
        self._expected -= expected
        self._lose_track()
        self._called.set()

    async def take(self, at_most: int) -> Sequence[Delivery]:
        while not (found := await self.look(at_most, self._prefetch - self.held)):
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self.called()
        return found

    async def look(self, at_most: int, free: int) -> Sequence[Delivery]:
        """What is there now: what was found before, and as many as are free. A cancellation loses none."""
        self._called.clear()
        wanted = min(at_most - len(self._found), free)
        if self._look is None and wanted > 0 and not self._rests():
            self._look = asyncio.create_task(self._take(wanted), name="look for messages")
        if self._look is not None:
            look = self._look
            await asyncio.wait([look])
            self._look = None
            self._found.extend(look.result())
        found = self._found[:at_most]
        del self._found[:at_most]
        return found

    def _rests(self) -> bool:
        """Whether it found all that there was, and nobody has brought more."""
        return asyncio.get_running_loop().time() < self._rests_until

    async def called(self) -> None:
        """Until there may be something for us."""
        await self._called.wait()

    @property
    def held(self) -> int:
        """Deliveries that are not dealt with, and those that are about to be made."""
        return len(self._held) + self._expected

    async def _take(self, at_most: int) -> Sequence[Delivery]:
        was_unsure, self._is_unsure = self._is_unsure, False
        is_plain = self._id is not None and not was_unsure and self.lower_waited_since is None
        begin = self._database.statement if is_plain else self._database.transaction
        try:
            with _as_queue():
                async with begin() as connection:
                    consumer = self._id
                    if consumer is None:
                        consumer = uuid.uuid4()
                        await connection.execute(self._sql["enter_consumer"], consumer, self.queue)
                    elif was_unsure:
                        await connection.execute(self._sql["free_unknown_dispatch"], consumer, list(self._held))
                    passed_over = await self._take_passed_over(connection, at_most, consumer)
                    left = at_most - len(passed_over)
                    others = await connection.fetch(self._sql["take_dispatch"], self.queue, left, consumer)
        except BaseException:
            self._lose_track()
            raise
        self._id = consumer
        rows = [*passed_over, *others]
        self._found_all = len(rows) < at_most
        if self._database.is_direct and self._found_all and not self._called.is_set():
            self._rests_until = asyncio.get_running_loop().time() + LOOK_S
        else:
            self._rests_until = 0.0
        self._passed_over.took(len(rows), passed_over=len(passed_over))
        self._held.update((row["id"], row["deliveries"]) for row in rows)
        return [self._delivery(row) for row in rows]

    async def _take_passed_over(
        self, connection: Connection, at_most: int, consumer: uuid.UUID
    ) -> Sequence[asyncpg.Record]:
        """Those of lower priorities that have waited for too long, up to their share."""
        places = self._passed_over.places(at_most)
        if not places or self.lower_waited_since is None:
            return ()
        statement = self._sql["take_passed_over_dispatch"]
        rows: Sequence[asyncpg.Record] = await connection.fetch(
            statement, self.queue, places, consumer, self.lower_waited_since
        )
        return rows

    def _delivery(self, row: asyncpg.Record) -> Delivery:
        number, task, tenant, agent, priority, deliveries = row
        message = Message(
            task="" if task is None else id_of(task),
            queue=self.queue,
            tenant=tenant,
            agent=agent,
            priority=Priority(priority),
        )
        return Delivery(message=message, tag=(number, deliveries), is_redelivered=deliveries > 1, count=deliveries - 1)

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        await self._end("ack_dispatch", deliveries)

    async def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        await self._end("hand_back_dispatch", deliveries, tells=True)

    async def hold(self, prefetch: int) -> None:
        if prefetch == self._prefetch:
            return
        self._prefetch = prefetch
        if len(self._held) > prefetch:
            surplus, self._found = self._found, []
            await self.hand_back(surplus)
        self._look_again()

    async def leave(self) -> None:
        """Free what is held; where the database is away, the others will see that we are gone."""
        if self._look is not None:
            with suppress(StoreUnavailable):
                await self._look
            self._look = None
        consumer, self._id = self._id, None
        self._held.clear()
        self._found.clear()
        if consumer is None:
            return
        with suppress(StoreUnavailable):
            async with self._database.transaction() as connection:
                freed = {row["queue"] for row in await connection.fetch(self._sql["leave_dispatch"], consumer)}
                await connection.execute(self._sql["drop_consumers"], [consumer])
                await connection.execute(self._sql["tell_queues"], sorted(freed))

    def _look_again(self) -> None:
        self._rests_until = 0.0
        self._called.set()

    def _lose_track(self) -> None:
        """Something failed that may have left rows which nobody knows of."""
        self._is_unsure = True
        self._found_all = False
        self._rests_until = 0.0

    async def _end(self, statement: str, deliveries: Sequence[Delivery], *, tells: bool = False) -> None:
        tags = {delivery.tag for delivery in deliveries}
        held = [number for number, count in self._held.items() if (number, count) in tags]
        if not held:
            return
        for number in held:
            del self._held[number]
        begin = self._database.transaction if tells else self._database.statement
        try:
            with _as_queue():
                async with begin() as connection:
                    await connection.execute(self._sql[statement], held, self._id)
                    if tells:
                        await connection.execute(self._sql["tell_queues"], [self.queue])
        except BaseException:
            self._lose_track()  # the next look frees them, and whoever gets them finds them ended
            raise
        finally:
            if not self._rests_until:
                self._called.set()


def _first_delivery(number: int, message: Message) -> Delivery:
    return Delivery(message=message, tag=(number, 1), is_redelivered=False)


class _as_queue:  # noqa: N801 - reads as a word in a `with`
    """Raises what the database raised as `QueueUnavailable`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, StoreUnavailable) and not isinstance(error, QueueUnavailable):
            raise QueueUnavailable(error.message) from error
