"""
Who runs where, and one measurement: a load of some seconds on one target, with its CPU time beside it.

The contestants have one core to themselves; the stub node, the load and this program share the other.
A sample also says how much of the cores went to others, so that a disturbed one can be left out.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bench import machine
from bench.open_loop import RateLoad
from bench.payload import CHAT_PATH, LoadResult, chat_body
from bench.peers import Contestant, Target, free_port
from bench.stream_client import StreamLoad

DIRECT = "stub alone"
_MARGIN_S = 60.0
_WATCH_EVERY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A program that sends something and prints a `LoadResult`."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    connections: int
    seconds: float


class Sample(LoadResult, frozen=True, kw_only=True):
    """One measurement."""

    section: str
    contestant: str
    connections: int
    turn: int
    """The round; samples of one round are compared with each other."""
    cpu_s: float
    """Of the contestant; 0 for the stub alone."""
    foreign_share: float
    """What went to programs that are no part of the measurement, of the core where that was more."""
    steal_share: float
    """What the host gave to other guests, of the core where that was more."""
    rss_bytes: int
    """The most that its main process, or the stub, held while the load ran."""


def per_cpu_s(sample: Sample) -> float:
    """Requests or events for each second of the contestant's CPU time."""
    return sample.count / sample.cpu_s if sample.cpu_s else 0.0


def closed_loop(target: Target, *, connections: int, seconds: float, body: Path) -> Load:
    """As many requests as the target answers. wrk takes whole seconds only."""
    url = f"http://127.0.0.1:{target.port}{CHAT_PATH}"
    script = str(Path(__file__).parent / "chat.lua")
    options = f"-t1 -c{connections} -d{max(1, round(seconds))}s --timeout 20s -s".split()
    env = {"BENCH_BODY": str(body), "BENCH_KEY": target.key}
    return Load(argv=["wrk", *options, script, url], env=env, connections=connections, seconds=seconds)


def at_rate(target: Target, *, rate_per_s: float, seconds: float) -> Load:
    """Requests at a rate that the target can well bear."""
    load = RateLoad(port=target.port, key=target.key, rate_per_s=rate_per_s, seconds=seconds)
    return Load(argv=_python("bench.open_loop", load), connections=load.connections, seconds=seconds)


def streaming(load: StreamLoad) -> Load:
    """Streams at once."""
    return Load(argv=_python("bench.stream_client", load), connections=load.streams, seconds=load.seconds)


def _python(module: str, parameter: msgspec.Struct) -> list[str]:
    return [sys.executable, "-m", module, msgspec.json.encode(parameter).decode()]


class Arena:
    """The two cores, the stub node on one of them, and what is measured on the other."""

    def __init__(self, *, stub: subprocess.Popen[bytes], nodes: Sequence[int], folder: Path) -> None:
        self.gateway_core, self.load_core = machine.cores()
        self.nodes = nodes
        self.folder = folder
        self.direct = Target(name=DIRECT, port=nodes[0])
        self._stub = stub

    def body(self, size_bytes: int) -> Path:
        """A file with a chat request of that size."""
        path = self.folder / f"body-{size_bytes}"
        path.write_bytes(chat_body(size_bytes))
        return path

    def measure(self, section: str, contestant: Contestant | None, load: Load, *, turn: int) -> Sample:
        """Run a load on a contestant, or on the stub alone. Raises `RuntimeError` when the load broke."""
        began_at, before = time.monotonic(), self._meters(contestant)
        output, rss_bytes = self._run(load, contestant)
        wall_s, after = time.monotonic() - began_at, self._meters(contestant)
        if contestant is not None:
            contestant.trim_log()
        result = msgspec.json.decode(output.splitlines()[-1], type=LoadResult)
        cpu_s, foreign_gateway_s, foreign_load_s, steal_gateway_s, steal_load_s = (
            end - start for start, end in zip(before, after, strict=True)
        )
        return Sample(
            **msgspec.structs.asdict(result),
            section=section,
            contestant=contestant.target.name if contestant else DIRECT,
            connections=load.connections,
            turn=turn,
            cpu_s=cpu_s,
            foreign_share=max(foreign_load_s, foreign_gateway_s if contestant else 0.0, 0.0) / wall_s,
            steal_share=max(steal_load_s, steal_gateway_s if contestant else 0.0) / wall_s,
            rss_bytes=rss_bytes,
        )

    def _meters(self, contestant: Contestant | None) -> tuple[float, float, float, float, float]:
        """Seconds so far: CPU of the contestant, foreign CPU on either core, steal on either core."""
        gateway_core, load_core = machine.core_times(self.gateway_core), machine.core_times(self.load_core)
        contestant_s = contestant.cpu_s() if contestant else 0.0
        stub_s = sum(process.cpu_s for process in machine.processes_of("stub", self._stub.pid))
        loads = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = resource.getrusage(resource.RUSAGE_SELF)
        loads_s = loads.ru_utime + loads.ru_stime + own.ru_utime + own.ru_stime
        return (
            contestant_s,
            gateway_core.programs_s - contestant_s,
            load_core.programs_s - stub_s - loads_s,
            gateway_core.steal_s,
            load_core.steal_s,
        )

    def _run(self, load: Load, contestant: Contestant | None) -> tuple[bytes, int]:
        argv = ["taskset", "-c", str(self.load_core), *load.argv]
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parent.parent), **load.env}
        main_pid = contestant.main_pid() if contestant else self._stub.pid
        output, rss_bytes = b"", 0
        with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, start_new_session=True) as process:
            give_up_at = time.monotonic() + load.seconds + _MARGIN_S
            try:
                while process.returncode is None and time.monotonic() < give_up_at:
                    rss_bytes = max(rss_bytes, machine.rss_bytes(main_pid))
                    with suppress(subprocess.TimeoutExpired):
                        output, _ = process.communicate(timeout=_WATCH_EVERY_S)
            finally:
                process.kill()
        if process.returncode != 0:
            raise RuntimeError(f"The load {load.argv[:3]} ended with status {process.returncode}.")
        return output, rss_bytes


@contextmanager
def arena(folder: Path) -> Iterator[Arena]:
    """Start the stub node, and end it whatever happens. The benchmark itself moves off the gateway's core."""
    _, load_core = machine.cores()
    nodes = (free_port(), free_port())
    argv = ["taskset", "-c", str(load_core), sys.executable, "-m", "bench.stub_node", *map(str, nodes)]
    with subprocess.Popen(argv, cwd=Path(__file__).parent.parent, start_new_session=True) as stub:
        try:
            place = Arena(stub=stub, nodes=nodes, folder=folder)
            os.sched_setaffinity(0, {load_core})
            yield place
        finally:
            stub.kill()
