"""
How long a submission takes, and how soon an idle worker starts it: `python -m bench.task_latency [--rounds 3]`.

A gateway, a worker, a PostgreSQL and a RabbitMQ of this run's own, over the real HTTP API. Rounds alternate between the
queue in PostgreSQL and that in RabbitMQ. Of each: tasks submitted one by one to an idle worker, from the answer of the
gateway to the first line of the agent; then as many as gateway and worker keep up with together, and submissions at
half of that, which is half of the load that this place can have for long. Then, without a worker, as many submissions
as the gateway takes, and a quarter and half of that rate, each with empty tables, and the same half with many tasks in
them. Arrivals do not wait for answers. The server's log has reached its size before, as that of one that has been under
load for a while.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import uvloop
from tests.rabbit_servers import rabbits

from bench.findings import Finding, print_findings
from bench.open_loop import RateLoad
from bench.payload import LoadResult, percentile
from bench.peers import free_port
from bench.report import RESULTS
from sutazai.adapters.postgres.embedded import EmbeddedPostgres
from sutazai.adapters.postgres.stores import open_stores
from sutazai.bootstrap.tasks import begin_queue, make_worker
from sutazai.cli.memory import settle_memory
from sutazai.ports.agent import LLM_INFERENCE, Agent
from sutazai.settings.load import load as settings_of

ROOT = Path(__file__).parents[1]
BODY = json.dumps({"agent": "chat", "input": {"messages": [{"role": "user", "content": "Good day."}]}})
PATH = "/v1/tasks"
START_S = 60.0
MOST_S = 4.0
PART_S = 30.0
"""So that each load has its share of checkpoints, whose ends hold up all commits for 40 to 80 ms."""
ALONE = 100
"""Tasks that are submitted one by one."""
COMMITS = 300
SHARES = (("p50", 0.5), ("p99", 0.99))
SEASON_KB = 1_050_000
"""So much of its log PostgreSQL keeps under load where it may have 1 GB: what it writes from one checkpoint to the end
of the next, after which the files are written again."""
FIRST_PER_S = 800.0
STEP = 1.15
STEP_S = 4.0
LATE_S = 0.5
IN_TIME = 0.95
WAITING = 100_000
"""Tasks that wait in the table for the last figure."""

WAKE_UP = "from the answer to the start, idle worker, p50"
SUBMIT_WITH_WORKER = "submit p99 at half of that, worker at work"
SUBMIT = "submit p99 at half of that, without a worker"
TARGETS = {WAKE_UP: ("<", 5.0), SUBMIT_WITH_WORKER: ("<", 10.0), SUBMIT: ("<", 10.0)}


class Place:
    """The servers and a folder."""

    def __init__(self, folder: Path, database: str, broker: str) -> None:
        self._folder = folder
        self._database = database
        self._broker = broker
        self._runs = 0

    def round(self, *, on_rabbitmq: bool) -> Iterator[tuple[str, float, str]]:
        """What was measured: a name, a figure and its unit."""
        self._runs += 1
        database = asyncio.run(self._fresh_database(f"run{self._runs}"))
        folder = self._folder / f"run{self._runs}"
        folder.mkdir()
        port = free_port()
        config = folder / "sutazai.toml"
        lines = [
            f'server.port = {port}\ndatabase.url = "{database}"\ndatabase.data_dir = "{folder}"',
            'discovery.ollama = false\nengine.enabled = "never"\nlogs.format = "json"\nlogs.level = "error"',
            "tasks.max_length = 1_000_000\ntasks.max_waiting_per_tenant = 1_000_000\ntasks.llm_slots = 256",
            *([f'[rabbitmq]\nurl = "{self._broker}"\nprefix = "run{self._runs}"'] if on_rabbitmq else []),
        ]
        config.write_text("\n".join(lines))
        environ = {**os.environ, "SUTAZAI_CONFIG": str(config), "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
        gateway = [sys.executable, "-m", "sutazai", "gateway", "--config", str(config)]
        started = folder / "started"
        started.touch()
        with running(gateway, environ, folder / "gateway.log"):
            until(lambda: answers(port), "the gateway")
            worker = [sys.executable, "-m", "bench.task_latency", "--work", str(started)]
            with running(worker, environ, folder / "worker.log"):
                yield from self._alone(port, started)
                asyncio.run(_settle(database))
                yield from _through(port, started)
            asyncio.run(_settle(database))
            most = load(port, rate_per_s=20_000.0, seconds=MOST_S)
            yield "submissions per second, without a worker, at most", most.rate_per_s, ""
            asyncio.run(_settle(database))
            quarter = part_load(port, most.rate_per_s, 1 / 4)
            yield "submit p99 at a quarter of that, without a worker", quarter.p99_ms, "ms"
            asyncio.run(_settle(database))
            half = part_load(port, most.rate_per_s, 1 / 2)
            yield "submit p50 at half of that, without a worker", half.p50_ms, "ms"
            yield SUBMIT, half.p99_ms, "ms"
            if not on_rabbitmq:  # whose outbox would be carried away meanwhile
                asyncio.run(_fill(database))
                full = part_load(port, most.rate_per_s, 1 / 2)
                yield f"{SUBMIT}, {WAITING:,} more in the table", full.p99_ms, "ms"

    def _alone(self, port: int, started: Path) -> Iterator[tuple[str, float, str]]:
        waits_ms, submits_ms = [], []
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
        for number in range(ALONE + 1):
            began = time.time()
            connection.request("POST", PATH, BODY, {"content-type": "application/json"})
            connection.getresponse().read()
            answered = time.time()
            until(lambda: started.read_bytes().count(b"\n") > number, "the start of a task", pause_s=0.002)  # noqa: B023
            began_at = float(started.read_bytes().split()[-1])
            if number:  # the first opens connections
                waits_ms.append(max(began_at - answered, 0.0) * 1000)
                submits_ms.append((answered - began) * 1000)
            time.sleep(0.02)
        yield WAKE_UP, percentile(waits_ms, 0.5), "ms"
        yield "from the answer to the start, idle worker, p99", percentile(waits_ms, 0.99), "ms"
        yield "submit p50, one by one", percentile(submits_ms, 0.5), "ms"

    async def _fresh_database(self, name: str) -> str:
        connection = await asyncpg.connect(self._database)
        await connection.execute(f'CREATE DATABASE "{name}"')
        await _season(connection)
        await connection.close()
        return self._database.replace("/sutazai?", f"/{name}?")


async def _disk(database: str) -> list[tuple[str, float, str]]:
    """What one commit waits for, by itself: no task can be kept sooner."""
    connection = await asyncpg.connect(database)
    await connection.execute("CREATE TABLE IF NOT EXISTS commits (number integer)")
    taken_ms = []
    for number in range(COMMITS):
        began = time.perf_counter()
        await connection.execute("INSERT INTO commits VALUES ($1)", number)
        taken_ms.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(0.005)
    await connection.close()
    return [(f"one commit alone, {name}", percentile(taken_ms, share), "ms") for name, share in SHARES]


async def _season(connection: asyncpg.Connection) -> None:
    """
    Write as much log as a server keeps that has been under load for a while, so that its files are there.

    It makes no new ones then, and a new one holds everybody up for 20 to 30 ms.
    """
    await connection.execute("CREATE TABLE IF NOT EXISTS junk (words text)")
    much = "INSERT INTO junk SELECT repeat('x', 1000) FROM generate_series(1, $1::integer)"
    await connection.execute(much, SEASON_KB)
    await connection.execute("TRUNCATE junk")
    await connection.execute("CHECKPOINT")


async def _fill(database: str) -> None:
    await _settle(database)
    connection = await asyncpg.connect(database)
    await connection.execute(
        "INSERT INTO dispatch (queue, task, tenant, agent, priority, turn, is_due, available_at)"
        " SELECT 'llm_inference', gen_random_uuid(), 'filler', 'chat', 1, n, true, now()"
        " FROM generate_series(1, $1::integer) AS n",
        WAITING,
    )
    await connection.execute("ANALYZE dispatch")
    await connection.execute("CHECKPOINT")
    await connection.close()


def _through(port: int, started: Path) -> Iterator[tuple[str, float, str]]:
    """As many tasks as are started as fast as they are submitted, and submissions at half of that."""
    if not keeps_up(port, started, FIRST_PER_S):
        raise SystemExit(
            f"Gateway and worker did not keep up with {FIRST_PER_S:g} tasks a second. Is the machine idle?"
        )
    most = FIRST_PER_S
    while keeps_up(port, started, STEP * most):
        most *= STEP
    yield "tasks per second through gateway and worker, at most", most, ""
    half = part_load(port, most, 1 / 2)
    yield "submit p50 at half of that, worker at work", half.p50_ms, "ms"
    yield SUBMIT_WITH_WORKER, half.p99_ms, "ms"


def keeps_up(port: int, started: Path, rate_per_s: float) -> bool:
    """Whether all but a few were answered as fast as they came and started soon. Waits for the others."""
    before = starts(started)
    result = load(port, rate_per_s=rate_per_s, seconds=STEP_S)
    time.sleep(LATE_S)
    in_time = starts(started) - before
    until(lambda: starts(started) - before >= result.count - result.failed, "the start of the last task")
    return not result.failed and result.rate_per_s >= IN_TIME * rate_per_s and in_time >= IN_TIME * result.count


def starts(started: Path) -> int:
    """Tasks that were started so far."""
    return started.read_bytes().count(b"\n")


async def _settle(database: str) -> None:
    """
    Begin with empty tables, as where workers keep up, and with all that was written on the disk.

    What is counted now and then takes longer the more tasks wait, and what more load than it takes leaves to be written
    holds up what comes after it.
    """
    connection = await asyncpg.connect(database)
    await connection.execute("TRUNCATE tasks, events, dispatch")
    await connection.execute("CHECKPOINT")
    await connection.close()


def load(port: int, *, rate_per_s: float, seconds: float = PART_S) -> LoadResult:
    """Submissions at a rate, from a process of their own."""
    wanted = RateLoad(port=port, key="none", rate_per_s=rate_per_s, seconds=seconds, path=PATH, body=BODY)
    argv = [sys.executable, "-m", "bench.open_loop", msgspec.json.encode(wanted).decode()]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, timeout=START_S + 2 * seconds, check=True)
    return msgspec.json.decode(done.stdout, type=LoadResult)


def part_load(port: int, most_per_s: float, part: float) -> LoadResult:
    """The same at a part of the rate that was reached. Raises `SystemExit` where any was refused."""
    result = load(port, rate_per_s=part * most_per_s)
    if result.failed:
        raise SystemExit(f"{result.failed:,} submissions were refused or lost at {part:g} of the load, so it was none.")
    return result


@contextmanager
def running(argv: list[str], environ: dict[str, str], log: Path) -> Iterator[None]:
    """A program, ended at the end."""
    with log.open("wb") as out:
        process = subprocess.Popen(argv, env=environ, cwd=ROOT, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def until(is_so: Callable[[], bool], what: str, *, pause_s: float = 0.05) -> None:
    """Wait for it. Raises `SystemExit` where it takes too long."""
    give_up_at = time.monotonic() + START_S
    while not is_so():
        if time.monotonic() > give_up_at:
            raise SystemExit(f"{what} took longer than {START_S:g} s")
        time.sleep(pause_s)


def answers(port: int) -> bool:
    """Whether the gateway does."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
        connection.request("GET", "/v1/agents")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


async def work(started: Path) -> None:
    """A worker as `sutazai worker` makes it, whose only agent `chat` writes down when it ran. Until ended."""
    settings = settings_of(Path(os.environ["SUTAZAI_CONFIG"]), os.environ)
    out = os.open(started, os.O_WRONLY | os.O_APPEND)

    async def run(_: Any, __: Any) -> None:
        os.write(out, f"{time.time()}\n".encode())

    agents = {
        "chat": Agent(
            name="chat", run=run, input_type=Any, output_type=Any, describes="Notes the time.", queue=LLM_INFERENCE
        )
    }
    no_models: Any = None
    no_objects: Any = None
    async with AsyncExitStack() as stack:
        stores = await stack.enter_async_context(open_stores(settings.database, Path("/nowhere")))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        tasks: list[asyncio.Task[None]] = []
        queue = await begin_queue(
            settings, stores, agents, stack, lambda work, name: tasks.append(group.create_task(_run(work), name=name))
        )
        settle_memory()
        await make_worker(settings, stores, queue, agents, no_models, no_objects).run()


async def _run(work: Callable[[], Awaitable[None]]) -> None:
    await work()


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.task_latency", description="Latencies of tasks.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        uvloop.run(work(arguments.work))
        return
    figures: dict[tuple[str, str, str], list[float]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sutazai-bench-")))
        server = EmbeddedPostgres()
        database = asyncio.run(server.start(folder))
        stack.callback(lambda: asyncio.run(server.stop()))
        url = stack.enter_context(rabbits(1)).settings().url
        assert url is not None
        place = Place(folder, database, url.reveal())
        for _ in range(arguments.rounds):
            for what, value, unit in asyncio.run(_disk(database)):
                figures.setdefault(("disk", what, unit), []).append(value)
            for name, on_rabbitmq in (("postgresql", False), ("rabbitmq", True)):
                for what, value, unit in place.round(on_rabbitmq=on_rabbitmq):
                    figures.setdefault((name, what, unit), []).append(value)
                    print(f"{name}: {what}: {value:.3g} {unit}", flush=True)
    findings = [
        Finding(name, what, values, unit, *TARGETS.get(what, ("", 0.0)))
        for (name, what, unit), values in figures.items()
    ]
    print_findings(findings)
    (RESULTS / "task_latency.json").write_bytes(msgspec.json.format(msgspec.json.encode(findings), indent=1))


if __name__ == "__main__":
    main()
