"""
Finds tasks that nobody would ever start, because a broker has lost word of them, and puts it into their queues again.

A task is in the database and only word of it at the broker, so what a broker loses can be found: more tasks may be
started than its queue holds word of. Those that have waited longest are put in again until the numbers agree. Where
that is wrong, since a worker holds word that it has not begun yet, a task has word twice and is started once.

A task that was under way is found once its worker is gone: every process beats, and each measures for itself how long
the others have stood still. Every gateway and worker looks; any of them will do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar

import structlog

from sutazai.core.errors import StoreUnavailable
from sutazai.core.task import Lost
from sutazai.policy.stillness import Stillness
from sutazai.ports.queue import Queue
from sutazai.ports.refill import RefillStore, UnderWay
from sutazai.ports.tasks import Change, TaskStore

T = TypeVar("T")

log = structlog.get_logger("sutazai.tasks")

AT_ONCE = 500
"""Attempts of workers that are gone, in one look."""
MOST = 100_000
"""Words that are missing in one queue, in one look."""
REST_FACTOR = 50
"""A queue whose tasks took long to count is left alone for so many times as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefillRhythm:
    """How often is looked, and what is believed when."""

    beat_s: float = 5.0
    lease_s: float = 60.0
    """A worker whose beat stands still for so long is gone. A broker that lives has given its tasks to others long
    before."""
    look_s: float = 5.0
    patience_s: float = 10.0
    """For a task that may be started to be started, where its queue is empty."""


class Refill:
    """That of one process, for the queues that it knows."""

    def __init__(
        self,
        stores: Sequence[RefillStore],
        tasks: TaskStore,
        queue: Queue,
        names: Sequence[str],
        *,
        worker: str,
        wall: Callable[[], datetime],
        clock: Callable[[], float] = time.monotonic,
        rhythm: RefillRhythm | None = None,
    ) -> None:
        """
        Args:
            stores: one of each database that keeps tasks.
            tasks: over all of them.
            queue: what workers read.
            worker: what tasks that are under way in this process have as their worker.
        """
        self._tasks = tasks
        self._queue = queue
        self._worker = worker
        self._wall = wall
        self._clock = clock
        self._rhythm = rhythm or RefillRhythm()
        now, step_s = clock(), 2 * self._rhythm.beat_s
        self._watched = [_Watched(store, Stillness(longest_step_s=step_s, now=now)) for store in stores]
        self._lines = [_Line(name) for name in names]
        self.refilled = 0
        """Words that were put again from here."""
        self.given_up = 0
        """Attempts of workers that are gone, given up from here."""

    async def run(self) -> None:
        """Beat and look until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._again(self.beat, self._rhythm.beat_s), name="beat as a worker")
            group.create_task(self._again(self.look, self._rhythm.look_s), name="look for tasks without word")

    async def beat(self) -> None:
        """Tell that this process lives, and see who else does."""
        for one in self._watched:
            await _or(None, one.store.beat(self._worker))
            beats = await _or({}, one.store.beats())
            still = one.stillness.look(beats, now=self._clock())
            one.gone = {name: beats[name] for name, still_s in still.items() if still_s >= self._rhythm.lease_s}

    async def look(self) -> None:
        """Put again what was missing at the last look and still is. Raises `QueueUnavailable`."""
        left = [attempt for one in self._watched for attempt in await self._left_behind(one)]
        for line in self._lines:
            if self._clock() >= line.rests_until:
                await self._look_at(line, [attempt for attempt in left if attempt.queue == line.name])

    async def _look_at(self, line: _Line, left: Sequence[UnderWay]) -> None:
        since = self._wall() - timedelta(seconds=self._rhythm.patience_s)
        # Before the tasks are counted: one that is begun meanwhile makes them fewer, and nothing seem missing.
        depth = await self._queue.depth(line.name)
        began = self._clock()
        counts = [
            await _or(0, one.store.without_word(line.name, since=since, limit=depth + MOST)) for one in self._watched
        ]
        line.rests_until = began + REST_FACTOR * (self._clock() - began)
        # At two looks: a queue that has just elected its leader may say that it is empty.
        before, line.missing = line.missing, len(left) + sum(counts) - depth
        missing = min(before, line.missing)
        if missing > 0:
            given_up = await self._give_up(left[:missing])
            refilled = 0
            for one, count in zip(self._watched, counts, strict=True):
                at_most = min(count, missing - len(left))
                if at_most > 0:
                    refilled += await _or(0, one.store.refill(line.name, since=since, limit=at_most))
            self.refilled += refilled
            self.given_up += given_up
            if refilled or given_up:
                log.info("word of tasks was missing", queue=line.name, put_again=refilled, attempts_given_up=given_up)

    async def _left_behind(self, one: _Watched) -> Sequence[UnderWay]:
        """Attempts of workers that are gone. Who left none is forgotten."""
        gone = one.gone
        if not gone:
            return ()
        found = await one.store.under_way(list(gone), limit=AT_ONCE)
        if not found:
            await one.store.forget(gone)
        return found

    async def _give_up(self, attempts: Sequence[UnderWay]) -> int:
        """Their tasks may be started again, and there is word of them."""
        changes = [Change(task=each.task, event=Lost(each.fence)) for each in attempts]
        return sum(task is not None for task in await self._tasks.change(changes)) if changes else 0

    async def _again(self, work: Callable[[], Awaitable[None]], pause_s: float) -> None:
        while True:
            try:
                await work()
            except StoreUnavailable as error:
                log.info("tasks without word were not looked for", why=error.message)
            except Exception:  # the border of one turn
                log.exception("tasks without word were not looked for")
            await asyncio.sleep(pause_s)


@dataclass(slots=True, eq=False)
class _Watched:
    """One database, and which of its workers are gone, with their last beats."""

    store: RefillStore
    stillness: Stillness[str]
    gone: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Line:
    """One queue, as it was at the last look."""

    name: str
    missing: int = 0
    rests_until: float = 0.0
    """By the clock."""


async def _or(instead: T, asked: Awaitable[T]) -> T:
    """What a database answers; where it is away, its tasks are looked at another time and those of others now."""
    try:
        return await asked
    except StoreUnavailable as error:
        log.info("tasks of a database were not looked at", why=error.message)
        return instead
