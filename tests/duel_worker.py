"""A worker in a process of its own, whose agent does all that an attempt can do: `duel_worker.py URL NAME`."""

from __future__ import annotations

import asyncio
import random
import sys

from tests.surroundings import without_models

from sutazai.adapters.postgres.database import Database, open_database
from sutazai.adapters.postgres.messages import PostgresMessageStore
from sutazai.adapters.postgres.queue import PostgresQueue
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.ports.agent import TASK_PROCESSING, Agent, AgentContext
from sutazai.settings.secret import Secret
from sutazai.tasks.worker import Worker, WorkerRules
from sutazai.telemetry.logs import configure

TABLE = "CREATE TABLE account (task text PRIMARY KEY, fence integer NOT NULL, paid integer NOT NULL)"
ENTER = """
INSERT INTO account AS kept VALUES ($1, $2, 0)
ON CONFLICT (task) DO UPDATE SET fence = excluded.fence WHERE kept.fence < excluded.fence
"""
PAY = "UPDATE account SET paid = paid + 1 WHERE task = $1 AND fence = $2"
"""Whoever keeps the effect knows the highest fence, and refuses the others."""


def duellist(database: Database) -> Agent:
    """Enters the account and waits; tells, keeps and pays; and has a result."""

    async def run(context: AgentContext, pause_s: float) -> int:
        async with database.transaction() as connection:
            await connection.execute(ENTER, context.task.id, context.fence)
        await asyncio.sleep(pause_s)
        await context.progress({"by": context.fence})
        try:
            await context.checkpoint({"by": context.fence})
        finally:  # an agent that does not heed that it was called off
            async with database.transaction() as connection:
                await connection.execute(PAY, context.task.id, context.fence)
        return context.fence

    return Agent(
        name="duel",
        run=run,
        input_type=float,
        output_type=int,
        describes="Does all that an attempt can do.",
        queue=TASK_PROCESSING,
        max_attempts=1,
    )


async def main(url: str, name: str) -> None:
    """Work until killed."""
    configure(form="json", level="warning")
    async with open_database(Secret(url), timeout_s=10) as database:
        agent = duellist(database)
        queue = PostgresQueue(database)
        around = without_models(
            PostgresTaskStore(database, max_length=1000), PostgresMessageStore(database), {agent.name: agent}
        )
        rules = WorkerRules(name=name, slots={TASK_PROCESSING: 1})
        worker = Worker(queue, around, rules, mine=frozenset([agent.name]), random=random.random)
        async with asyncio.TaskGroup() as group:
            group.create_task(queue.run())
            group.create_task(worker.run())
            sys.stdout.write("works\n")
            sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
