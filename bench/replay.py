"""
How fast a million events are made into tasks again: `python -m bench.replay --events 1000000`.

A PostgreSQL of its own is filled by COPY with tasks of four and five events, a few of them with retries, and every row
is the fold of its events. Then `replay` and `verify` of `sutazai.tasks.replay` are timed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import Database, open_database
from sutazai.adapters.postgres.embedded import EmbeddedPostgres
from sutazai.adapters.postgres.replay import COLUMNS, PostgresReplayStore, row_of
from sutazai.core.task import (
    Completed,
    Event,
    Failed,
    FailureReason,
    Progressed,
    Retried,
    Started,
    Submitted,
    Task,
    TaskDraft,
    after,
    task_id,
    uuid_of,
)
from sutazai.ports.task_events import encode
from sutazai.settings.secret import Secret
from sutazai.tasks.replay import replay, verify

Row = tuple[object, ...]
EVENT_COLUMNS = ("task", "version", "tenant", "kind", "schema", "at", "data", "created_at")
START = datetime(2026, 1, 1, tzinfo=UTC)
BATCH = 20_000


def story(dice: random.Random) -> list[Event]:
    """What happens to one task."""
    draft = TaskDraft(
        tenant=f"tenant-{dice.randrange(20)}", agent="summarise", input='{"text": "' + "word " * 30 + '"}'
    )
    events: list[Event] = [Submitted(draft), Started("worker-1", 1)]
    if dice.random() < 0.2:
        events += [Retried(1, FailureReason.ERROR, "The model did not answer.", START), Started("worker-2", 2)]
    fence = sum(isinstance(event, Started) for event in events)
    events.append(Progressed(fence, '{"done": 0.5}'))
    if dice.random() < 0.05:
        return [*events, Failed(fence, FailureReason.ERROR, "It broke.", 100)]
    return [*events, Completed(fence, '{"summary": "' + "word " * 20 + '"}', tokens=300)]


def made(count: int) -> Iterator[tuple[list[Row], Row]]:
    """Rows of events, and the row of their task."""
    dice = random.Random(7)
    written, at = 0, START
    while written < count:
        at += timedelta(milliseconds=20)
        new = task_id(at.timestamp(), dice.getrandbits(62))
        task: Task | None = None
        rows: list[Row] = []
        for event in story(dice):
            task = after(task, event, id=new, at=at)
            kind, schema, data = encode(event)
            rows.append((uuid_of(new), task.version, task.draft.tenant, kind, schema, at, data, task.created_at))
        assert task is not None
        written += len(rows)
        yield rows, row_of(task, msgspec.json.encode(task.draft).decode())


async def fill(database: Database, count: int) -> None:
    async with database.transaction(within_s=3600) as connection:
        events: list[Row] = []
        tasks: list[Row] = []

        async def flush() -> None:
            await connection.copy_records_to_table("events", records=events, columns=EVENT_COLUMNS, timeout=600)
            await connection.copy_records_to_table("tasks", records=tasks, columns=COLUMNS, timeout=600)
            events.clear()
            tasks.clear()

        for rows, task in made(count):
            events += rows
            tasks.append(task)
            if len(events) >= BATCH:
                await flush()
        await flush()
        await connection.execute("ANALYZE events; ANALYZE tasks", timeout=600)


async def measure(url: str, count: int) -> None:
    async with open_database(Secret(url), timeout_s=60) as database:
        await migrate.migrate(database, migrate.read())
        began = time.perf_counter()
        await fill(database, count)
        print(f"filled in {time.perf_counter() - began:.1f} s")
        store = PostgresReplayStore(database)
        began = time.perf_counter()
        async with store.session() as session:
            found = await replay(session, until=None, note=lambda _: None)
        took_s = time.perf_counter() - began
        assert found.is_whole, found.plain()
        print(f"replay: {found.events:,} events, {found.tasks:,} tasks, {took_s:.1f} s, {found.events / took_s:,.0f}/s")
        began = time.perf_counter()
        async with store.session() as session:
            found = await verify(session, note=lambda _: None)
        took_s = time.perf_counter() - began
        assert found.is_whole, found.plain()
        print(f"verify: {found.events:,} events, {took_s:.1f} s, {found.events / took_s:,.0f}/s")
        print(f"memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB at most")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=1_000_000)
    count = parser.parse_args().events
    server = EmbeddedPostgres()
    with tempfile.TemporaryDirectory(prefix="sutazai-") as folder:
        url = asyncio.run(server.start(Path(folder)))
        try:
            asyncio.run(measure(url, count))
        finally:
            asyncio.run(server.stop())
    return 0


if __name__ == "__main__":
    sys.exit(main())
