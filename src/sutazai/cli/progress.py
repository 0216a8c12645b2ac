"""The progress of a pull on all nodes: bars in a terminal, a line for each step of each node elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import msgspec
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from sutazai.cli.printing import complain, console, table

Note: TypeAlias = "Callable[[PullRecord], None]"

DIGEST_CHARACTERS = 12
"""Enough to tell layers apart; Ollama shows as many."""


class PullRecord(msgspec.Struct, frozen=True):
    """A line of `/api/pull`: the progress of all nodes together."""

    status: str = ""
    error: str = ""
    digest: str = ""
    """The layer that `total` and `completed` (bytes, of all nodes) are about."""
    total: int = 0
    completed: int = 0
    nodes: dict[str, str] = {}
    """What each node does, in Ollama's words."""


@contextmanager
def shown_progress() -> Iterator[Note]:
    """Records given to it appear on standard error, which leaves standard output to programs."""
    if not sys.stderr.isatty():
        yield _Lines().note
        return
    bars = _Bars()
    with Live(console=console(stderr=True), refresh_per_second=8, get_renderable=bars.picture):
        yield bars.note


class _Bars:
    """One bar for each layer, over all nodes, and below them what each node does."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        )
        self._tasks: dict[str, TaskID] = {}
        self._nodes: dict[str, str] = {}

    def note(self, record: PullRecord) -> None:
        self._nodes = record.nodes or self._nodes
        if not record.digest:
            return
        if record.digest not in self._tasks:
            name = record.digest.removeprefix("sha256:")[:DIGEST_CHARACTERS]
            self._tasks[record.digest] = self._progress.add_task(name, total=None)
        self._progress.update(self._tasks[record.digest], completed=record.completed, total=record.total or None)

    def picture(self) -> Group:
        rows = [[node, status] for node, status in sorted(self._nodes.items())]
        return Group(self._progress, table(("NODE", "STATUS"), rows))


class _Lines:
    """`node: status` whenever it changed; no figures, so that a log stays short."""

    def __init__(self) -> None:
        self._nodes: dict[str, str] = {}

    def note(self, record: PullRecord) -> None:
        for node, status in sorted(record.nodes.items()):
            if self._nodes.get(node) != status:
                complain(f"{node}: {status}")
        self._nodes = record.nodes or self._nodes
