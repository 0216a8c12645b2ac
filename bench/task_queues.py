"""
Tasks beside their peers: `python -m bench.task_queues [--count 10000] [--rounds 3] [--only ours,celery]`.

The same no-op task, submitted durably by one producer and run by one worker process of each contestant, one after
another in one run. Two figures are compared: tasks completed per CPU second of producer and worker, their start
included; and the same with the CPU of PostgreSQL and RabbitMQ during the round. Only ours keeps a task's state, its
events and its result in PostgreSQL; Celery, Dramatiq and taskiq keep a message until it is acknowledged, and no more.
Dramatiq's and taskiq's queues are classic and durable, as these make them; Celery's and ours are quorum queues. The
peers live in `.venv-bench` (`scripts/setup bench`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import msgspec
from tests.rabbit_servers import rabbits

from bench.findings import Finding, print_findings
from bench.machine import mark, processes_of
from bench.report import RESULTS
from sutazai.adapters.postgres.embedded import EmbeddedPostgres

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-bench" / "bin"
LIMIT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """Who is measured, and on what."""

    name: str
    program: str
    on_rabbitmq: bool
    work: tuple[str, ...] = ()
    """Its own command; empty: the one of `bench.task_programs`."""


CONTESTANTS = (
    Contestant(name="ours-postgresql", program="ours", on_rabbitmq=False),
    Contestant(name="procrastinate", program="procrastinate", on_rabbitmq=False),
    Contestant(name="ours-rabbitmq", program="ours", on_rabbitmq=True),
    Contestant(name="taskiq", program="taskiq", on_rabbitmq=True),
    Contestant(
        name="celery",
        program="celery",
        on_rabbitmq=True,
        work=("celery", "-A", "bench.task_programs", "worker", "-c", "1", "-l", "error", "-Q", "bench_celery"),
    ),
    Contestant(
        name="dramatiq",
        program="dramatiq",
        on_rabbitmq=True,
        work=("dramatiq", "bench.task_programs", "-p", "1", "-t", "8"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one round."""

    per_cpu_s: float
    """Of producer and worker."""
    per_cpu_s_of_all: float
    """And of the servers."""
    per_s: float
    submit_p99_ms: float


class Arena:
    """The servers, and one folder for the run."""

    def __init__(self, folder: Path, database: str, broker: str, broker_pid: int) -> None:
        self._folder = folder
        self._database = database
        self._broker = broker
        self._server_pids = [int((folder / "postgres" / "postmaster.pid").read_text().split()[0])]
        self._server_pids += [broker_pid] if broker_pid else []
        self._runs = 0

    def round(self, contestant: Contestant, count: int) -> Figures:
        """Submit, then work until all is done."""
        self._runs += 1
        done = self._folder / f"done-{self._runs}"
        done.touch()
        database = asyncio.run(self._fresh_database(f"run{self._runs}"))
        name = f"{contestant.name}-{self._runs}"
        environ = {
            **os.environ,
            **mark(name),
            "BENCH_DATABASE": database,
            "BENCH_BROKER": self._broker if contestant.on_rabbitmq else "",
            "BENCH_DONE": str(done),
            "BENCH_APP": contestant.program,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
        }
        python = sys.executable if contestant.program == "ours" else str(PEERS / "python")
        base = [python, "-m", "bench.task_programs", contestant.program]
        servers_before_s = self._servers_cpu_s()
        before = os.times()
        said = subprocess.run(
            [*base, "submit", str(count)], env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        after = os.times()
        if said.returncode:
            raise SystemExit(said.stderr[-2000:])
        submit_cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
        work = [str(PEERS / contestant.work[0]), *contestant.work[1:]] if contestant.work else [*base, "work", "0"]
        work_cpu_s, took_s = self._work(work, environ, name, done, count)
        servers_cpu_s = self._servers_cpu_s() - servers_before_s
        return Figures(
            per_cpu_s=count / (submit_cpu_s + work_cpu_s),
            per_cpu_s_of_all=count / (submit_cpu_s + work_cpu_s + servers_cpu_s),
            per_s=count / took_s,
            submit_p99_ms=float(said.stdout.split()[1]) * 1000,
        )

    def _work(
        self, command: list[str], environ: dict[str, str], name: str, done: Path, count: int
    ) -> tuple[float, float]:
        began = time.monotonic()
        log = (self._folder / f"{name}.log").open("wb")
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
        try:
            while (size := done.stat().st_size) < count:
                if time.monotonic() - began > LIMIT_S or process.poll() is not None:
                    raise SystemExit(
                        f"{name} did {size} of {count}: {(self._folder / f'{name}.log').read_text()[-1500:]}"
                    )
                time.sleep(0.02)
            took_s = time.monotonic() - began
            return sum(one.cpu_s for one in processes_of(name, process.pid)), took_s
        finally:
            os.killpg(process.pid, 9)
            process.wait()

    def _servers_cpu_s(self) -> float:
        return sum(one.cpu_s for pid in self._server_pids for one in processes_of("servers", pid))

    async def _fresh_database(self, name: str) -> str:
        connection = await asyncpg.connect(self._database)
        await connection.execute(f'CREATE DATABASE "{name}"')
        await connection.close()
        return self._database.replace("/sutazai?", f"/{name}?")


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.task_queues", description="Tasks beside their peers.")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(one.name for one in CONTESTANTS))
    arguments = parser.parse_args()
    chosen = [one for one in CONTESTANTS if one.name in arguments.only.split(",")]
    figures: dict[str, list[Figures]] = {one.name: [] for one in chosen}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sutazai-bench-")))
        server = EmbeddedPostgres()
        database = asyncio.run(server.start(folder))
        stack.callback(lambda: asyncio.run(server.stop()))
        broker, broker_pid = "", 0
        if any(one.on_rabbitmq for one in chosen):
            nodes = stack.enter_context(rabbits(1))
            url, broker_pid = nodes.settings().url, nodes.nodes[0].pid
            assert url is not None
            broker = url.reveal()
            assert urlsplit(broker).scheme == "amqp"
        arena = Arena(folder, database, broker, broker_pid)
        for _ in range(arguments.rounds):
            for one in chosen:
                figures[one.name].append(arena.round(one, arguments.count))
    findings = [
        Finding(section=name, what=what, values=[getattr(one, field) for one in rounds], unit=unit)
        for name, rounds in figures.items()
        for what, field, unit in (
            ("tasks per CPU second", "per_cpu_s", ""),
            ("tasks per CPU second, servers included", "per_cpu_s_of_all", ""),
            ("tasks per second, worker's start included", "per_s", ""),
            ("submit p99 as fast as it goes", "submit_p99_ms", "ms"),
        )
    ]
    print_findings(findings)
    (RESULTS / "task_queues.json").write_bytes(msgspec.json.format(msgspec.json.encode(findings), indent=1))


if __name__ == "__main__":
    main()
