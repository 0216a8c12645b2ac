"""
Who looks at a task gets a bell that rings when something happens to it: one listener for all of a gateway's watchers.

Where the listener cannot tell what changed (its connection was away, or nothing came for a while), one query looks at
the versions of all that are watched. So a thousand watchers cost no more queries than one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog

from sutazai.core.errors import Overloaded, StoreUnavailable
from sutazai.ports.tasks import TaskStore

log = structlog.get_logger("sutazai.tasks")

MAX_WATCHERS = 10_000
AT_ONCE = 1000
"""Versions asked for in one query."""
RETRY_AFTER_S = 5.0


class Bell:
    """Rings when something happened to a task."""

    __slots__ = ("_rung", "task", "version")

    def __init__(self, task: str, version: int) -> None:
        self.task = task
        self.version = version
        """What its holder has seen; kept up by the holder."""
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Something happened, or may have."""
        self._rung.set()

    async def wait(self) -> None:
        """Until it rings; rings before this call count."""
        await self._rung.wait()
        self._rung.clear()


class Watch:
    """All watchers of one gateway. `run` has to run beside it."""

    def __init__(self, store: TaskStore, *, max_watchers: int = MAX_WATCHERS) -> None:
        self._store = store
        self._max_watchers = max_watchers
        self._bells: dict[str, set[Bell]] = {}
        self.watchers = 0

    @contextmanager
    def bell(self, task: str, *, seen: int) -> Iterator[Bell]:
        """
        A bell for this task as long as the context lasts.

        Args:
            seen: the version that is known already.

        Raises `Overloaded` where too many watch.
        """
        if self.watchers >= self._max_watchers:
            raise Overloaded(
                f"{self.watchers:,} clients watched tasks here already. Ask for the task itself, or come back later.",
                retry_after_s=RETRY_AFTER_S,
            )
        bell = Bell(task, seen)
        self._bells.setdefault(task, set()).add(bell)
        self.watchers += 1
        try:
            yield bell
        finally:
            self.watchers -= 1
            bells = self._bells[task]
            bells.discard(bell)
            if not bells:
                del self._bells[task]

    async def run(self) -> None:
        """Listen until cancelled."""
        async for changed in self._store.changed():
            if changed:
                self._ring(changed)
            else:
                await self._look()

    def _ring(self, tasks: frozenset[str]) -> None:
        for task in tasks & self._bells.keys():
            for bell in self._bells[task]:
                bell.ring()

    async def _look(self) -> None:
        """Ring for those that changed without a word."""
        watched = list(self._bells)
        for start in range(0, len(watched), AT_ONCE):
            try:
                versions = await self._store.versions(watched[start : start + AT_ONCE])
            except StoreUnavailable as error:
                log.warning("watched tasks were not looked at; they will be soon", why=error.message)
                return
            self._ring_newer(list(versions.items()))

    def _ring_newer(self, versions: Sequence[tuple[str, int]]) -> None:
        for task, version in versions:
            for bell in self._bells.get(task, ()):
                if bell.version < version:
                    bell.ring()
