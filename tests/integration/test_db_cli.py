"""`sutazai db` as a user runs it: its own process, over a real database."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.postgres_servers import PostgresServer, counting, streaming

import sutazai
from sutazai.adapters.objects.archive import archiving
from sutazai.adapters.objects.store import open_objects
from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import open_database
from sutazai.adapters.postgres.partitions import Partitions
from sutazai.adapters.postgres.task_changes import TaskChanges
from sutazai.core.task import Cancelled, Submitted, TaskDraft, task_id
from sutazai.settings.model import Objects

SOURCE = Path(sutazai.__file__).parents[1]
NAMES = [f"{one.revision}_{one.name}" for one in migrate.read()]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with streaming(replicas=0) as (alone,):
        yield alone


@pytest.fixture(scope="module")
def counter() -> Iterator[PostgresServer]:
    with counting() as server:
        yield server


def db(
    server: PostgresServer, *arguments: str, objects: Path = Path("/nowhere/objects")
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "sutazai", "db", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={
            "PYTHONPATH": str(SOURCE),
            "PATH": os.defpath,
            "HOME": "/nowhere",
            "SUTAZAI_DATABASE_URL": server.url.reveal(),
            "SUTAZAI_OBJECTS_URL": str(objects),
        },
        timeout=60,
    )


def ask(server: PostgresServer, statement: str) -> object:
    return asyncio.run(server.ask(statement))


def test_migrations_are_shown_then_applied_then_done(server: PostgresServer) -> None:
    shown = db(server, "migrate", "--dry-run")
    assert (shown.returncode, shown.stdout.split()) == (0, NAMES)
    assert shown.stderr == f"{len(NAMES)} migrations would be applied.\n"
    assert ask(server, "SELECT to_regclass('keys')::text") is None

    assert json.loads(db(server, "migrate", "--dry-run", "--json").stdout) == {"missing": NAMES}
    applied = db(server, "migrate", "--json")
    assert (applied.returncode, json.loads(applied.stdout)) == (0, {"applied": NAMES})
    assert ask(server, "SELECT to_regclass('keys')::text") == "keys"

    again = db(server, "migrate")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "The tables are up to date.\n")


def test_a_database_that_does_not_count_says_how_it_could(server: PostgresServer) -> None:
    done = db(server, "slow")

    assert (done.returncode, done.stdout) == (1, "")
    assert "does not count its statements" in done.stderr
    assert "shared_preload_libraries = 'pg_stat_statements'" in done.stderr


def test_slow_statements_are_a_table_or_json(counter: PostgresServer) -> None:
    ask(counter, "CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
    ask(counter, "SELECT\n    pg_sleep(0.15)")
    ask(counter, "SELECT 1")

    (found,) = json.loads(db(counter, "slow", "--json").stdout)
    assert found["statement"] == "SELECT pg_sleep($1)"
    assert found["calls"] == 1
    assert found["mean_ms"] > 100
    table = db(counter, "slow")
    assert (table.returncode, table.stderr) == (0, "")
    assert "MEAN MS" in table.stdout
    assert "pg_sleep" in table.stdout
    assert len(json.loads(db(counter, "slow", "--over-ms", "0", "--limit", "2", "--json").stdout)) == 2


@pytest.mark.parametrize("arguments", [("--limit", "0"), ("--over-ms", "-1"), ("--over-ms", "nan")])
def test_what_makes_no_sense_is_one_sentence(server: PostgresServer, arguments: tuple[str, str]) -> None:
    done = db(server, "slow", *arguments)

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_partitions_are_listed(server: PostgresServer) -> None:
    assert db(server, "migrate").returncode == 0
    asyncio.run(_tend(server))

    lines = db(server, "partitions").stdout.splitlines()
    (first, *_) = json.loads(db(server, "partitions", "--json").stdout)

    assert lines[0].split() == ["NAME", "FROM", "UNTIL", "BEFORE", "ROWS", "MIB"]
    assert lines[1].split()[:4] == ["events_2026_10", "2026-10-01", "2026-11-01", "0"]
    assert [line.split()[0] for line in lines[-2:]] == ["tasks_2026_12", "tasks_default"]
    assert (first["name"], first["belongs_to"]) == ("events_2026_10", "events")
    assert (first["begin"], first["end"]) == ("2026-10-01T00:00:00Z", "2026-11-01T00:00:00Z")


async def _tend(server: PostgresServer) -> None:
    async with open_database(server.url, timeout_s=10) as database:
        await Partitions(database, wall=lambda: datetime(2026, 10, 5, tzinfo=UTC)).tend()


def test_a_part_that_was_archived_is_read_back(server: PostgresServer, tmp_path: Path) -> None:
    assert db(server, "migrate").returncode == 0
    asyncio.run(_archive(server, tmp_path))

    done = db(server, "restore", "tasks_2020_03", objects=tmp_path)
    again = db(server, "restore", "tasks_2020_03", objects=tmp_path)
    missing = db(server, "restore", "tasks_2019_03", objects=tmp_path)

    assert (done.returncode, done.stdout) == (0, "archived_tasks_2020_03: 1 rows\n")
    assert ask(server, "SELECT count(*) FROM archived_tasks_2020_03") == 1
    assert again.returncode == 1
    assert "already exists" in again.stderr
    assert missing.stderr == (
        "The object store had no part 'tasks_2019_03' in its folder `archive`. Give the name of one.\n"
    )


async def _archive(server: PostgresServer, folder: Path) -> None:
    at = datetime(2020, 3, 1, tzinfo=UTC)
    async with open_database(server.url, timeout_s=10) as database:
        async with database.transaction() as connection:
            changes = TaskChanges(connection, database, at)
            task = task_id(at.timestamp(), 1)
            changes.submit(task, Submitted(TaskDraft(tenant="acme", agent="echo")))
            changes.apply(task, Cancelled())
            await changes.write()
        archive = functools.partial(archiving, open_objects(Objects(url=str(folder)), folder))
        await Partitions(database, keep_s=1, archive=archive).tend()
