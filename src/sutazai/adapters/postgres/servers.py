"""
Which server is the primary, which replicas follow it, and how far each of them got.

Each server is asked for itself a few times a second, over a connection that serves nothing else. How late a replica is
needs no clock but ours: it is as late as the newest position of the primary that it is known to have replayed, counted
until now, so one that is silent grows late by itself.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Container, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import structlog

from sutazai.adapters.postgres.faults import REMEDY, told_as_unavailable
from sutazai.adapters.postgres.pool import Connection, Pool
from sutazai.core.errors import StoreUnavailable
from sutazai.core.mark import BEGINNING, Mark
from sutazai.policy.own_writes import OwnWrites

log = structlog.get_logger("sutazai.postgres")

LOOKS = 4
"""Looks at each server in the time that a replica may be late."""
SILENT_PART = 0.5
"""Of that time: whoever did not answer for so long is gone. Less than all of it, so that a primary that is silent
is known to be gone before the replicas are thought late."""
MARK_S = 0.5
"""What the answer to a write waits for its mark at most."""
KEPT_POSITIONS = 100
KEPT_PART = 0.05
"""Of that time: positions of looks that followed one another faster are not kept."""

Position = int
"""A place in the write-ahead log, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a server said about itself."""

    is_primary: bool
    timeline: int
    """
    Each promotion begins one, so that of two primaries the higher one is right.

    A replica may follow a newer one than it tells, never an older one.
    """
    position: Position
    """Flushed by a primary, replayed by a replica."""
    written: Position
    """By a primary: all that was committed is before it; 0 for a replica."""
    cluster: int
    """Which it belongs to: primary and replicas have the same number."""

    @property
    def source(self) -> int:
        """The cluster, as marks name it: in 32 bits, and not in the words that PostgreSQL uses."""
        return (self.cluster ^ self.cluster >> 32) & 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """What is known of a server now."""

    name: str
    is_primary: bool | None
    """None where it does not answer."""
    is_fresh: bool
    """Whether it is a replica that may be read from."""
    lag_s: float | None
    """How long ago a replica had last replayed where the primary was; None for others, and without a primary."""
    behind_bytes: int | None
    """What it has not replayed of the primary's log; None as above."""
    reads: int
    """Reads of clients that it answered."""
    fault: str
    """Why it did not answer; empty where it did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServersState:
    """What is known of all of them now."""

    servers: Sequence[ServerState]
    """In the order of the settings."""
    misses: int
    """Reads that a replica began to answer and did not; the primary was asked then."""
    primary_changes: int
    """How often another server was found to write than before."""


class Server:
    """One address."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.reads = 0
        """Reads of clients that it answered."""
        self.report: Report | None = None
        """None where it does not answer."""
        self.fault = ""
        """Why not, when it last did not."""
        self.was_asked = False
        self.fresh_at = time.monotonic()
        """When a replica had last replayed where the primary was then; or when it became known to us."""
        self.hurry = asyncio.Event()
        """Set where the next look should not wait."""
        self.looked_at = -math.inf
        """When the newest look began, be it over or not: seconds of the monotonic clock."""
        self._asking: Connection = None

    async def look(self, statement: str, *, within_s: float) -> None:
        """Ask it. Raises nothing."""
        self.looked_at = time.monotonic()
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
        if self.pool.is_direct:
            return Report(**await self._asking.fetchrow(statement))
        async with self._asking.transaction(readonly=True):
            return Report(**await self._asking.fetchrow(statement))


class Servers:
    """All addresses, and their roles as they were a moment ago."""

    def __init__(self, pools: Sequence[Pool], *, statement: str, max_lag_s: float) -> None:
        self.max_lag_s = max_lag_s
        self.misses = 0
        self._primary_changes = 0
        self._servers = [Server(pool) for pool in pools]
        self._statement = statement
        self._positions: deque[tuple[float, Position]] = deque(maxlen=KEPT_POSITIONS)
        """Where the primary was, and when: seconds of the monotonic clock, oldest first."""
        self._newest: tuple[float, Mark] = (-math.inf, BEGINNING)
        """When the newest look at the primary began, and what it had written."""
        self._own_writes = OwnWrites()
        self._timeline = 0
        """The newest that a primary was seen on."""
        self.leader: Server | None = None
        """The one that writes, as far as is known."""
        self._last_leader: Server | None = None
        self._news = asyncio.Event()

    @property
    def has_primary(self) -> bool:
        """Whether one is known."""
        return self.leader is not None

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
        while self.leader is None:
            await self._news.wait()
        return self.leader

    async def reader(self, after: Mark, tenant: str = "", *, but_not: Container[Server] = ()) -> Server:
        """
        The least busy replica that is fresh enough, and has all that the mark stands for and the tenant wrote.

        Else the primary; where none is known either, whoever comes first.
        """
        while True:
            await self.known()
            found = [server for server in self._replicas(after, tenant) if server not in but_not]
            if found:
                return min(found, key=lambda server: server.pool.in_use)
            if self.leader is not None:
                return self.leader
            await self._news.wait()

    def _replicas(self, after: Mark, tenant: str) -> Sequence[Server]:
        own = self._own_writes.needed(tenant)
        if own is None:
            return ()
        needed, least = self._needed(), max(own, after.position)
        found = [server for server in self._servers if self._serves(server, needed, least)]
        if after == BEGINNING:
            return found
        return [server for server in found if server.report and server.report.source == after.source]

    async def known(self) -> None:
        """Return once every server was asked."""
        while not all(server.was_asked for server in self._servers):
            await self._news.wait()

    def note(self, tenant: str) -> None:
        """It wrote something, or was told the newest, by now."""
        self._own_writes.note(tenant, time.monotonic())

    async def newest(self) -> Mark | None:
        """A mark of all that was written by now; None where the primary does not tell soon."""
        now = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(MARK_S):
                while self._newest[0] < now:
                    leader = await self.primary()
                    if leader.looked_at < now:
                        leader.hurry.set()
                    await self._news.wait()
                return self._newest[1]
        return None

    def doubt(self, server: Server) -> None:
        """Take it to be gone until it answers again, and ask it at once."""
        server.report = None
        server.hurry.set()
        self._choose()
        self._wake()

    def state(self) -> ServersState:
        """What is known now."""
        now, needed = time.monotonic(), self._needed()
        states = [
            ServerState(
                name=server.pool.name,
                is_primary=None if server.report is None else server is self.leader,
                is_fresh=self._serves(server, needed, 0),
                lag_s=None if (behind_bytes := self._behind_bytes(server)) is None else now - server.fresh_at,
                behind_bytes=behind_bytes,
                reads=server.reads,
                fault=server.fault if server.report is None else "",
            )
            for server in self._servers
        ]
        return ServersState(servers=states, misses=self.misses, primary_changes=self._primary_changes)

    def _needed(self) -> Position | None:
        """What a replica must have replayed to be fresh enough; None where that is not known."""
        oldest = time.monotonic() - self.max_lag_s
        return next((position for at, position in self._positions if at >= oldest), None)

    def _serves(self, server: Server, needed: Position | None, least: Position) -> bool:
        report = server.report
        if report is None or report.is_primary or report.position < least:
            return False
        if report.timeline < self._timeline:
            return False  # it may have replayed what the primary never had, and be ahead of it
        if self.leader is None:
            return True  # nobody writes, so nobody is late
        return needed is not None and report.position >= needed

    def _behind_bytes(self, server: Server) -> int | None:
        if server.report is None or server.report.is_primary or self.leader is None or not self._positions:
            return None
        return max(self._positions[-1][1] - server.report.position, 0)

    async def _watch(self, server: Server) -> None:
        while True:
            server.hurry.clear()
            began = time.monotonic()
            await server.look(self._statement, within_s=SILENT_PART * self.max_lag_s)
            self._choose()
            if server.report is not None and server is self.leader:
                self._learn(began, server.report)
            elif server.report is not None and server.report.timeline >= self._timeline:
                had = [at for at, position in self._positions if position <= server.report.position]
                server.fresh_at = max(had, default=server.fresh_at)
            self._wake()
            with suppress(TimeoutError):
                async with asyncio.timeout(self.max_lag_s / LOOKS):
                    await server.hurry.wait()

    def _learn(self, began: float, report: Report) -> None:
        """Where the primary was at some moment after `began`."""
        self._newest = began, Mark(report.source, report.written)
        self._own_writes.looked(began, report.written)
        self._timeline = max(self._timeline, report.timeline)
        if not self._positions or began - self._positions[-1][0] >= KEPT_PART * self.max_lag_s:
            self._positions.append((began, report.position))

    def _choose(self) -> None:
        """Say who leads now."""
        before, self.leader = self.leader, self._found_leader()
        if self.leader is before:
            return
        self._positions.clear()
        log.info("database primary changed", is_known=self.has_primary, server=self.leader and self.leader.pool.name)
        if self.leader is not None and self.leader is not self._last_leader:
            self._primary_changes += self._last_leader is not None
            self._last_leader = self.leader

    def _wake(self) -> None:
        """Whoever waits for news."""
        self._news.set()
        self._news = asyncio.Event()

    def _found_leader(self) -> Server | None:
        leaders = [server for server in self._servers if server.report is not None and server.report.is_primary]
        return max(leaders, key=lambda server: server.report.timeline if server.report else 0, default=None)
