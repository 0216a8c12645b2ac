"""
Which server is the primary, which replicas follow it, and how far each of them got.

Each server is asked for itself a few times a second, over a connection that serves nothing else. How late a replica is
needs no clock but ours: it is as late as the newest position of the primary that it is known to have replayed, counted
until now, so one that is silent grows late by itself.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import structlog

from sutazai.adapters.postgres.faults import REMEDY, told_as_unavailable
from sutazai.adapters.postgres.pool import Connection, Pool
from sutazai.core.errors import StoreUnavailable

log = structlog.get_logger("sutazai.postgres")

LOOKS = 4
"""Looks at each server in the time that a replica may be late."""
SILENT_PART = 0.5
"""Of that time: whoever did not answer for so long is gone. Less than all of it, so that a primary that is silent
is known to be gone before the replicas are thought late."""
KEPT_POSITIONS = 100

Position = int
"""A place in the write-ahead log, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a server said about itself."""

    is_primary: bool
    timeline: int
    """Of a primary: each promotion begins one, so that of two primaries the higher one is right."""
    position: Position
    """Flushed by a primary, replayed by a replica."""


class Server:
    """One address."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.report: Report | None = None
        """None where it does not answer."""
        self.fault = ""
        """Why not, when it last did not."""
        self.was_asked = False
        self.hurry = asyncio.Event()
        """Set where the next look should not wait."""
        self._asking: Connection = None

    async def look(self, statement: str, *, within_s: float) -> None:
        """Ask it. Raises nothing."""
        try:
            with told_as_unavailable(within_s):
                async with asyncio.timeout(within_s):
                    self.report = await self._ask(statement)
        except StoreUnavailable as error:
            self.report = None
            self.fault = error.message.removesuffix(REMEDY).rstrip()
            self.close()
        self.was_asked = True

    def close(self) -> None:
        """Let go of the connection for questions."""
        if self._asking is not None:
            self._asking.terminate()
            self._asking = None

    async def _ask(self, statement: str) -> Report:
        if self._asking is None:
            self._asking = await self.pool.connect()
        async with self._asking.transaction(readonly=True):
            return Report(**await self._asking.fetchrow(statement))


class Servers:
    """All addresses, and their roles as they were a moment ago."""

    def __init__(self, pools: Sequence[Pool], *, statement: str, max_lag_s: float) -> None:
        self.max_lag_s = max_lag_s
        self._servers = [Server(pool) for pool in pools]
        self._statement = statement
        self._positions: deque[tuple[float, Position]] = deque(maxlen=KEPT_POSITIONS)
        """Where the primary was, and when: seconds of the monotonic clock, oldest first."""
        self._leader: Server | None = None
        self._news = asyncio.Event()

    @property
    def has_primary(self) -> bool:
        """Whether one is known."""
        return self._leader is not None

    @property
    def fault(self) -> str:
        """What was wrong with one that does not answer; empty where all do."""
        return next((server.fault for server in self._servers if server.report is None and server.fault), "")

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Keep asking."""
        tasks = [asyncio.create_task(self._watch(server), name="watch database server") for server in self._servers]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for server in self._servers:
                server.close()

    async def primary(self) -> Server:
        """The one that writes, as soon as there is one."""
        while self._leader is None:
            await self._news.wait()
        return self._leader

    async def replicas(self, after: Position | None) -> Sequence[Server]:
        """Those that are fresh enough and have replayed the position, the least busy first."""
        while not all(server.was_asked for server in self._servers):
            await self._news.wait()
        needed = self._needed()
        found = [server for server in self._servers if self._serves(server, needed, after)]
        return sorted(found, key=lambda server: server.pool.in_use)

    def doubt(self, server: Server) -> None:
        """Take it to be gone until it answers again, and ask it at once."""
        server.report = None
        server.hurry.set()
        self._tell()

    def _needed(self) -> Position | None:
        """What a replica must have replayed to be fresh enough; None where that is not known."""
        oldest = time.monotonic() - self.max_lag_s
        return next((position for at, position in self._positions if at >= oldest), None)

    def _serves(self, server: Server, needed: Position | None, after: Position | None) -> bool:
        report = server.report
        if report is None or report.is_primary or (after is not None and report.position < after):
            return False
        if self._leader is None:
            return True  # nobody writes, so nobody is late
        return needed is not None and report.position >= needed

    async def _watch(self, server: Server) -> None:
        while True:
            server.hurry.clear()
            began = time.monotonic()
            await server.look(self._statement, within_s=SILENT_PART * self.max_lag_s)
            self._tell()
            if server.report is not None and server is self._leader:
                self._positions.append((began, server.report.position))
            with suppress(TimeoutError):
                async with asyncio.timeout(self.max_lag_s / LOOKS):
                    await server.hurry.wait()

    def _tell(self) -> None:
        """Say who leads now, and wake whoever waits for news."""
        before, self._leader = self._leader, self._found_leader()
        if self._leader is not before:
            self._positions.clear()
            log.info("database primary changed", is_known=self.has_primary)
        self._news.set()
        self._news = asyncio.Event()

    def _found_leader(self) -> Server | None:
        leaders = [server for server in self._servers if server.report is not None and server.report.is_primary]
        return max(leaders, key=lambda server: server.report.timeline if server.report else 0, default=None)
