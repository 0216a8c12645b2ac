"""What was acknowledged is done, whoever is killed or stalled meanwhile, and its effect takes place once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from tests.postgres_databases import fresh_database
from tests.rabbit_servers import Rabbits
from tests.redis_servers import eventually
from tests.worker_kills import SLOTS, kill_workers

from sutazai.adapters.postgres.embedded import EmbeddedPostgres
from sutazai.adapters.postgres.stores import Stores, open_stores
from sutazai.core.task import Task, TaskDraft, TaskStatus
from sutazai.settings.model import Database
from sutazai.settings.secret import Secret

ROOT = Path(__file__).parents[2]
TASKS = 1000
PAUSE_S = "0.05"

pytestmark = [pytest.mark.alone, pytest.mark.deadline(150)]


class Workers:
    """Worker processes that can be hurt."""

    def __init__(self, url: str, data_dir: Path, *broker: str) -> None:
        self._url = url
        self._data_dir = data_dir
        self._broker = broker
        self._started = 0
        self.alive: list[asyncio.subprocess.Process] = []

    async def start(self) -> asyncio.subprocess.Process:
        """One more, once it works."""
        self._started += 1
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.task_worker",
            self._url,
            str(self._data_dir),
            f"worker-{self._started}",
            *self._broker,
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        self.alive.append(process)
        assert process.stdout is not None
        assert await process.stdout.readline() == b"works\n"
        return process

    async def kill(self, process: asyncio.subprocess.Process) -> None:
        """SIGKILL."""
        self.alive.remove(process)
        process.kill()
        await process.wait()


@asynccontextmanager
async def workers(url: str, data_dir: Path, *broker: str) -> AsyncIterator[Workers]:
    """No process is left over. With the address of a broker, and a prefix, the workers read that."""
    made = Workers(url, data_dir, *broker)
    try:
        yield made
    finally:
        for process in list(made.alive):
            await made.kill(process)


@pytest.fixture
async def url(data_dir: Path) -> AsyncIterator[str]:
    """A database with a table of effects."""
    async with fresh_database(data_dir) as address:
        connection = await asyncpg.connect(address)
        await connection.execute("CREATE TABLE effects (task text PRIMARY KEY, fence integer NOT NULL)")
        await connection.close()
        yield address


async def submitted(stores: Stores) -> list[Task]:
    draft = TaskDraft(tenant="acme", agent="effect", input=PAUSE_S, max_attempts=50)
    return [task for _ in range(10) for task in await stores.tasks.submit([draft] * (TASKS // 10))]


async def counts(url: str) -> dict[str, int]:
    async with asyncio.timeout(5):
        connection = await asyncpg.connect(url)
        try:
            rows = await connection.fetch("SELECT status, count(*) FROM tasks GROUP BY status")
            effects = await connection.fetchval("SELECT count(*) FROM effects")
            return {**dict(rows), "effects": effects}
        finally:
            connection.terminate()  # a server that was killed does not say goodbye


async def all_have_ended(url: str) -> bool:
    found = await counts(url)
    return found.get("completed", 0) + found.get("failed", 0) == TASKS


async def check(url: str, stores: Stores) -> None:
    assert await counts(url) == {"completed": TASKS, "effects": TASKS}
    assert await stores.queue.depth("task_processing") == 0


async def test_a_thousand_tasks_live_through_the_death_of_their_workers(url: str, data_dir: Path) -> None:
    async with open_stores(Database(url=Secret(url)), data_dir) as stores, workers(url, data_dir) as pool:
        await submitted(stores)
        await asyncio.gather(pool.start(), pool.start())
        kills = 0
        while not await all_have_ended(url):
            if kills < 6:
                await pool.kill(pool.alive[0])
                kills += 1
                await pool.start()
            await asyncio.sleep(0.2)

        await check(url, stores)


@pytest.mark.deadline(180)
async def test_no_kill_of_a_thousand_loses_a_task_or_doubles_an_effect(
    url: str, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many as fit in a minute; `python -m bench.worker_kills` takes its time for all."""
    async with open_stores(Database(url=Secret(url)), data_dir):
        toll = await kill_workers(url, kills=1000, within_s=60.0)
    with capsys.disabled():
        sys.stdout.write(f"\n{toll}\n")

    assert toll.is_none
    assert toll.kills > toll.cut / SLOTS > 0


async def test_what_a_dead_worker_had_is_started_again_within_seconds(url: str, data_dir: Path) -> None:
    async with open_stores(Database(url=Secret(url)), data_dir) as stores, workers(url, data_dir) as pool:
        first = await pool.start()
        (task,) = await stores.tasks.submit([TaskDraft(tenant="acme", agent="effect", input="600")])

        async def is_under_way() -> bool:
            return (await stores.tasks.several("acme", [task.id]))[0].status is TaskStatus.PROCESSING

        async def is_taken_over() -> bool:
            return (await stores.tasks.several("acme", [task.id]))[0].deliveries == 2

        await eventually(is_under_way)
        await pool.start()
        await pool.kill(first)
        took_s = await eventually(is_taken_over)

    assert took_s < 8.0  # 2 s of lease and beats, on an idle machine


async def test_a_stalled_worker_that_wakes_again_does_no_harm(url: str, data_dir: Path) -> None:
    async with open_stores(Database(url=Secret(url)), data_dir) as stores, workers(url, data_dir) as pool:
        await submitted(stores)
        stalled, _ = await asyncio.gather(pool.start(), pool.start())
        os.kill(stalled.pid, signal.SIGSTOP)
        began = time.monotonic()
        while time.monotonic() - began < 4.0:
            await asyncio.sleep(0.1)
        os.kill(stalled.pid, signal.SIGCONT)
        await eventually(lambda: all_have_ended(url), 90)

        await check(url, stores)


async def test_a_database_that_is_killed_again_and_again_costs_time_alone(tmp_path: Path) -> None:
    """The server is our own here, so it is started again; elsewhere Patroni does that, or promotes another."""
    server = EmbeddedPostgres()
    url = await server.start(tmp_path)
    tending = asyncio.create_task(server.tend(), name="tend")
    try:
        connection = await asyncpg.connect(url)
        await connection.execute("CREATE TABLE effects (task text PRIMARY KEY, fence integer NOT NULL)")
        await connection.close()
        async with open_stores(Database(url=Secret(url)), tmp_path) as stores, workers(url, tmp_path) as pool:
            await submitted(stores)
            await asyncio.gather(pool.start(), pool.start())
            for _ in range(3):
                await eventually(lambda: _some_ended(url, stores))
                os.kill(postmaster(tmp_path), signal.SIGKILL)
            await eventually(lambda: _quietly(all_have_ended(url)), 90)

            await check(url, stores)
    finally:
        tending.cancel()
        await asyncio.wait([tending])
        await server.stop()


def postmaster(folder: Path) -> int:
    """The pid of the server in a data folder."""
    (pid_file,) = folder.rglob("postmaster.pid")
    return int(pid_file.read_text().split()[0])


async def _some_ended(url: str, stores: Stores) -> bool:
    """Whether the database is there, and something was done since it was looked at last."""
    try:
        before = (await counts(url)).get("completed", 0)
        await asyncio.sleep(0.3)
        after = (await counts(url)).get("completed", 0)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return False
    return after > before or after == TASKS


async def _quietly(question: Awaitable[bool]) -> bool:
    try:
        return await question
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return False


@pytest.mark.deadline(240)
async def test_a_broker_whose_nodes_are_killed_costs_time_alone(
    url: str, data_dir: Path, rabbit_cluster: Rabbits
) -> None:
    """The leader of the queue, then a majority, and a worker in between."""
    settings = rabbit_cluster.settings(prefix=uuid.uuid4().hex[:12])
    assert settings.url is not None
    broker = (settings.url.reveal(), settings.prefix)
    async with open_stores(Database(url=Secret(url)), data_dir) as stores, workers(url, data_dir, *broker) as pool:
        tasks = await submitted(stores)
        await asyncio.gather(pool.start(), pool.start())
        await eventually(lambda: _some_ended(url, stores))
        await asyncio.to_thread(rabbit_cluster.leader_of(f"{settings.prefix}.task_processing").kill)
        await eventually(lambda: _some_ended(url, stores), 60)
        await pool.kill(pool.alive[0])
        await pool.start()
        await asyncio.to_thread(rabbit_cluster.restore)
        for node in rabbit_cluster.nodes[:2]:
            await asyncio.to_thread(node.kill)
        assert len(await stores.tasks.submit([TaskDraft(tenant="b", agent="effect", input="0")])) == 1
        await asyncio.to_thread(rabbit_cluster.restore)
        await eventually(lambda: _all_have_ended(url, len(tasks) + 1), 120)

        found = await counts(url)
        assert found == {"completed": TASKS + 1, "effects": TASKS + 1}


async def _all_have_ended(url: str, tasks: int) -> bool:
    found = await counts(url)
    return found.get("completed", 0) + found.get("failed", 0) == tasks
