"""What this machine lets us compute with: its cores, within the affinity of the process and the quota of its groups."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Processors and memory, as far as this process may use them."""

    processor: str
    """As its maker calls it; empty where the system does not say."""
    cpus: int
    """What the scheduler may run us on; two for a core with hyperthreads."""
    cores: int
    """Physical ones among these."""
    quota: float
    """CPUs' worth of time that the control groups grant; infinite where they do not limit it."""
    memory_bytes: int
    """All there is, used or not."""

    @property
    def most_threads(self) -> int:
        """Threads that can compute at once. Two on one core share its units for arithmetic and gain nothing."""
        return max(1, int(min(self.cores, self.quota)))

    @property
    def usual_threads(self) -> int:
        """As many, but one CPU is left to the gateway."""
        return max(1, int(min(self.cores, self.cpus - 1, self.quota - 1)))

    def __str__(self) -> str:
        """What a tuning depends on, in words; another text is another machine."""
        quota = "" if math.isinf(self.quota) else f", quota of {self.quota:g} CPUs"
        memory = f"{round(self.memory_bytes / GIB)} GiB"
        return f"{self.cores} cores, {self.cpus} CPUs{quota}, {memory}, {self.processor or 'unnamed processor'}"


def this_machine(root: Path = Path("/")) -> Machine:
    """Look at what `/proc` and `/sys` below `root` tell; what they do not tell is taken to be unlimited."""
    allowed = os.sched_getaffinity(0)
    return Machine(
        processor=_first(r"^model name\s*: (.+)$", _text(root / "proc/cpuinfo")),
        cpus=len(allowed),
        cores=len({_core(root, cpu) for cpu in allowed}),
        quota=min(_quotas(root), default=math.inf),
        memory_bytes=1024 * int(_first(r"^MemTotal:\s+(\d+) kB$", _text(root / "proc/meminfo")) or 0),
    )


def _core(root: Path, cpu: int) -> tuple[str, ...]:
    """What all hyperthreads of one core have in common."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    place = tuple(_text(topology / name).strip() for name in ("physical_package_id", "core_id"))
    return place if all(place) else (str(cpu),)


def _quotas(root: Path) -> Iterator[float]:
    """Of every control group that this process is in, of both versions."""
    mounted = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for group in _upwards(mounted, path):
                yield from _quota(*_text(group / "cpu.max").split())
        elif "cpu" in controllers.split(","):
            for group in _upwards(mounted / "cpu", path):
                quota_us, period_us = (_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
                yield from _quota(quota_us, period_us)


def _upwards(mounted: Path, path: str) -> Iterator[Path]:
    """
    The group and all that it is in; each of them limits.

    In a container its own group may be mounted at the root and the path be the one outside, so what is missing is
    passed over.
    """
    group = Path(path.lstrip("/"))
    for folder in (group, *group.parents):
        yield mounted / folder


def _quota(quota_us: str = "", period_us: str = "") -> Iterator[float]:
    """Nothing where there is no limit: `max` in version 2, -1 in version 1, or no such file."""
    if quota_us.isdigit() and period_us.isdigit() and int(period_us):
        yield int(quota_us) / int(period_us)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else ""
