"""The plan of every statement that tasks wait for, on a database with a million of them."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any

import asyncpg
import pytest
from tests.postgres_servers import embedded

from sutazai.adapters.postgres import migrate, statements
from sutazai.adapters.postgres.database import open_database
from sutazai.adapters.postgres.partitions import Partitions
from sutazai.core.task import TaskStatus, created_at_of, id_of
from sutazai.settings.secret import Secret

pytestmark = [pytest.mark.alone, pytest.mark.deadline(120)]

TASKS = 1_000_000
WORDS = 50_000
"""Rows of `dispatch`."""
BEGIN = datetime(2026, 9, 2, tzinfo=UTC)
NOW = datetime(2026, 11, 30, tzinfo=UTC)
FEW = 1000
"""A table of fewer rows, such as the partition of next month, is read as a whole with good reason."""
AT_ONCE = 50
FILL_S = 110.0

# ruff: noqa: S608 - constants
FILL = f"""
SET synchronous_commit = off; SET session_replication_role = replica; SET maintenance_work_mem = '128MB';
INSERT INTO tenants (name, weight, priority, limits) SELECT 't' || n, 1 + n % 3, 'normal', '{{}}'
FROM generate_series(0, 99) AS n;
CREATE TEMP TABLE aside AS SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition
FROM pg_index WHERE indrelid IN ('tasks'::regclass, 'events'::regclass) AND NOT indisprimary;
DO $$ DECLARE one record; BEGIN
    FOR one IN SELECT * FROM aside LOOP EXECUTE 'DROP INDEX ' || one.name; END LOOP;
END $$;
CREATE TEMP TABLE made AS
SELECT n, at, 't' || n % 100 AS tenant,
    (lpad(to_hex((1000 * extract(epoch FROM at))::bigint), 12, '0') || '70008' || lpad(to_hex(n), 15, '0'))::uuid AS id
FROM generate_series(1, {TASKS}) AS n,
    LATERAL (SELECT '{BEGIN.isoformat()}'::timestamptz + n * interval '7.5 s' AS at) AS times;
INSERT INTO tasks (id, created_at, tenant, user_id, agent, queue, status, priority, parent, draft, version, attempts,
    deliveries, run_at, deadline, started_at, ended_at)
SELECT made.id, at, tenant, CASE WHEN n % 4 = 0 THEN '' ELSE 'u' || n % 5000 END, 'agent' || n % 12, 'task_processing',
    CASE WHEN n > {TASKS} - 200 THEN 'processing' WHEN n > {TASKS} - 5000 THEN 'pending'
        WHEN n % 1000 = 0 THEN 'waiting' WHEN n % 50 = 1 THEN 'failed' WHEN n % 100 = 2 THEN 'cancelled'
        ELSE 'completed' END,
    n % 3, CASE WHEN n % 20 = 0 THEN parents.id END, '{{"tenant": "t", "agent": "a"}}', 3, 1, 1, at,
    CASE WHEN n % 30 = 0 THEN at + interval '1 day' END, at, at + interval '2 s'
FROM made, LATERAL (SELECT md5((n / 200)::text)::uuid AS id) AS parents;
INSERT INTO events (task, version, tenant, kind, schema, at, data, created_at)
SELECT id, 1, tenant, 'submitted', 1, at, '{{}}', at FROM made;
INSERT INTO task_keys SELECT tenant, 'key' || n, id FROM made WHERE n % 10 = 0;
INSERT INTO task_waits SELECT id, md5(n::text)::uuid, true FROM made WHERE n % 50 = 0;
INSERT INTO dispatch_consumers (id) SELECT md5(n::text)::uuid FROM generate_series(1, 20) AS n;
INSERT INTO dispatch_turns SELECT 'task_processing', 't' || n, n FROM generate_series(0, 99) AS n;
INSERT INTO dispatch (queue, task, tenant, agent, priority, turn, is_due, available_at, consumer)
SELECT 'queue' || n % 4, id, tenant, 'a', n % 3, n, n % 3 > 0, at,
    CASE WHEN n % 100 = 1 THEN md5((n % 20 + 1)::text)::uuid END
FROM made WHERE n <= {WORDS};
DO $$ DECLARE one record; BEGIN
    FOR one IN SELECT * FROM aside LOOP EXECUTE replace(one.definition, ' ON ONLY ', ' ON '); END LOOP;
END $$;
DROP TABLE made, aside;
ANALYZE
"""

NAMES = statements.parse(files("sutazai.adapters.postgres").joinpath("statements_tasks.sql").read_text("utf-8"))
WITHOUT_TABLES = {
    "lock_message_name",
    "lock_refill",
    "newest_position",
    "newest_message",
    "tell_queues",
    "writers",
    "time_now",
}
"""These read none, or those of PostgreSQL alone."""
SMALL = {"all_beats", "worker_beats"}
"""These read a table as a whole that has a row for each worker."""

Cases = Mapping[str, Sequence[Sequence[Any]]]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with embedded() as (url, _):
        asyncio.run(_fill(url))
        yield url


async def _fill(url: str) -> None:
    async with open_database(Secret(url), timeout_s=20) as database:
        await migrate.migrate(database, migrate.read())
        await Partitions(database, wall=lambda: BEGIN).tend()
    connection: Any = await asyncpg.connect(url)
    try:
        await connection.execute(FILL, timeout=FILL_S)
    finally:
        await connection.close()


@pytest.fixture
async def connection(server: str) -> AsyncIterator[Any]:
    made: Any = await asyncpg.connect(server)
    yield made
    await made.close()


async def cases(connection: Any) -> Cases:
    """For each statement, arguments as the program gives them."""
    newest = await connection.fetch(f"SELECT id FROM tasks ORDER BY id DESC LIMIT {AT_ONCE}")
    oldest = await connection.fetch("SELECT id FROM tasks ORDER BY id LIMIT 2")
    ids = [row["id"] for row in (*newest, *oldest)]
    at = [created_at_of(id_of(one)) for one in ids]
    one = [ids[:1], at[:1]]
    many = [ids, at]
    size = len(ids)
    new = [uuid.uuid4() for _ in ids]
    consumer = uuid.uuid4()
    rows = list(range(1, AT_ONCE))

    def columns(*values: object) -> list[list[object]]:
        return [[value] * size for value in values]

    return {
        "claim_task_keys": [[["t1"], ["fresh"], new[:1]], [*columns("t1", "fresh"), new]],
        "tasks_of_keys": [[["t1"], ["key10"]], columns("t1", "key10")],
        "submit_tasks": [
            [
                *[new, *columns("t1", "u", "a", "q", 1, None, "{}", 0, None, None)],
                *[NOW, NOW, "task.submitted", 1, [], []],
            ],
            [
                *[new, *columns("t1", "u", "a", "q", 1, None, "{}", 0, None, None)],
                *[NOW, NOW, "task.submitted", 1, ["q"], [consumer]],
            ],
        ],
        "lock_tasks": [one, many],
        "lock_more_tasks": [one, many],
        "tasks_by_id": [[None, *one], ["t1", *one], ["t1", *many]],
        "task_versions": [one, many],
        "tasks_page": [
            [tenant, before, status, agent, parent, user, limit]
            for tenant in (None, "t1")
            for before in (None, ids[-1], ids[0])
            for status in (None, *map(str, TaskStatus))
            for agent in ("", "agent1")
            for parent in (None, ids[0])
            for user in ("", "u5")
            for limit in (20, 1000)
        ],
        "change_tasks": [
            [
                *many,
                *columns(3, "processing", NOW, 1, 1, 0, 0, "w", False, "", "", "", "", None, "", 0, NOW, None),
                *columns("t1", "started", 1, "{}"),
                *[NOW, ""],
            ],
            [*one, [3], ["processing"], *[[]] * 16, ["t1"], ["started"], [1], ["{}"], NOW, ""],
        ],
        "add_events": [[*many, *columns(3, "t1", "started", 1, "{}"), NOW]],
        "called_off": [[*one, [1]], [*many, [1] * size]],
        "past_deadline": [[NOW, 100], [BEGIN, 100]],
        "waiting_of_tenant": [["t1", 10_000], ["nobody", 10_000], ["t1", 1]],
        "unfinished_children": [[ids[:1]], [ids]],
        "add_waits": [[new, ids, [True] * size]],
        "end_waits": [[ids[:1]], [ids]],
        "events_of_task": [[ids[0], at[0], 0, tenant, 100] for tenant in (None, "t1")],
        "tail_events": [[TASKS - 500, 1000, TASKS], [0, 1000, TASKS]],
        "put_dispatch": [
            [["queue1"], new[:1], ["t1"], ["a"], [1], [NOW], NOW],
            [*columns("queue1"), new, *columns("t1", "a", 1, NOW), NOW],
        ],
        "take_dispatch": [["queue1", limit, consumer] for limit in (1, 32)],
        "passed_over_dispatch": [[["queue1"], NOW], [["queue1", "queue2"], BEGIN]],
        "take_passed_over_dispatch": [["queue1", limit, consumer, NOW] for limit in (1, 3)],
        "free_unknown_dispatch": [[consumer, []], [consumer, rows]],
        "ack_dispatch": [[rows[:1], consumer], [rows, consumer]],
        "hand_back_dispatch": [[rows[:1], consumer], [rows, consumer]],
        "leave_dispatch": [[consumer]],
        "ripe_dispatch": [[NOW, 1000], [BEGIN - timedelta(days=1), 1000]],
        "depth_dispatch": [["queue1", 100_000], ["other", 100]],
        "enter_consumer": [[consumer, "queue1"]],
        "beat_consumer": [[consumer]],
        "drop_consumers": [[[consumer]]],
        "free_dispatch": [[]],
        "send_message": [["t1", "n", "s", "{}"]],
        "received_messages": [["t1", "n", 0]],
        "broadcast_events": [[TASKS - 500, 256, TASKS, 65_536], [0, 256, TASKS, 65_536]],
        "broadcast_messages": [[0, 64, 1000]],
        "broadcast": [["events"]],
        "take_broadcast": [["events", 1, 1]],
        "advance_broadcast": [["events", 1, 1]],
        "leave_broadcast": [["events", 1]],
        "beat_worker": [["w"]],
        "forget_workers": [[["w"], [1]]],
        "tasks_under_way": [[["w"], 500], [["w", "v"], 1]],
        "count_without_word": [["task_processing", NOW, 100_000], ["queue1", NOW, 100], ["queue1", BEGIN, 100_000]],
        "refill_dispatch": [["task_processing", NOW, 100_000], ["queue1", NOW, 1]],
    }


async def test_every_statement_of_tasks_has_a_case(connection: Any) -> None:
    assert set(await cases(connection)) | WITHOUT_TABLES | SMALL == set(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES.keys() - WITHOUT_TABLES - SMALL))
async def test_no_statement_reads_a_large_table_from_end_to_end(connection: Any, name: str) -> None:
    large = {
        row["relname"]
        for row in await connection.fetch(f"SELECT relname FROM pg_class WHERE relkind = 'r' AND reltuples >= {FEW}")
    }
    assert {"tasks_2026_09", "tasks_2026_11", "events_2026_10", "dispatch", "task_keys", "task_waits"} <= large

    for arguments in (await cases(connection))[name]:
        found = await custom_plan(connection, name, arguments)
        assert not scanned(found) & large, (arguments, json.dumps(found, indent=1))
    found = await generic_plan(connection, name)
    assert not scanned(found) & large, json.dumps(found, indent=1)


async def custom_plan(connection: Any, name: str, arguments: Sequence[Any]) -> Any:
    """How it would run with these arguments."""
    return json.loads(await connection.fetchval(f"EXPLAIN (FORMAT JSON) {NAMES[name]}", *arguments))


async def generic_plan(connection: Any, name: str) -> Any:
    """How it would run with any, once it was run often."""
    statement = await connection.prepare(NAMES[name])
    arguments = ", ".join(["NULL"] * len(statement.get_parameters()))
    await connection.execute(f"PREPARE asked AS {NAMES[name]}; SET plan_cache_mode = force_generic_plan")
    try:
        asked = f"asked({arguments})" if arguments else "asked"
        return json.loads(await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE {asked}"))
    finally:
        await connection.execute("DEALLOCATE asked; RESET plan_cache_mode")


def scanned(node: Any) -> set[str]:
    """The tables that a plan reads from end to end."""
    if isinstance(node, list):
        return set().union(*map(scanned, node))
    if not isinstance(node, dict):
        return set()
    here = {str(node["Relation Name"])} if node.get("Node Type") == "Seq Scan" else set()
    return here.union(*map(scanned, node.values()))
