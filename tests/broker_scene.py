"""Tasks on their whole way with a broker, in one process: outbox, relay, queue, worker, dead letters and stream."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.postgres_databases import fresh_stores
from tests.rabbit_servers import eventually
from tests.surroundings import without_models

from sutazai.adapters.postgres.stores import Stores
from sutazai.adapters.rabbitmq.queue import RabbitQueue, open_rabbitmq
from sutazai.core.task import Task, TaskDraft
from sutazai.policy.prefetch import PrefetchRules
from sutazai.ports.agent import TASK_PROCESSING, Agent, AgentContext
from sutazai.ports.broadcasts import Source
from sutazai.settings.model import Rabbitmq
from sutazai.tasks.broadcast import Broadcast
from sutazai.tasks.dead_letters import DeadLetters
from sutazai.tasks.relay import Relay
from sutazai.tasks.worker import Worker, WorkerRules


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A broker with a worker, and what carries between it and the database."""

    stores: Stores
    broker: RabbitQueue
    settings: Rabbitmq
    dead_letters: DeadLetters
    broadcast: Broadcast
    """Of events."""

    async def done(self, agent: str = "echo", *, count: int = 1) -> list[Task]:
        """Tasks that were submitted and have ended."""
        return await self.ended(await self.submitted(agent, count=count))

    async def submitted(self, agent: str = "echo", *, count: int = 1) -> list[str]:
        """Ids of tasks that were acknowledged."""
        tasks = await self.stores.tasks.submit([TaskDraft(tenant="acme", agent=agent, input="1")] * count)
        return [task.id for task in tasks]

    async def ended(self, ids: list[str], *, within_s: float = 20.0) -> list[Task]:
        """These, once they have ended."""
        found: list[Task] = []

        async def have_ended() -> bool:
            found[:] = await self.stores.tasks.several("acme", ids)
            return len(found) == len(ids) and all(task.status.is_end for task in found)

        await eventually(have_ended, within_s)
        return found


@asynccontextmanager
async def running(*work: asyncio.Task[None]) -> AsyncIterator[None]:
    """Work that is cancelled at the end."""
    try:
        yield
    finally:
        for task in work:
            task.cancel()
        await asyncio.wait(work)


def worker_of(stores: Stores, broker: RabbitQueue, *, slots: int = 4, held: int = 1) -> Worker:
    """Its agent `echo` gives back a number, after so many seconds where it is above 1."""

    async def echo(_: AgentContext, value: float) -> float:
        await asyncio.sleep(value if value > 1 else 0)
        return value

    known = {"echo": Agent(name="echo", run=echo, input_type=float, output_type=float, describes="", concurrency=100)}
    around = without_models(stores.tasks, stores.messages, known)
    rules = WorkerRules(
        name="w", slots={TASK_PROCESSING: slots}, prefetch=PrefetchRules(slow=held, fast=held), drain_s=60.0
    )
    return Worker(broker, around, rules, mine=frozenset(known), random=random.random)


@asynccontextmanager
async def scene(data_dir: Path, settings: Rabbitmq) -> AsyncIterator[Scene]:
    """Over a database of its own."""
    async with fresh_stores(data_dir) as stores, open_rabbitmq(settings) as broker:
        dead_letters = DeadLetters(broker, stores.tasks)
        (store,) = stores.broadcasts
        broadcast = Broadcast(store, Source.EVENTS, broker.events.append, wall=_now)
        work = (
            broadcast.run(),
            stores.queue.run(),
            Relay(stores.queue, broker, [TASK_PROCESSING]).run(),
            dead_letters.run(),
            worker_of(stores, broker).run(),
        )
        async with running(*map(asyncio.create_task, work)):
            yield Scene(stores=stores, broker=broker, settings=settings, dead_letters=dead_letters, broadcast=broadcast)


def _now() -> datetime:
    return datetime.now(UTC)
