"""`sutazai queues` as a user runs it: a process of its own, over a real database and a real broker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from tests.postgres_databases import fresh_database
from tests.rabbit_servers import PASSWORD, QUOTED, USER, Rabbits

import sutazai
from sutazai.adapters.postgres.stores import open_stores
from sutazai.adapters.rabbitmq.queue import open_rabbitmq
from sutazai.core.task import TaskDraft
from sutazai.ports.broadcasts import Source, encode
from sutazai.ports.queue import Message
from sutazai.settings.model import Database, Rabbitmq
from sutazai.settings.secret import Secret

pytestmark = pytest.mark.xdist_group("rabbitmq")

SOURCE = Path(sutazai.__file__).parents[1]
TASKS = "task_processing"

Run = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def settings(rabbit_node: Rabbits) -> Rabbitmq:
    """Queues of this test's own."""
    rabbit_node.restore()
    return rabbit_node.settings(prefix=uuid.uuid4().hex[:12])


@pytest.fixture
async def url(data_dir: Path) -> AsyncIterator[str]:
    async with fresh_database(data_dir) as address:
        yield address


@pytest.fixture
def run(url: str, tmp_path: Path) -> Run:
    """Run a command with a settings file; its exit code and what it wrote."""

    async def started(*words: str, broker: Rabbitmq | None = None) -> tuple[int, str, str]:
        config = tmp_path / "sutazai.toml"
        lines = [f'[database]\nurl = "{url}"']
        if broker is not None and broker.url is not None:
            lines.append(f'[rabbitmq]\nurl = "{broker.url.reveal()}"\nprefix = "{broker.prefix}"\ntimeout_s = 5')
        config.write_text("\n".join(lines))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "sutazai",
            *words,
            env={**os.environ, "PYTHONPATH": str(SOURCE), "SUTAZAI_CONFIG": str(config)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, said = await process.communicate()
        return process.returncode or 0, out.decode(), said.decode()

    return started


async def test_the_table_tells_what_waits_what_is_held_and_who_reads(url: str, run: Run) -> None:
    async with open_stores(Database(url=Secret(url)), Path("/nowhere")) as stores:
        await stores.tasks.submit([TaskDraft(tenant="acme", agent="a")] * 5)
        async with stores.queue.consume(TASKS, prefetch=2) as consumer:
            await stores.queue.tend()
            await consumer.take(2)
            code, out, _ = await run("queues", "list")

    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["QUEUE", "KIND", "WAITING", "HELD", "LATER", "CONSUMERS"],
        [TASKS, "table", "3", "2", "0", "1"],
    ]


async def test_the_queues_of_the_broker_come_after_the_table(settings: Rabbitmq, run: Run) -> None:
    async with open_rabbitmq(settings) as queue, queue.consume("llm_inference", prefetch=1):
        await queue.put([Message(task=f"task_{n:032x}", queue=TASKS, tenant="t", agent="a") for n in range(7)])
        await queue.events.append([b"{}"])
        code, out, _ = await run("queues", "list", "--json", broker=settings)

    assert code == 0
    found = {(each["name"], each["kind"], each["waiting"], each["consumers"]) for each in json.loads(out)}
    assert {(TASKS, "quorum", 7, 0), ("llm_inference", "quorum", 0, 1), ("dead_letters", "quorum", 0, 0)} <= found
    assert any(each["kind"] == "stream" for each in json.loads(out))


async def test_a_broker_that_is_away_is_told_after_the_table(url: str, run: Run) -> None:
    async with open_stores(Database(url=Secret(url)), Path("/nowhere")) as stores:
        await stores.tasks.submit([TaskDraft(tenant="acme", agent="a")])
    nobody = Rabbitmq(url=Secret(f"amqp://{USER}:{QUOTED}@127.0.0.1:1"))

    code, out, said = await run("queues", "list", broker=nobody)

    assert code == 1
    assert TASKS in out
    assert "127.0.0.1:1" in said
    assert PASSWORD not in said


@pytest.mark.parametrize("way", ["file", "standard input"])
async def test_a_real_broker_imports_what_was_printed(
    rabbit_node: Rabbits, settings: Rabbitmq, run: Run, way: str
) -> None:
    (node,) = rabbit_node.nodes
    code, out, _ = await run("queues", "definitions", broker=settings)
    if way == "file":
        await asyncio.to_thread(node.import_definitions, out.encode())
    else:
        await asyncio.to_thread(node.control, "import_definitions", given=out)

    listed = await asyncio.to_thread(node.control, "list_queues", "name", "type", "--no-table-headers")
    kinds = dict(line.split("\t") for line in listed.splitlines() if line.startswith(settings.prefix))
    assert code == 0
    assert kinds == {
        f"{settings.prefix}.{name}": kind
        for name, kind in {TASKS: "quorum", "llm_inference": "quorum", "dead_letters": "quorum"}.items()
    } | {f"{settings.prefix}.agent_coordination": "stream"}


async def test_no_secret_is_in_the_definitions(settings: Rabbitmq, run: Run) -> None:
    _, out, said = await run("queues", "definitions", broker=settings)

    for secret in (PASSWORD, QUOTED, USER):
        assert secret not in out + said
    assert set(json.loads(out)) == {"vhosts", "queues", "exchanges", "bindings"}


async def test_definitions_need_no_broker_and_no_settings(run: Run) -> None:
    code, out, _ = await run("queues", "definitions")

    assert code == 0
    assert [each["name"] for each in json.loads(out)["queues"]] == [
        TASKS,
        "llm_inference",
        "dead_letters",
        "agent_coordination",
    ]


async def test_the_stream_is_printed_as_lines_of_json(settings: Rabbitmq, url: str, tmp_path: Path) -> None:
    assert settings.url is not None
    config = tmp_path / "sutazai.toml"
    config.write_text(f'[rabbitmq]\nurl = "{settings.url.reveal()}"\nprefix = "{settings.prefix}"')
    async with open_stores(Database(url=Secret(url)), Path("/nowhere")) as stores, open_rabbitmq(settings) as queue:
        tasks = await stores.tasks.submit([TaskDraft(tenant="acme", agent="a")] * 3)
        page = await stores.broadcasts[0].notices(Source.EVENTS, after=0, limit=10)
        await queue.events.append([*encode(page.notices, max_bytes=10), b"theirs", *encode(page.notices, max_bytes=10)])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sutazai", "queues", "tail", "--all"),
        env={**os.environ, "PYTHONPATH": str(SOURCE), "SUTAZAI_CONFIG": str(config)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    printed = [json.loads(await process.stdout.readline()) for _ in tasks]
    said = await process.stderr.readline()
    process.send_signal(signal.SIGINT)
    rest, _ = await process.communicate()

    assert [(line["type"], line["task"], line["version"]) for line in printed] == [
        ("event", task.id, 1) for task in tasks
    ]
    assert b"none of ours" in said
    assert (rest, process.returncode) == (b"", 0)


async def test_without_a_broker_there_is_no_stream(run: Run) -> None:
    code, _, said = await run("queues", "tail")

    assert code == 1
    assert "events tail" in said


async def test_a_wrong_command_line_is_told_in_a_sentence(run: Run) -> None:
    code, out, said = await run("queues", "list", "--frequency", "7")

    assert code != 0
    assert "frequency" in out + said
