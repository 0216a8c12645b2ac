"""Tables that have grown much since PostgreSQL looked at them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tests.postgres_databases import fresh_database
from tests.redis_servers import eventually

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import Database, open_database
from sutazai.adapters.postgres.grown import analyse_grown
from sutazai.adapters.postgres.queue import PostgresQueue
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.core.task import TaskDraft, created_at_of, digits_of
from sutazai.settings.secret import Secret

DRAFT = TaskDraft(tenant="acme", agent="echo", queue="q", input='{"text":"' + 500 * "x" + '"}')
MANY = 4000
LIMIT_S = 20.0
BY_ID = "(id = asked.id)"
"""In the condition of an index; another plan compares each task."""


@pytest.fixture
async def url(data_dir: Path) -> AsyncIterator[str]:
    async with fresh_database(data_dir) as address:
        yield address


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    async with open_database(Secret(url), timeout_s=LIMIT_S) as opened:
        await migrate.migrate(opened, migrate.read())
        async with opened.statement() as connection:  # or PostgreSQL might be faster
            await connection.execute("ALTER TABLE dispatch SET (autovacuum_enabled = false)")
            for row in await connection.fetch("SELECT inhrelid::regclass::text AS name FROM pg_inherits"):
                if row["name"].startswith(("tasks_", "events_")) and not row["name"].endswith(("_idx", "_pkey")):
                    await connection.execute(f"ALTER TABLE {row['name']} SET (autovacuum_enabled = false)")
        yield opened


@asynccontextmanager
async def tended(queue: PostgresQueue) -> AsyncIterator[None]:
    running = asyncio.create_task(queue.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait([running])


async def submit(store: PostgresTaskStore) -> str:
    """Many tasks; the id of one."""
    made = await store.submit([DRAFT] * MANY)
    return made[0].id


async def test_those_that_have_grown_are_analysed_and_only_once(database: Database) -> None:
    store = PostgresTaskStore(database, max_length=10 * MANY)
    assert await analyse_grown(database) == []

    await submit(store)
    grown = await analyse_grown(database)

    assert {name.split("_")[0] for name in grown} == {"tasks", "events", "dispatch"}
    assert await analyse_grown(database) == []


async def test_while_one_process_looks_the_others_do_not(database: Database) -> None:
    await submit(PostgresTaskStore(database, max_length=10 * MANY))

    async with database.transaction() as connection:
        await connection.execute(database.sql["take_grown_turn"])
        assert await analyse_grown(database) == ()

    assert await analyse_grown(database) != ()


async def test_a_plan_that_was_made_for_few_tasks_is_thrown_away_by_whoever_tends_the_queue(
    database: Database, url: str
) -> None:
    """Without it each start would read all tasks that there are, until PostgreSQL looked by itself."""
    queue = PostgresQueue(database)
    store = PostgresTaskStore(database, max_length=10 * MANY, queue=queue)
    connection: Any = await asyncpg.connect(url)
    await connection.execute("SET plan_cache_mode = force_generic_plan")
    await connection.execute("PREPARE locking (uuid[], timestamptz[]) AS " + database.sql["lock_tasks"])

    async def plan(task: str) -> str:
        at = created_at_of(task).isoformat()
        explained = f"EXPLAIN (COSTS OFF) EXECUTE locking ('{{{digits_of(task)}}}', '{{\"{at}\"}}')"
        return "\n".join(row[0] for row in await connection.fetch(explained))

    [first] = await store.submit([DRAFT])
    before = await plan(first.id)
    async with tended(queue):
        task = await submit(store)

        async def is_found_by_its_id() -> bool:
            return BY_ID in await plan(task)

        assert BY_ID not in before
        await eventually(is_found_by_its_id, LIMIT_S)
    await connection.close()
