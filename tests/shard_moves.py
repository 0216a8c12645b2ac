"""What tests of moves between two shards share: a tenant with something in every table, and a look at all of it."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
from tests.shards import tenant_of

from sutazai.adapters.postgres.sharded.moving import Moved, Mover
from sutazai.adapters.postgres.sharded.rows import TABLES
from sutazai.adapters.postgres.sharded.shards import Shards
from sutazai.adapters.postgres.sharded.tasks import ShardedTaskStore
from sutazai.adapters.postgres.stores import Stores
from sutazai.core.file import File
from sutazai.core.schedule import Schedule
from sutazai.core.session import Message, Session
from sutazai.core.task import Completed, Task, TaskDraft
from sutazai.policy.sharding import slot_of
from sutazai.ports.tasks import Change, Start, TaskFilter

MOVED = tenant_of(1)
"""In the shard `odd` at first."""
NEIGHBOUR = tenant_of(1, 1)
NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
STEPS = ("begun", "expected", "copied", "fenced", "compared", "owned", "given", "tidied")
ALL_TABLES = ("tasks", "events", *(kept.table for kept in TABLES))
QUEUE = "task_processing"


def shards_of(stores: Stores) -> Shards:
    assert isinstance(stores.tasks, ShardedTaskStore)
    return stores.tasks._shards


def mover_of(stores: Stores, **options: Any) -> Mover:
    shards = shards_of(stores)
    return Mover(shards.databases["even"], shards, **options)


async def moved(mover: Mover, *, source: str = "odd", target: str = "even") -> Moved:
    return await mover.move([slot_of(MOVED)], source=source, target=target)


async def filled(stores: Stores, tenant: str) -> None:
    """Something in every table."""
    drafts = [
        TaskDraft(tenant=tenant, agent="echo", input='{"text": "Grüße \\u0000"}', webhook="https://example.org/x")
    ]
    first, second, third = await stores.tasks.submit(3 * drafts)
    await stores.tasks.submit([replace(drafts[0], idempotency_key="once"), replace(drafts[0], after=(first.id,))])
    starts = [Start(task=one.id, may_take_over=False) for one in (second, third)]
    await stores.tasks.begin(starts, worker="w", delivery_limit=5)
    await stores.tasks.change([Change(task=second.id, event=Completed(1, '"done"'))])
    await stores.files.add(
        File(id=f"file-{tenant}", tenant=tenant, name="a", purpose="batch", size_bytes=7, created_at=NOW), at_most=9
    )
    await stores.messages.send(tenant, "anna", sender="bert", body='"one"')
    session = Session(
        id=f"sess_{tenant}", tenant=tenant, model="m", system="", metadata={"a": "b"}, ttl_s=1e9, created_at=NOW,
        expires_at=datetime.now(UTC) + timedelta(days=9), version=0, messages=0,
    )  # fmt: skip
    await stores.sessions.create(session, at_most=9)
    said = [Message(number=one, role="user", tokens=1, body=b'{"content": "\xc3\xbc"}') for one in (1, 2)]
    await stores.sessions.append(replace(session, version=1, messages=2), [], said)
    schedule = Schedule(
        id=f"sched_{slot_of(tenant):032x}", tenant=tenant, cron="0 8 * * *", timezone="UTC", draft=drafts[0],
        created_at=NOW, due_at=datetime.now(UTC) + timedelta(days=1),
    )  # fmt: skip
    await stores.schedules.add(schedule, at_most=9)


async def seen(stores: Stores, tenant: str) -> Mapping[str, object]:
    """What a client can see of it, and workers too."""
    tasks = await stores.tasks.page(tenant, TaskFilter(), limit=1000)
    session = await stores.sessions.get(tenant, f"sess_{tenant}")
    return {
        "tasks": tasks,
        "events": [
            [replace(event, position=0) for event in await stores.tasks.events(tenant, task.id, limit=1000)]
            for task in tasks
        ],
        "files": await stores.files.page(tenant, purpose="", after="", is_oldest_first=True, limit=100),
        "messages": await stores.messages.received(tenant, "anna", after=0),
        "session": session,
        "history": session and await stores.sessions.history(session),
        "schedules": await stores.schedules.page(tenant, limit=100),
    }


async def rows(url: str, slot: int) -> Mapping[str, int]:
    """How many rows of a slot each table of a database has."""
    whose = {
        "task_waits": "sutazai_slot(waits_for)",
        "webhooks": "sutazai_slot(task)",
        "session_messages": "(SELECT sutazai_slot(tenant) FROM sessions WHERE id = session_id)",
    }
    connection: Any = await asyncpg.connect(url)
    try:
        return {
            table: await connection.fetchval(
                f"SELECT count(*) FROM {table} WHERE {whose.get(table, 'sutazai_slot(tenant)')} = $1",  # noqa: S608
                slot,
            )
            for table in ALL_TABLES
        }
    finally:
        await connection.close()


async def kill_after(step: str, urls: Sequence[str]) -> None:
    """Move the slot in a process of its own, which dies by kill -9 after that step."""
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.shard_mover", *urls, str(slot_of(MOVED)), "odd", "even", step
    )
    assert await program.wait() == -signal.SIGKILL


async def tasks_of(stores: Stores) -> Sequence[Task]:
    return await stores.tasks.page(MOVED, TaskFilter(), limit=1000)


async def all_done(stores: Stores, *, count: int) -> Sequence[Task]:
    """Do tasks until there were so many that were not begun before."""
    done: list[Task] = []
    async with stores.queue.consume(QUEUE, prefetch=5) as consumer:
        while len(done) < count:
            deliveries = await consumer.take(5)
            starts = [Start(task=one.message.task, may_take_over=one.is_redelivered) for one in deliveries]
            begun = await stores.tasks.begin(starts, worker="w", delivery_limit=50)
            tasks = [one for one in begun if isinstance(one, Task)]
            ends = [Change(task=one.id, event=Completed(one.deliveries, "1")) for one in tasks]
            done += [one for one in await stores.tasks.change(ends) if one is not None]
            await consumer.ack(deliveries)
    return done
