"""What a machine lets us compute with, read from made-up `/proc` and `/sys` of machines that we do not have."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from sutazai.adapters.llamacpp.machine import GIB, Machine, this_machine


@pytest.fixture
def cpus() -> list[int]:
    """Those that this process may run on, which no folder can change."""
    return sorted(os.sched_getaffinity(0))


def write(root: Path, **files: str) -> None:
    """Make files below the root; `__` in a name stands for `/`."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def machine(*, cpus: int = 8, cores: int = 8, quota: float = math.inf) -> Machine:
    return Machine(processor="Model T", cpus=cpus, cores=cores, quota=quota, memory_bytes=16 * GIB)


def test_a_machine_that_tells_nothing_has_a_core_for_each_cpu_and_no_quota(tmp_path: Path, cpus: list[int]) -> None:
    found = this_machine(tmp_path)

    assert (found.cpus, found.cores) == (len(cpus), len(cpus))
    assert math.isinf(found.quota)
    assert str(found).endswith("unnamed processor")


def test_hyperthreads_of_one_core_count_once(tmp_path: Path, cpus: list[int]) -> None:
    for cpu in cpus:
        topology = f"sys__devices__system__cpu__cpu{cpu}__topology__"
        write(tmp_path, **{f"{topology}physical_package_id": "0\n", f"{topology}core_id": "3\n"})

    assert this_machine(tmp_path).cores == 1


def test_cores_of_two_packages_may_have_the_same_number(tmp_path: Path, cpus: list[int]) -> None:
    for cpu in cpus:
        topology = f"sys__devices__system__cpu__cpu{cpu}__topology__"
        write(tmp_path, **{f"{topology}physical_package_id": f"{cpu}\n", f"{topology}core_id": "0\n"})

    assert this_machine(tmp_path).cores == len(cpus)


def test_processor_and_memory_are_told(tmp_path: Path) -> None:
    write(tmp_path, proc__cpuinfo="processor : 0\nmodel name\t: Model T\n", proc__meminfo="MemTotal:  16777216 kB\n")

    found = this_machine(tmp_path)

    assert (found.processor, found.memory_bytes) == ("Model T", 16 * GIB)
    assert str(found).endswith("16 GiB, Model T")


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4.0),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "300000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 3.0),
        ("4:cpu:/docker/x\n", {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ("4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("4:cpuset:/a\n", {"cpuset/a/cpuset.cpus": "0-1\n"}, math.inf),
    ],
)
def test_the_smallest_quota_of_all_groups_counts(
    tmp_path: Path, groups: str, files: dict[str, str], quota: float
) -> None:
    write(tmp_path, proc__self__cgroup=groups, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()})

    assert this_machine(tmp_path).quota == quota


@pytest.mark.parametrize(
    ("found", "most", "usual"),
    [
        (machine(cpus=1, cores=1), 1, 1),
        (machine(cpus=2, cores=2), 2, 1),
        (machine(cpus=8, cores=8), 8, 7),
        (machine(cpus=16, cores=8), 8, 8),  # the gateway has the other hyperthreads
        (machine(quota=2.5), 2, 1),
        (machine(quota=0.5), 1, 1),
    ],
)
def test_threads_fit_cores_and_quota_and_leave_a_cpu_to_the_gateway(found: Machine, most: int, usual: int) -> None:
    assert (found.most_threads, found.usual_threads) == (most, usual)


def test_another_quota_is_another_machine() -> None:
    assert str(machine(quota=2)) != str(machine(quota=4)) != str(machine())


def test_this_machine_is_one() -> None:
    found = this_machine()

    assert 1 <= found.usual_threads <= found.most_threads <= found.cores <= found.cpus
    assert found.memory_bytes > 0
