"""
Draw what a run found: `plot.py RESULT.json PICTURE.svg`.

It runs in the environment that has matplotlib, without the rest of the project.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = {"sutazai": "#d1495b"}
_OTHERS = "#8d99ae"


def _requests_per_cpu_s(sample: dict[str, Any]) -> float:
    return float(sample["count"] / sample["cpu_s"])


def _cpu_us_per_event(sample: dict[str, Any]) -> float:
    return float(sample["cpu_s"] / sample["count"] * 1e6)


def _p50_ms(sample: dict[str, Any]) -> float:
    return float(sample["p50_ms"])


_PANELS: tuple[tuple[str, int, str, Callable[[dict[str, Any]], float]], ...] = (
    ("json", 32, "JSON chat, 32 connections:\nrequests per CPU second", _requests_per_cpu_s),
    ("large", 32, "64 KiB prompts, 32 connections:\nrequests per CPU second", _requests_per_cpu_s),
    ("flood", 272, "272 streams:\nCPU microseconds per event", _cpu_us_per_event),
    ("latency", 64, "Half load: p50 latency, ms\n(the stub node's own included)", _p50_ms),
)


def draw(report: dict[str, Any]) -> Figure:
    """One panel of bars for each kind of load, a bar for each contestant."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (section, connections, title, value) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        values: dict[str, list[float]] = {}
        for sample in report["samples"]:
            is_here = sample["section"] == section and sample["connections"] == connections
            if is_here and sample["cpu_s"] and sample["count"]:
                values.setdefault(sample["contestant"], []).append(value(sample))
        axes.set_title(title, fontsize=10, loc="left")
        _bars(axes, {name: statistics.median(figures) for name, figures in values.items()})
    figure.suptitle(f"{report['machine']}, {report['measured_at'][:10]}", fontsize=8)
    return figure


def _bars(axes: Axes, values: dict[str, float]) -> None:
    names = list(values)[::-1]
    colours = [_COLOURS.get(name, _OTHERS) for name in names]
    bars = axes.barh(names, [values[name] for name in names], color=colours)
    labels = [f"{values[name]:,.0f}" if values[name] >= 100 else f"{values[name]:.3g}" for name in names]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_xticks([])
    axes.margins(x=0.15)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_bytes())).savefig(sys.argv[2])
