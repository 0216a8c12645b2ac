"""
The worker: takes word of tasks, begins attempts, runs agents, and writes how they ended.

Everything that goes to the store goes there in groups: what is begun together, what ended meanwhile. A delivery is
acknowledged only after the end of its attempt was written, so whatever dies on the way, somebody starts the task again.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

import structlog

from sutazai.core.errors import StoreUnavailable
from sutazai.core.task import Event, Failed, FailureReason, HandedBack, Suspended
from sutazai.policy.prefetch import NONE_WAITS, Pace, PrefetchRules
from sutazai.policy.rest import rest_s
from sutazai.policy.tasks import on_leaving
from sutazai.ports.queue import Consumer, Delivery, Queue
from sutazai.ports.tasks import Change, Refused, Start
from sutazai.tasks.attempt import Ended, Running, ended_of
from sutazai.tasks.context import Attempt, Surroundings
from sutazai.tasks.room import Room

log = structlog.get_logger("sutazai.tasks")

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
PROGRESS_S = 0.25
FAILURES_TO_REOPEN = 3
"""In a row. A consumer that is left gives up what its attempts hold, so a short trouble is waited out."""
LEAVE_S = 5.0
"""For what was handed back to be written; past it the tasks are delivered again all the same."""
NOT_MINE_PAUSE = timedelta(seconds=1)
"""Before a task is offered again that this worker was not made for."""
CALLED_OFF_S = 0.2
"""Between two looks whether attempts were called off."""
PACE_S = 0.5
"""Between two looks whether attempts are slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRules:
    """How a worker works."""

    name: str
    slots: dict[str, int]
    """Attempts at once, by queue."""
    prefetch: PrefetchRules = NONE_WAITS
    delivery_limit: int = 20
    drain_s: float = 30.0


@dataclass(slots=True, eq=False)
class Reading:
    """What a worker knows of one queue that it reads."""

    name: str
    room: Room
    slots: int
    pace: Pace
    consumer: Consumer | None = None
    """None while the queue is away."""
    running: set[Running] = field(default_factory=set)


class Worker:
    """Runs agents until it is told to stop."""

    def __init__(
        self,
        queue: Queue,
        around: Surroundings,
        rules: WorkerRules,
        *,
        mine: frozenset[str],
        random: Callable[[], float],
    ) -> None:
        self._queue = queue
        self._around = around
        self._store = around.store
        self._rules = rules
        self._mine = mine
        """Agents that this worker runs, of all that are known."""
        self._random = random
        self._running: dict[str, Running] = {}
        self._ended: deque[Ended] = deque()
        self._has_ended = asyncio.Event()
        self._stopping = asyncio.Event()
        self._readings: list[Reading] = []
        self._telling = asyncio.Lock()
        """Held while progress is written: an end that overtook it would have it refused."""
        self._places = {agent: asyncio.Semaphore(known.concurrency) for agent, known in around.agents.items()}
        self.ends: Counter[str] = Counter()
        """Attempts that ended, by the kind of event."""
        self.ended = asyncio.Event()
        """Set when `run` has done its last."""

    @property
    def running(self) -> int:
        """Attempts under way."""
        return len(self._running)

    def stop(self) -> None:
        """Take nothing new; `run` returns when what is under way has ended, or was handed back after `drain_s`."""
        self._stopping.set()

    async def run(self) -> None:
        """Work until `stop`; cancelled, it leaves everything to be delivered again."""
        async with asyncio.TaskGroup() as group:
            beside = [
                group.create_task(self._write_ends(), name="write ends of attempts"),
                group.create_task(self._write_progress(), name="write progress"),
                group.create_task(self._heed(), name="heed cancellations"),
                group.create_task(self._keep_pace(), name="see whether attempts are slow"),
            ]
            pace = Pace(asyncio.get_running_loop().time())
            self._readings = [Reading(name, Room(slots), slots, pace) for name, slots in self._rules.slots.items()]
            readers = [
                group.create_task(self._read(reading, group), name=f"work on {reading.name}")
                for reading in self._readings
            ]
            try:
                await asyncio.wait(readers)
            finally:
                for task in beside:
                    task.cancel()
                self.ended.set()

    # taking

    async def _read(self, reading: Reading, attempts: asyncio.TaskGroup) -> None:
        name, pause_s = reading.name, FIRST_PAUSE_S
        while not self._stopping.is_set():
            try:
                async with self._queue.consume(name, prefetch=self._prefetch(reading)) as consumer:
                    reading.consumer = consumer
                    failures = 0
                    while not self._stopping.is_set():
                        try:
                            await self._take_some(consumer, reading, attempts)
                            failures, pause_s = 0, FIRST_PAUSE_S
                        except StoreUnavailable:
                            failures += 1
                            if failures >= FAILURES_TO_REOPEN:
                                raise
                            await _sleep(FIRST_PAUSE_S, self._stopping)
                    with suppress(StoreUnavailable):
                        await consumer.hold(0)
                    await self._drain(reading.room)
                    return
            except StoreUnavailable as error:
                log.warning("no tasks are taken for now", queue=name, why=error.message)
            except Exception:  # the border of one turn
                log.exception("no tasks are taken for now", queue=name)
            finally:
                reading.consumer = None
            await _sleep(pause_s, self._stopping)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        await self._drain(reading.room)

    async def _take_some(self, consumer: Consumer, reading: Reading, attempts: asyncio.TaskGroup) -> None:
        """Begin what comes, or return when the worker is to stop."""
        stopping = asyncio.create_task(self._stopping.wait(), name="wait for the end")
        taking = asyncio.create_task(_taken(consumer, reading.room), name="take deliveries")
        try:
            await asyncio.wait({taking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not taking.done():
                taking.cancel()
                await asyncio.wait({taking})  # it may have taken some all the same
            if not taking.cancelled():
                began_at = asyncio.get_running_loop().time()
                await self._begin(consumer, taking.result(), reading, attempts)
                await self._rest(began_at)
        finally:
            stopping.cancel()
            taking.cancel()

    async def _begin(
        self, consumer: Consumer, deliveries: Sequence[Delivery], reading: Reading, attempts: asyncio.TaskGroup
    ) -> None:
        unreadable = [delivery for delivery in deliveries if not delivery.message.task]
        if unreadable:  # nobody can read them: the broker sets them aside once they were handed back too often
            log.error("messages were unreadable and become dead letters", messages=len(unreadable))
            await consumer.hand_back(unreadable)
        readable = [delivery for delivery in deliveries if delivery.message.task]
        if not readable:
            return
        starts = [Start(task=one.message.task, may_take_over=one.is_redelivered) for one in readable]
        try:
            begun = await self._store.begin(starts, worker=self._rules.name, delivery_limit=self._rules.delivery_limit)
        except StoreUnavailable:
            with suppress(StoreUnavailable):
                await consumer.hand_back(readable)
            raise
        done = []
        for delivery, task in zip(readable, begun, strict=True):
            if isinstance(task, Refused):
                log.info("delivery passed over", task=task.task, why=task.why)
                done.append(delivery)
                continue
            began_at = asyncio.get_running_loop().time()
            running = Running(delivery, consumer, Attempt(task, self._around), reading.room, began_at)
            reading.room.take()
            reading.running.add(running)
            self._running[task.id] = running
            running.handle = attempts.create_task(self._attempt(running, reading), name=f"attempt {task.id}")
        await consumer.ack(done)

    def _prefetch(self, reading: Reading) -> int:
        now = asyncio.get_running_loop().time()
        return reading.pace.prefetch(self._rules.prefetch, slots=reading.slots, now=now)

    async def _keep_pace(self) -> None:
        """Let consumers hold more where all attempts are quick, and only what is under way where some are not."""
        while not self._stopping.is_set():
            await asyncio.sleep(PACE_S)
            now = asyncio.get_running_loop().time()
            for reading in self._readings:
                longest_s = max((now - running.began_at for running in reading.running), default=0.0)
                reading.pace = reading.pace.after(longest_s, now=now)
                if reading.consumer is not None:
                    with suppress(StoreUnavailable):
                        await reading.consumer.hold(self._prefetch(reading))

    # running

    async def _attempt(self, running: Running, reading: Reading) -> None:
        task = running.attempt.task
        try:
            running.has_begun = True
            ended = Ended(running, running.early_end or await self._outcome(running))
        except asyncio.CancelledError:  # also while it waited for a place among those of its agent
            early = running.early_end
            if early is None:
                raise
            ended = Ended(running, early)
        finally:
            now = asyncio.get_running_loop().time()
            reading.running.discard(running)
            reading.pace = reading.pace.after(now - running.began_at, now=now)
            if self._running.get(task.id) is running:
                del self._running[task.id]
        self._ended.append(ended)
        self._has_ended.set()

    async def _outcome(self, running: Running) -> Event:
        task = running.attempt.task
        agent = self._around.agents.get(task.draft.agent)
        if agent is None:
            why = f"No agent is named {task.draft.agent!r} here. Install it, then `sutazai dead-letters requeue`."
            return Failed(task.deliveries, FailureReason.UNKNOWN_AGENT, why)
        if agent.name not in self._mine:
            return HandedBack(task.deliveries, self._around.wall() + NOT_MINE_PAUSE)
        async with self._places[agent.name]:
            return await ended_of(running, agent, self._around, self._random)

    # ending

    async def _write_ends(self) -> None:
        while True:
            await self._has_ended.wait()
            self._has_ended.clear()
            ended = [self._ended.popleft() for _ in range(len(self._ended))]
            if ended:
                async with self._telling:
                    pass  # what these told last is written by now
                began_at = asyncio.get_running_loop().time()
                await self._write(ended)
                await self._rest(began_at)

    async def _write(self, ended: Sequence[Ended]) -> None:
        """Write until it is written: an end that was reached is not thrown away because the store is away."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                changes: list[Change] = []
                for one in ended:
                    changes += [told] if (told := one.running.attempt.take_progress()) else []
                plain = [one for one in ended if not isinstance(one.event, Suspended)]
                await self._store.change([*changes, *(Change(task=one.task, event=one.event) for one in plain)])
                for one in ended:
                    if isinstance(one.event, Suspended):
                        change = Change(task=one.task, event=one.event)
                        await self._store.suspend(change, one.running.attempt.waits_for)
                break
            except StoreUnavailable as error:
                log.warning("ends of attempts are not written yet", attempts=len(ended), why=error.message)
            except Exception:  # the border of one turn
                log.exception("ends of attempts are not written yet", attempts=len(ended))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        await self._acknowledge(ended)

    async def _acknowledge(self, ended: Sequence[Ended]) -> None:
        for consumer in {one.running.consumer for one in ended}:
            try:
                await consumer.ack([one.running.delivery for one in ended if one.running.consumer is consumer])
            except StoreUnavailable as error:  # delivered once more, and passed over then
                log.warning("deliveries were not acknowledged", why=error.message)
        for one in ended:
            self.ends[type(one.event).__name__.lower()] += 1
            one.running.room.give()

    async def _write_progress(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            async with self._telling:
                told = [change for running in self._running.values() if (change := running.attempt.take_progress())]
                if told:
                    with suppress(StoreUnavailable):  # the next one tells more
                        await self._store.change(told)

    async def _rest(self, began_at: float) -> None:
        """After work that began then, unless the places of any queue are short: what was written may be one of them."""
        worked_s = asyncio.get_running_loop().time() - began_at
        rooms = [reading.room for reading in self._readings]
        await asyncio.sleep(min(rest_s(worked_s, free=room.count, slots=room.slots) for room in rooms))

    # calling off

    async def _heed(self) -> None:
        """Cancel attempts whose task is to end, or has another attempt by now."""
        async for ids in self._store.changed():
            held = [(task, run.attempt.fence) for task, run in self._running.items() if not ids or task in ids]
            if not held:
                continue
            with suppress(StoreUnavailable):
                for task in await self._store.called_off(held):
                    running = self._running.get(task)
                    if running is not None and (task, running.attempt.fence) in held:
                        running.call_off()
            await asyncio.sleep(CALLED_OFF_S)

    async def _drain(self, room: Room) -> None:
        """Let attempts end, and after a while hand them back."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._rules.drain_s):
                await room.wait_all()
                return
        for running in list(self._running.values()):
            if running.room is room:
                attempt = running.attempt
                running.hand_back(on_leaving(attempt.task, tokens=attempt.tokens, now=self._around.wall()))
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await room.wait_all()


async def _taken(consumer: Consumer, room: Room) -> Sequence[Delivery]:
    await room.wait()
    return await consumer.take(room.count)


async def _sleep(pause_s: float, unless: asyncio.Event) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(pause_s):
            await unless.wait()
