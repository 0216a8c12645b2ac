"""
A worker in a process of its own, for tests that kill it: `task_worker.py URL DATA_DIR NAME [BROKER PREFIX]`.

Its agent `effect` waits a moment and writes down that it ran, once for each task.
"""

from __future__ import annotations

import asyncio
import random
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
from tests.surroundings import without_models

from sutazai.adapters.postgres.stores import open_stores
from sutazai.adapters.rabbitmq.queue import open_rabbitmq
from sutazai.ports.agent import TASK_PROCESSING, Agent, AgentContext
from sutazai.ports.queue import Queue
from sutazai.settings.model import Database, Rabbitmq
from sutazai.settings.secret import Secret
from sutazai.tasks.dead_letters import DeadLetters
from sutazai.tasks.refill import Refill
from sutazai.tasks.relay import Relay
from sutazai.tasks.worker import Worker, WorkerRules
from sutazai.telemetry.logs import configure

SLOTS = 16


def agents(url: str) -> dict[str, Agent]:
    """The agent of these tests."""

    async def effect(context: AgentContext, pause_s: float) -> int:
        await asyncio.sleep(pause_s)
        connection = await asyncpg.connect(url, statement_cache_size=0, timeout=5)
        try:
            await connection.execute(
                "INSERT INTO effects (task, fence) VALUES ($1, $2) ON CONFLICT (task) DO NOTHING",
                context.task.id,
                context.fence,
            )
        finally:
            await connection.close()
        return context.fence

    known = Agent(
        name="effect",
        run=effect,
        input_type=float,
        output_type=int,
        describes="Writes down that it ran.",
        queue=TASK_PROCESSING,
        concurrency=SLOTS,
        max_attempts=50,
    )
    return {known.name: known}


async def main(url: str, data_dir: Path, name: str, broker: Rabbitmq | None) -> None:
    """Work until killed."""
    configure(form="json", level="warning")  # to standard error: nobody reads what comes after `works`
    async with open_stores(Database(url=Secret(url)), data_dir) as stores, AsyncExitStack() as stack:
        known = agents(url)
        around = without_models(stores.tasks, stores.messages, known)
        rules = WorkerRules(name=name, slots={TASK_PROCESSING: SLOTS}, delivery_limit=1000)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        group.create_task(stores.queue.run())
        queue: Queue = stores.queue
        if broker is not None:
            queue = await stack.enter_async_context(open_rabbitmq(broker))
            group.create_task(Relay(stores.queue, queue, [TASK_PROCESSING]).run())
            group.create_task(DeadLetters(queue, stores.tasks).run())
        refill = Refill(stores.refills, stores.tasks, queue, [TASK_PROCESSING], worker=name, wall=stores.wall)
        await refill.beat()
        group.create_task(refill.run())
        worker = Worker(queue, around, rules, mine=frozenset(known), random=random.random)
        group.create_task(worker.run())
        sys.stdout.write("works\n")
        sys.stdout.flush()


if __name__ == "__main__":
    settings = Rabbitmq(url=Secret(sys.argv[4]), prefix=sys.argv[5]) if len(sys.argv) > 4 else None
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], settings))
