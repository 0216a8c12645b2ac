"""
Looks whether those who move slots are alive, and lets nobody wait for one that is gone.

A mover beats in the directory. One whose beat this process has seen stand still for `GONE_S` of its own monotonic time
is gone; no clocks are compared, and the time between two looks counts as two of them at most, so a directory that
stands still lets nobody die. Every gateway and worker looks; what several do at once is done once. The move itself
stays unfinished, for `sutazai shards move` to end or tidy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import structlog

from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.sharded.handover import Handover, Seen
from sutazai.adapters.postgres.sharded.shards import Shards
from sutazai.core.errors import StoreUnavailable
from sutazai.policy.stillness import Stillness

log = structlog.get_logger("sutazai.shards")

LOOK_S = 1.0
GONE_S = 6.0
"""Six beats. With a look and what follows it, less than writers wait for a slot (`shards.PATIENCE_S`): none is refused.
A mover that stood still for so long has to be called again, which does no other harm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A slot on its way, as the directory has it."""

    slot: int
    source: str
    target: str
    mover: str
    beat: int
    """0 = its mover is known to be gone."""
    owner: str
    """Where readers are sent."""


class MoveWatch:
    """That of one process. `run` has to run beside the `Shards`."""

    def __init__(self, directory: Database, shards: Shards, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._shards = shards
        self._sql = directory.sql
        self._clock = clock
        self._stillness = Stillness[int](longest_step_s=2 * LOOK_S, now=clock())

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except StoreUnavailable as error:
                log.warning("nobody looked for movers of shard slots that are gone", why=error.message)
            except Exception:  # the border of one turn
                log.exception("nobody looked for movers of shard slots that are gone")

    async def look(self) -> None:
        """Do once what `run` does again and again. Raises `StoreUnavailable` where the directory is away."""
        async with self._directory.transaction() as connection:
            rows = await connection.fetch(self._sql["slot_moves"], self._shards.region)
        gone = self._gone([Move(**row) for row in rows])
        for (source, target), found in groupby(sorted(gone, key=_ways), key=_ways):
            if source in self._shards.databases and target in self._shards.databases:
                try:
                    await self._free(source, target, list(found))
                except StoreUnavailable as error:
                    log.warning(
                        "a mover of shard slots is gone, and its tenants wait", target=target, why=error.message
                    )

    def _gone(self, moves: Sequence[Move]) -> Sequence[Move]:
        """Those whose mover is gone, but for what nobody waits for: it was seen before, and readers are sent right."""
        beats = {move.slot: (move.mover, move.beat) for move in moves}
        still = self._stillness.look(beats, now=self._clock())
        return [move for move in moves if (still[move.slot] >= GONE_S if move.beat else move.owner != move.target)]

    async def _free(self, source: str, target: str, moves: Sequence[Move]) -> None:
        """Give to the target what it owns, and back to the source all else."""
        handover = Handover(
            self._directory,
            self._shards.region,
            source=self._shards.databases[source],
            target=self._shards.databases[target],
            slots=[move.slot for move in moves],
        )
        seen = await handover.look()
        # After the look: a mover that begins anew stands here first, so nothing that was seen is of its making.
        stopped = await self._stop([move for move in moves if move.beat or _is_open(move.slot, seen)])
        if not stopped:
            return
        back, owned = await handover.take_back(seen.of(stopped))
        given = await handover.give(
            {move.slot: move.mover for move in moves if move.slot in owned & stopped and move.owner != target}
        )
        log.warning(
            "a mover of shard slots is gone; nobody waits for it",
            source=source,
            target=target,
            slots=len(stopped),
            given=len(given),
            taken_back=len(back),
        )

    async def _stop(self, moves: Sequence[Move]) -> frozenset[int]:
        """Write down that their movers are gone; those that were not heard of since the look."""
        if not moves:
            return frozenset()
        columns = [[getattr(move, name) for move in moves] for name in ("slot", "mover", "beat")]
        async with self._directory.transaction() as connection:
            rows = await connection.fetch(self._sql["stop_slot_moves"], self._shards.region, *columns)
        return frozenset(row["slot"] for row in rows)


def _is_open(slot: int, seen: Seen) -> bool:
    """Whether somebody may wait for it, or may be handed it still."""
    return slot in seen.left or slot in seen.arriving


def _ways(move: Move) -> tuple[str, str]:
    return move.source, move.target
