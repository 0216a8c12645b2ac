"""
Workers that are killed at any moment: a pool of light processes, each forked from one that has all modules loaded.

They die while they connect, take, begin, run, write an end or acknowledge it. What is looked at afterwards is what was
acknowledged when it was submitted: each task is done, its effect took place once, no fence was given to two attempts.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import signal
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import asyncpg
from tests.surroundings import without_models

from sutazai.adapters.postgres.database import Database, PoolRules, open_database
from sutazai.adapters.postgres.messages import PostgresMessageStore
from sutazai.adapters.postgres.queue import PostgresQueue
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.core.task import TaskDraft, id_of
from sutazai.ports.agent import TASK_PROCESSING, Agent, AgentContext
from sutazai.settings.secret import Secret
from sutazai.tasks.worker import Worker, WorkerRules
from sutazai.telemetry.logs import configure

POOL = 6
"""Processes that are alive at a time."""
SLOTS = 4
LIVES_S = 0.5
"""Mean life of a process, from its fork on or from when it begins to work."""
EARLY = 0.2
"""Part of the processes that die by the time since their fork, and so mostly before they work."""
LOOK_S = 0.02
"""Between two looks who is to die."""
LOOKS = 10
"""Between two looks whether there are tasks enough."""
LONGEST_TASK_S = 0.2
WAITING = 60
"""Tasks that there are always for the workers."""
DELIVERY_LIMIT = 10_000
TABLES = """
CREATE TABLE IF NOT EXISTS runs (task text, fence integer, PRIMARY KEY (task, fence));
CREATE TABLE IF NOT EXISTS effects (task text PRIMARY KEY, fence integer NOT NULL)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Toll:
    """What became of a run."""

    kills: int
    """Processes that were alive and got SIGKILL."""
    submitted: int
    """Tasks that were acknowledged."""
    lost: int
    """Of those, the ones that are not completed."""
    without_effect: int
    doubled: int
    """Effects beyond one for each task, and fences that two attempts had."""
    cut: int
    """Attempts that ended with their worker."""
    requeued_s: Sequence[float]
    """From the death of a worker to the next start of what it had begun, in order."""
    took_s: float

    @property
    def is_none(self) -> bool:
        """Nothing was lost, and nothing took place twice."""
        return not (self.lost or self.without_effect or self.doubled)

    def __str__(self) -> str:
        half, most = (self.requeued_s[int(part * len(self.requeued_s))] for part in (0.5, 0.99))
        return (
            f"{self.kills:,} workers killed in {self.took_s:.0f} s; {self.submitted:,} tasks acknowledged,"
            f" {self.lost} lost; effects missing {self.without_effect}, doubled {self.doubled};"
            f" {self.cut:,} attempts cut, begun again after {half:.2f} s (half), {most:.2f} s (99 of 100)"
        )


def effect_of(database: Database) -> Agent:
    """An agent that says that it runs, waits, and then has its effect: once for each task."""

    async def effect(context: AgentContext, pause_s: float) -> int:
        key = (context.task.id, context.fence)
        async with database.transaction() as connection:
            await connection.execute("INSERT INTO runs VALUES ($1, $2)", *key)
        await asyncio.sleep(pause_s)
        async with database.transaction() as connection:
            await connection.execute("INSERT INTO effects VALUES ($1, $2) ON CONFLICT (task) DO NOTHING", *key)
        return context.fence

    return Agent(
        name="effect",
        run=effect,
        input_type=float,
        output_type=int,
        describes="Has an effect.",
        queue=TASK_PROCESSING,
        concurrency=SLOTS,
        max_attempts=1,
    )


def work(url: str, name: str, works: Connection) -> None:
    """What a process does until it is killed."""
    configure(form="json", level="critical")
    asyncio.run(_work(url, name, works))


async def _work(url: str, name: str, works: Connection) -> None:
    async with open_database(Secret(url), timeout_s=10, rules=PoolRules(size=2, overflow=2)) as database:
        agent = effect_of(database)
        queue = PostgresQueue(database)
        around = without_models(
            PostgresTaskStore(database, max_length=100_000), PostgresMessageStore(database), {agent.name: agent}
        )
        rules = WorkerRules(name=name, slots={TASK_PROCESSING: SLOTS}, delivery_limit=DELIVERY_LIMIT)
        worker = Worker(queue, around, rules, mine=frozenset([agent.name]), random=random.random)
        async with asyncio.TaskGroup() as group:
            group.create_task(queue.run())
            group.create_task(worker.run())
            works.send_bytes(b"works")


@dataclass(slots=True)
class Living:
    """A process, and when it is to die."""

    name: str
    process: BaseProcess
    works: Connection
    """Has something to read once it works."""
    dies_at: float | None
    """Monotonic; None where that is settled when it works."""


class Pool:
    """So many processes, each with the moment at which it is to die."""

    def __init__(self, url: str, dice: random.Random) -> None:
        self._url = url
        self._dice = dice
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["__main__", __name__])
        self._living: list[Living] = []
        self._started = 0
        self.deaths: dict[str, float] = {}
        """Unix time at which each worker that was killed died, by its name."""

    def fill(self) -> None:
        """Start as many as are missing."""
        while len(self._living) < POOL:
            self._started += 1
            name = f"worker-{self._started}"
            ours, theirs = self._context.Pipe(duplex=False)
            process = self._context.Process(target=work, args=(self._url, name, theirs), name=name, daemon=True)
            process.start()
            theirs.close()
            dies_at = self._death() if self._dice.random() < EARLY else None
            self._living.append(Living(name, process, ours, dies_at))

    def kill_due(self) -> None:
        """Kill those whose time has come."""
        for one in list(self._living):
            if one.dies_at is None and one.works.poll():
                one.dies_at = self._death()
            if one.dies_at is not None and one.dies_at <= time.monotonic():
                self._living.remove(one)
                self._kill(one)

    def _death(self) -> float:
        return time.monotonic() + self._dice.expovariate(1 / LIVES_S)

    def end(self) -> None:
        """Kill all; these are not counted."""
        for one in self._living:
            self._kill(one)
            self.deaths.pop(one.name, None)
        self._living.clear()

    def _kill(self, one: Living) -> None:
        was_alive = one.process.is_alive()
        one.process.kill()
        one.process.join(10)
        if was_alive and one.process.exitcode == -signal.SIGKILL:
            self.deaths[one.name] = time.time()
        one.process.close()
        one.works.close()


async def kill_workers(url: str, *, kills: int, within_s: float, seed: int = 7) -> Toll:
    """
    Kill so many workers of a database with the tables of SutazAI, or as many as are killed in the time.

    The tasks are ended after that, by workers that live.
    """
    began = time.monotonic()
    dice = random.Random(seed)
    connection: Any = await asyncpg.connect(url)
    pool = Pool(url, dice)
    try:
        await connection.execute(TABLES)
        async with open_database(Secret(url), timeout_s=20) as database, AsyncExitStack() as stack:
            # As a gateway does: of the workers none lives long enough to see that another one is gone.
            tending = asyncio.create_task(PostgresQueue(database).run(), name="tend the queue")
            stack.push_async_callback(_cancelled, tending)
            store = PostgresTaskStore(database, max_length=100_000)
            submitted: list[str] = []
            while len(pool.deaths) < kills and time.monotonic() - began < within_s:
                unstarted = await store.waiting("acme", at_most=WAITING)
                drafts = [_draft(dice) for _ in range(WAITING - unstarted)]
                submitted += [task.id for task in await store.submit(drafts)]
                for _ in range(LOOKS):
                    pool.fill()
                    await asyncio.sleep(LOOK_S)
                    await asyncio.to_thread(pool.kill_due)
            deaths = dict(pool.deaths)
            pool.fill()
            await _ended(connection, len(submitted))
        return await _toll(connection, submitted, deaths, time.monotonic() - began)
    finally:
        pool.end()
        with suppress(OSError, asyncpg.PostgresError):
            await connection.close()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _draft(dice: random.Random) -> TaskDraft:
    return TaskDraft(tenant="acme", agent="effect", input=f"{dice.uniform(0, LONGEST_TASK_S):.3f}", max_attempts=1)


async def _ended(connection: Any, count: int) -> None:
    """Wait until so many tasks have ended."""
    statement = "SELECT count(*) FROM tasks WHERE status IN ('completed', 'failed', 'cancelled')"
    while await connection.fetchval(statement) < count:
        await asyncio.sleep(0.2)


async def _toll(connection: Any, submitted: Sequence[str], deaths: dict[str, float], took_s: float) -> Toll:
    rows = await connection.fetch("SELECT id, status, losses FROM tasks")
    completed = {id_of(row["id"]) for row in rows if row["status"] == "completed"}
    effects = [row["task"] for row in await connection.fetch("SELECT task FROM effects")]
    # Each attempt that said that it ran had a fence of its own, or its second insertion would have failed the task.
    failed = sum(row["status"] == "failed" for row in rows)
    return Toll(
        kills=len(deaths),
        submitted=len(submitted),
        lost=len(set(submitted) - completed),
        without_effect=len(set(submitted) - set(effects)),
        doubled=len(effects) - len(set(effects)) + failed,
        cut=sum(row["losses"] for row in rows),
        requeued_s=await _requeued(connection, deaths),
        took_s=took_s,
    )


async def _requeued(connection: Any, deaths: dict[str, float]) -> Sequence[float]:
    """For each start of a task that another start followed: from the death of its worker on."""
    rows = await connection.fetch(
        "SELECT task, extract(epoch FROM at)::float8 AS at, data::json ->> 'worker' AS worker FROM events"
        " WHERE kind = 'task.started' ORDER BY task, version"
    )
    pairs = [(first, then) for first, then in pairwise(rows) if first["task"] == then["task"]]
    return sorted(then["at"] - deaths[first["worker"]] for first, then in pairs if first["worker"] in deaths)
