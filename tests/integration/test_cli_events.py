"""`sutazai events` as a user runs it: a process of its own, over a real database."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import zstandard
from tests.postgres_servers import embedded

import sutazai
from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import open_database
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.core.task import Task, TaskDraft
from sutazai.settings.secret import Secret

SOURCE = Path(sutazai.__file__).parents[1]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with embedded() as (url, _):
        yield url


async def _prepared(url: str) -> list[Task]:
    connection: Any = await asyncpg.connect(url)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.close()
    async with open_database(Secret(url), timeout_s=20) as database:
        await migrate.migrate(database, migrate.read())
        store = PostgresTaskStore(database, max_length=100, wall=lambda: datetime.now(UTC))
        tasks = await store.submit([TaskDraft(tenant="acme", agent="echo") for _ in range(3)])
        await store.cancel("acme", tasks[0].id)
    return list(tasks)


@pytest.fixture
def tasks(server: str) -> list[Task]:
    """Three tasks, of which the first is cancelled."""
    return asyncio.run(_prepared(server))


def arguments(*words: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "sutazai", "events", *words]


def environment(server: str) -> dict[str, str]:
    return {"PYTHONPATH": str(SOURCE), "PATH": os.defpath, "SUTAZAI_DATABASE_URL": server}


def events(server: str, *words: str, folder: Path = Path("/")) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments(*words), capture_output=True, text=True, check=False, cwd=folder, env=environment(server), timeout=60
    )


async def _execute(url: str, statement: str) -> None:
    connection: Any = await asyncpg.connect(url)
    await connection.execute(statement)
    await connection.close()


def test_whole_events_are_verified_and_replayed(server: str, tasks: list[Task]) -> None:
    verified = events(server, "verify", "--json")
    replayed = events(server, "replay")

    assert (verified.returncode, replayed.returncode) == (0, 0), verified.stderr + replayed.stderr
    assert json.loads(verified.stdout)["statuses"]["cancelled"] == 1
    assert "4 events of 3 tasks" in verified.stderr
    assert "all whole" in replayed.stderr
    assert "pending      2" in replayed.stdout


def test_a_spoiled_task_is_named_and_the_exit_code_tells(server: str, tasks: list[Task]) -> None:
    asyncio.run(_execute(server, "UPDATE tasks SET tokens = 9 WHERE status = 'cancelled'"))

    verified = events(server, "verify")
    replayed = events(server, "replay", "--json")

    assert (verified.returncode, replayed.returncode) == (1, 1)
    assert f"{tasks[0].id}: Its events gave another tokens than was kept." in verified.stderr
    assert json.loads(replayed.stdout)["comparison"]["differing"] == [tasks[0].id]


def test_one_task_is_shown_as_it_stood(server: str, tasks: list[Task]) -> None:
    shown = events(server, "replay", "--task", tasks[0].id, "--json")
    before = events(server, "replay", "--task", tasks[0].id, "--until", "2020-01-01")
    wrong = events(server, "replay", "--until", "yesterday")

    assert json.loads(shown.stdout)["status"] == "cancelled"
    assert (before.returncode, wrong.returncode) == (1, 1)
    assert "had no events by then" in before.stderr
    assert "Write it like" in wrong.stderr


def test_events_are_exported_as_lines_of_json(server: str, tasks: list[Task], tmp_path: Path) -> None:
    packed = events(server, "export", "all.ndjson.zst", folder=tmp_path)
    plain = events(server, "export")

    assert packed.returncode == 0, packed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["all.ndjson.zst"]
    with zstandard.open(tmp_path / "all.ndjson.zst", "rt") as lines:
        unpacked = lines.read()
    assert unpacked == plain.stdout
    told = [json.loads(line) for line in unpacked.splitlines()]
    assert [one["kind"] for one in told] == ["task.submitted"] * 3 + ["task.cancelled"]
    assert told[0]["data"]["draft"]["agent"] == "echo"


async def test_the_tail_follows_until_it_is_interrupted(server: str) -> None:
    made = await _prepared(server)
    process = await asyncio.create_subprocess_exec(
        *arguments("tail", "--after", "0", "--json"),
        env=environment(server),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        seen = [json.loads(await process.stdout.readline()) for _ in range(4)]
        async with open_database(Secret(server), timeout_s=20) as database:
            await PostgresTaskStore(database, max_length=100).cancel("acme", made[1].id)
        seen.append(json.loads(await process.stdout.readline()))
        process.send_signal(2)
        _, stderr = await process.communicate()

    assert seen[-1]["task"] == made[1].id
    assert (process.returncode, stderr) == (0, b"")
