"""The tables, the JSON file and the plot of a run."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from bench.arena import Sample, per_cpu_s
from bench.machine import Memory
from bench.peers import peers_python
from bench.verdict import MIB, Row, is_disturbed

RESULTS = Path(__file__).parent / "results"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A run as it is kept."""

    measured_at: datetime
    machine: str
    versions: Mapping[str, str]
    left_out: Mapping[str, str]
    """Contestants that did not start, and why."""
    rest_memory: Mapping[str, Memory]
    rows: Sequence[Row]
    samples: Sequence[Sample]


def machine_name() -> str:
    """The processor, the number of cores and the kernel."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    return f"{model}, {sum(line.startswith('processor') for line in lines)} cores, Linux {platform.release()}"


def print_tables(report: Report) -> None:
    """Both tables in Markdown: the targets, and all contestants side by side."""
    print(f"\n{report.measured_at:%Y-%m-%d %H:%M} UTC, {report.machine}")
    print(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    for name, reason in report.left_out.items():
        print(f"left out: {name}: {reason}")
    _print_table(
        ("target", "limit", "measured", "range", "quiet rounds", "verdict"),
        [_cells(row) for row in report.rows],
    )
    figures = ("per CPU s", "per s", "p50 ms", "p99 ms", "CPU us each", "MiB", "failed", "disturbed")
    _print_table(("load", "contestant", *figures), _side_by_side(report.samples))


def save(report: Report) -> None:
    """Write `latest.json`, and let the environment of the peers draw `latest.svg`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "latest.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    plot = Path(__file__).parent / "plot.py"
    subprocess.run([peers_python(), plot, path, RESULTS / "latest.svg"], check=True, timeout=120)
    print(f"\nSaved in {RESULTS.name}/: {path.name}, latest.svg")


def _cells(row: Row) -> tuple[str, ...]:
    goal, values = row.goal, row.values
    limit = f"{goal.comparison} {goal.limit:,g} {goal.unit}".strip()
    measured = "-" if row.median is None else f"{_figure(row.median)} {goal.unit}".strip()
    spread = f"{_figure(min(values))} - {_figure(max(values))}" if values else "-"
    return goal.text, limit, measured, spread, f"{row.quiet_rounds} of {row.rounds}", row.verdict


def _side_by_side(samples: Sequence[Sample]) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, int, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.section, sample.connections, sample.contestant), []).append(sample)
    return [
        (f"{section}, {connections}", contestant, *_medians(group))
        for (section, connections, contestant), group in groups.items()
    ]


def _medians(group: Sequence[Sample]) -> tuple[str, ...]:
    each_us = [sample.cpu_s / sample.count * 1e6 if sample.count else 0.0 for sample in group]
    columns = (
        [per_cpu_s(sample) for sample in group],
        [sample.rate_per_s for sample in group],
        [sample.p50_ms for sample in group],
        [sample.p99_ms for sample in group],
        each_us,
        [sample.rss_bytes / MIB for sample in group],
    )
    disturbed = sum(map(is_disturbed, group))
    medians = map(statistics.median, columns)
    figures = (_figure(median) if median else "-" for median in medians)
    return *figures, str(sum(sample.failed for sample in group)), f"{disturbed} of {len(group)}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _print_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]
    print()
    for line in (header, ["-" * width for width in widths], *lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
