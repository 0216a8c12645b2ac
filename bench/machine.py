"""
What `/proc` tells: the CPU time and memory of a contestant, and who else kept the cores busy meanwhile.

A contestant is its first process, all below that, and whatever carries its mark in the environment: an
embedded database detaches itself and would otherwise be left out of the bill.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_MARK = "BENCH_CONTESTANT"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One line of the table of processes."""

    pid: int
    parent: int
    cpu_s: float
    """User and system time of all its threads, living and ended; and of children that it has waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreTimes:
    """Seconds since the machine started."""

    programs_s: float
    """Running any program, without the interrupts."""
    steal_s: float
    """Ready to run, but the host gave the core to another guest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of one process."""

    rss_bytes: int
    pss_bytes: int
    """Shared pages divided among those that share them."""


def cores() -> tuple[int, int]:
    """The core for the gateway, and that for everything else. Raises `SystemExit` where there is one."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise SystemExit("The benchmark needs two cores: one for the gateway, one for the load and the stub node.")
    return allowed[0], allowed[1]


def mark(name: str) -> dict[str, str]:
    """The environment that marks a contestant of this run."""
    return {_MARK: f"{os.getpid()}-{name}"}


def core_times(core: int) -> CoreTimes:
    """What one core did so far."""
    for line in (_PROC / "stat").read_text().splitlines():
        if line.startswith(f"cpu{core} "):
            user, nice, system, _, _, _, _, steal = (int(ticks) / _TICKS_PER_S for ticks in line.split()[1:9])
            return CoreTimes(programs_s=user + nice + system, steal_s=steal)
    raise LookupError(f"/proc/stat had no line for core {core}.")


def processes_of(name: str, root: int) -> list[Process]:
    """Every living process of a contestant, in no order."""
    table = {process.pid: process for process in map(_process, _pids()) if process is not None}
    members = {pid for pid in table if pid == root or _is_marked(pid, name)}
    size = 0
    while size < len(members):
        size = len(members)
        members |= {process.pid for process in table.values() if process.parent in members}
    return [table[pid] for pid in members]


def rss_bytes(pid: int) -> int:
    """What the process holds now, within some hundred KiB: cheap enough to ask while it is being timed."""
    return int((_PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_of(pid: int) -> Memory:
    """What the process holds now, page by page."""
    fields = dict(line.split(":", 1) for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:])
    rss_kib, pss_kib = (int(fields[name].split()[0]) for name in ("Rss", "Pss"))
    return Memory(rss_bytes=rss_kib * 1024, pss_bytes=pss_kib * 1024)


def _pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def _process(pid: int) -> Process | None:
    try:
        # The name of the program stands in brackets and may hold spaces, so count from behind it.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    ticks = sum(int(field) for field in fields[11:15])
    return Process(pid=pid, parent=int(fields[1]), cpu_s=ticks / _TICKS_PER_S)


def _is_marked(pid: int, name: str) -> bool:
    try:
        environment = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return False
    return f"{_MARK}={os.getpid()}-{name}".encode() in environment.split(b"\0")
