"""
Carries events and messages of agents to the stream: at least once, in their order, and from where it was left.

One process carries each source at a time, and others stand by. Whether the carrier lives is told by a beat that they
watch by their own clocks. A carrier that stood still and wakes may tell again what the next one has told, never
anything that was not told before: both began at the same place, and tell in the same order. So readers who pass over
what they know (`ports.broadcasts.Unseen`) see everything once and in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

import structlog

from sutazai.core.errors import StoreUnavailable
from sutazai.ports.broadcasts import BroadcastStore, Notice, Source, Turn, encode

log = structlog.get_logger("sutazai.tasks")

Append = Callable[[Sequence[bytes]], Awaitable[None]]
"""Adds messages at the end of the stream, in their order; on return they are safe."""

AT_ONCE = {Source.EVENTS: 256, Source.MESSAGES: 64}
"""Notices read together. One of an event has 64 KiB at most, one of a message some MiB."""
MESSAGE_BYTES = 256 * 1024
"""Of the stream. Few large messages cost the broker and us far less than many small ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """How often a carrier looks and beats, in seconds."""

    look_s: float = 0.5
    """Between two looks at a source that had nothing new."""
    beat_s: float = 1.0
    lease_s: float = 4.0
    """A carrier whose beat stands still for so long is gone."""
    longest_pause_s: float = 5.0
    """Between two tries where the broker or the database is away."""


USUAL = Rhythm()


class Broadcast:
    """Carries one source, or stands by."""

    def __init__(
        self,
        store: BroadcastStore,
        source: Source,
        append: Append,
        *,
        wall: Callable[[], datetime],
        rhythm: Rhythm = USUAL,
    ) -> None:
        self.source = source
        self.shard = store.shard
        self._store = store
        self._append = append
        self._wall = wall
        self._rhythm = rhythm
        self.carried = 0
        """Notices that this process has told."""
        self.behind = 0
        """Positions that were not told at the last look, about; 0 where another process carries."""
        self._waits_since: datetime | None = None

    @property
    def behind_s(self) -> float:
        """For how long the oldest notice has waited that this process is to tell."""
        return 0.0 if self._waits_since is None else max(0.0, (self._wall() - self._waits_since).total_seconds())

    async def run(self) -> None:
        """Carry, or stand by, until cancelled."""
        pause_s = self._rhythm.look_s
        while True:
            carried = self.carried
            try:
                await self._carry(await self._turn())
            except StoreUnavailable as error:
                log.warning("what is to be told on the stream waits", source=self.source.value, why=error.message)
            except Exception:  # the border of one turn
                log.exception("what is to be told on the stream waits", source=self.source.value)
            pause_s = self._rhythm.look_s if self.carried > carried else min(2 * pause_s, self._rhythm.longest_pause_s)
            await asyncio.sleep(pause_s)

    async def _turn(self) -> Turn:
        """Wait until nobody else carries."""
        clock = asyncio.get_running_loop().time
        seen: Turn | None = None
        still_s, looked_at = 0.0, clock()
        while True:
            turn = await self._store.turn(self.source)
            now = clock()
            # Of a longer time it was we who stood still, or the database.
            passed_s, looked_at = min(now - looked_at, 2 * self._rhythm.beat_s), now
            still_s = still_s + passed_s if turn == seen else 0.0
            seen = turn
            if turn.beat == 0 or still_s >= self._rhythm.lease_s:
                taken = await self._store.take(self.source, turn)
                if taken is not None:
                    return taken
            self.behind, self._waits_since = 0, None
            await asyncio.sleep(self._rhythm.beat_s)

    async def _carry(self, turn: Turn) -> None:
        """Tell what there is, and what comes, until another process carries."""
        log.info("this process carries to the stream", source=self.source.value, position=turn.position)
        clock = asyncio.get_running_loop().time
        position, beat_at = turn.position, clock()
        is_mine = True
        try:
            while is_mine:
                page = await self._store.notices(self.source, after=position, limit=AT_ONCE[self.source])
                is_full = len(page.notices) == AT_ONCE[self.source]
                self.behind = page.newest - position if is_full else len(page.notices)
                self._waits_since = page.notices[0].at if page.notices else None
                if page.notices:
                    is_mine = await self._tell(page.notices, turn.fence, position)
                if is_mine and page.notices:
                    position = page.notices[-1].position
                    self.carried += len(page.notices)
                    self.behind, self._waits_since = max(0, self.behind - len(page.notices)), None
                if is_mine and (page.notices or clock() - beat_at >= self._rhythm.beat_s):
                    is_mine, beat_at = await self._store.advance(self.source, turn.fence, position), clock()
                if is_mine and not is_full:
                    await asyncio.sleep(self._rhythm.look_s)
            log.info("another process carries to the stream", source=self.source.value)
        finally:
            with suppress(StoreUnavailable):
                await self._store.leave(self.source, turn.fence)

    async def _tell(self, notices: Sequence[Notice], fence: int, position: int) -> bool:
        """Tell these, and beat meanwhile; False where another process carries by now, which tells them too."""
        messages = list(encode(notices, max_bytes=MESSAGE_BYTES))
        telling = asyncio.create_task(_told(self._append, messages), name="tell on the stream")
        try:
            while not telling.done():
                await asyncio.wait({telling}, timeout=self._rhythm.beat_s)
                if not telling.done() and not await self._store.advance(self.source, fence, position):
                    return False
            telling.result()
            return True
        finally:
            telling.cancel()
            await asyncio.wait({telling})


async def _told(append: Append, messages: Sequence[bytes]) -> None:
    # One after the other: what is sent together may be kept in another order where a node fails meanwhile.
    for message in messages:
        await append([message])
