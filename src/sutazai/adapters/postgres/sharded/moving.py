"""
Moves shard slots from one shard to another while their tenants go on working.

    expected   the target says that the rows of the slot are on their way, so that nothing there touches them
    copied     all rows, and then what changed meanwhile, again and again until that is little
    fenced     the source gives the slot up once all who are in have ended; from now on everybody waits
    compared   the last changes are copied, and both sides are counted
    owned      the target owns the slot
    given      the directory says so, and everybody goes on
    tidied     word of tasks follows, and the source drops the rows

Whoever is killed in between is followed by somebody who calls `move` again: a slot that the target owns is only given
and tidied, and in all other states the source takes the slot back and all begins anew. Attempts of tasks go on
throughout; their next word finds the task where it is by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from time import monotonic

import asyncpg

from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.sharded.rows import Rows
from sutazai.adapters.postgres.sharded.shards import ANY, Shards
from sutazai.core.errors import BadRequest, Conflict, StoreUnavailable
from sutazai.policy.sharding import SlotMove

FEW = 200
"""Tasks that changed during a pass: few enough for the last one."""
FENCE_S = 2.0
"""How long one try to fence a slot waits for those who are in, while others wait behind it."""
FENCE_PAUSE_S = 1.0
FENCE_TRIES = 15
EMPTY_AT_ONCE = 512
"""Slots without a row, moved together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Slots that are in another shard now."""

    slots: Sequence[int]
    source: str
    target: str
    rows: Mapping[str, int]
    """How many rows of each table both sides had, when they were compared; empty where that was before."""
    pause_s: float
    """How long the tenants of these slots had to wait."""
    took_s: float


@dataclass(slots=True)
class Progress:
    """How far a move is."""

    slots: Sequence[int]
    target: str
    step: str = "begun"
    copied: int = 0
    of: int = 0
    """Tasks that there were when it began; other rows are copied beside them."""
    since: float = field(default_factory=monotonic)


Note = Callable[[Progress], None]


class Mover:
    """Moves slots within a region. Several at once are no help, but do no harm."""

    def __init__(
        self,
        directory: Database,
        shards: Shards,
        *,
        note: Note = lambda _: None,
        after: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        """
        Args:
            note: told of every piece.
            after: called after each step, with its name.
        """
        self._directory = directory
        self._shards = shards
        self._sql = directory.sql
        self._note = note
        self._after = after

    async def plan(self, moves: Sequence[SlotMove]) -> Sequence[Sequence[SlotMove]]:
        """What to move together: a slot with rows alone, and those without, or that have arrived, in large groups."""
        groups: list[Sequence[SlotMove]] = []
        for (source, target), found in groupby(sorted(moves, key=_ways), key=_ways):
            all_ = list(found)
            owned = await self._owned(target, [move.slot for move in all_])
            if owned:
                groups.append([move for move in all_ if move.slot in owned])
            same = [move for move in all_ if move.slot not in owned]
            full = await self._with_rows(source, [move.slot for move in same])
            groups += [[move] for move in same if move.slot in full]
            empty = [move for move in same if move.slot not in full]
            groups += [empty[start : start + EMPTY_AT_ONCE] for start in range(0, len(empty), EMPTY_AT_ONCE)]
        return groups

    async def _with_rows(self, source: str, slots: Collection[int]) -> frozenset[int]:
        database = self._of(source)
        rows = Rows(database, database, list(slots))
        tenants = await rows.tenants()
        async with database.transaction() as connection:
            found = await connection.fetch(
                "SELECT DISTINCT sutazai_slot(tenant) AS slot FROM unnest($1::text[]) AS had (tenant)", tenants
            )
        return frozenset(row["slot"] for row in found)

    async def move(self, slots: Sequence[int], *, source: str, target: str) -> Moved:
        """
        Move slots that one shard owns; one that is on its way already is brought to its end.

        Raises `Conflict` where one is on its way somewhere else, and `StoreUnavailable`: then the source has it, or
        it is on its way still, and the same call brings it to its end.
        """
        began = monotonic()
        slots = sorted(slots)
        await self._begin(slots, source, target)
        progress = Progress(slots, target)
        rows = Rows(self._of(source), self._of(target), slots)
        counts: Mapping[str, int] = {}
        pause_s = 0.0
        if not await self._is_owned(target, slots):
            await self._take_back(source, target, slots)
            counts, pause_s = await self._carry(rows, source, target, slots, progress)
        else:
            await self._give(slots, target)
        await self._step("given", progress)
        await self._tidy(rows, source, slots)
        await self._step("tidied", progress)
        return Moved(
            slots=slots, source=source, target=target, rows=counts, pause_s=pause_s, took_s=monotonic() - began
        )

    async def _carry(
        self, rows: Rows, source: str, target: str, slots: Sequence[int], progress: Progress
    ) -> tuple[Mapping[str, int], float]:
        """From the first row to the directory's word; the numbers of rows, and the pause in seconds."""

        def note() -> None:
            progress.copied = rows.copied
            self._note(progress)

        async with self._of(target).transaction() as connection:
            if len(await connection.fetch(self._sql["expect_slots"], slots, rows.mover)) != len(slots):
                raise StoreUnavailable(f"The shard {target!r} owned a slot meanwhile. Begin the move again.")
        await self._step("expected", progress)
        mark = await rows.mark()
        tenants = await rows.tenants()
        progress.of = await rows.count(tenants)
        await rows.copy_tasks(tenants, note)
        await rows.copy_tables(tenants, note)
        changed, before = progress.of, 2 * progress.of + 1
        while FEW < changed < before / 2:  # until it is little, or does not become less
            since, mark = mark, await rows.mark()
            changed, before = await rows.copy_changed(since), changed
            note()
        await self._step("copied", progress)
        try:
            began = await self._fence(source, slots)
            await self._step("fenced", progress)
            tenants = await rows.tenants()
            await rows.copy_changed(mark)
            await rows.copy_tables(tenants, note)
            counts = await rows.verify(tenants)
            await self._step("compared", progress)
            await self._own(source, target, slots, rows.mover)
            await self._step("owned", progress)
            await self._give(slots, target)
        except BaseException:
            # Also where this process is told to end: nobody is to wait for somebody who comes and finishes it.
            with suppress(StoreUnavailable):
                await asyncio.shield(self._take_back(source, target, slots))
            raise
        return counts, monotonic() - began

    async def _begin(self, slots: Sequence[int], source: str, target: str) -> None:
        async with self._directory.transaction() as connection:
            rows = await connection.fetch(self._sql["begin_slot_moves"], self._shards.region, slots, source, target)
            for slot, from_, to in rows:
                if (from_, to) != (source, target):
                    raise Conflict(
                        f"The slot {slot} is on its way from {from_!r} to {to!r}. "
                        f"Finish that first with `sutazai shards move --slot {slot} --to {to}`."
                    )

    async def _is_owned(self, shard: str, slots: Sequence[int]) -> bool:
        owned = await self._owned(shard, slots)
        if len(owned) not in {0, len(slots)}:
            raise Conflict("Some of these slots have arrived already. Move them one by one.")
        return bool(owned)

    async def _owned(self, shard: str, slots: Sequence[int]) -> frozenset[int]:
        """Those that it owns."""
        async with self._of(shard).transaction() as connection:
            rows = await connection.fetch(self._sql["slot_states"], slots)
        return frozenset(row["slot"] for row in rows if row["state"] == "owned")

    async def _take_back(self, source: str, target: str, slots: Sequence[int]) -> None:
        """Let the source own them again, unless the target does: first nobody can hand them over any more."""
        async with self._of(target).transaction() as connection:
            await connection.execute(self._sql["turn_slots"], slots, "arriving", "abandoned")
        if not await self._is_owned(target, slots):
            async with self._of(source).transaction() as connection:
                await connection.execute(self._sql["turn_slots"], slots, "left", "owned")

    async def _fence(self, source: str, slots: Sequence[int]) -> float:
        """Let the source give the slots up; when others began to wait."""
        for tries_left in reversed(range(FENCE_TRIES)):
            began = monotonic()
            try:
                async with self._of(source).transaction(within_s=2 * FENCE_S) as connection:
                    await connection.execute(f"SET LOCAL lock_timeout = '{FENCE_S:g}s'")
                    await connection.execute(self._sql["fence_slots"], [*ANY, *slots], timeout=2 * FENCE_S)
                    if len(await connection.fetch(self._sql["turn_slots"], slots, "owned", "left")) != len(slots):
                        raise StoreUnavailable(f"The shard {source!r} did not own all of the slots. Begin again.")
                return began
            except StoreUnavailable as error:
                if not tries_left or not isinstance(error.__cause__, asyncpg.LockNotAvailableError):
                    raise
            await asyncio.sleep(FENCE_PAUSE_S)
        raise AssertionError("the last try returns or raises")

    async def _own(self, source: str, target: str, slots: Sequence[int], mover: str) -> None:
        async with self._of(source).transaction() as connection:
            number = await connection.fetchval(self._sql["last_message_number"])
        async with self._of(target).transaction() as connection:
            await connection.fetchval(self._sql["raise_message_number"], number)
            if len(await connection.fetch(self._sql["own_slots"], slots, mover)) != len(slots):
                raise StoreUnavailable("Another process moved the slots too, and was first. Look with `shards list`.")

    async def _give(self, slots: Sequence[int], target: str) -> None:
        async with self._directory.transaction() as connection:
            await connection.execute(self._sql["give_slots"], self._shards.region, slots, target)

    async def _tidy(self, rows: Rows, source: str, slots: Sequence[int]) -> None:
        await rows.move_words()
        if await self._has_left(source, slots):
            await rows.drop(await rows.tenants())
            async with self._of(source).transaction() as connection:
                await connection.execute(self._sql["drop_slots"], slots, "left")
        async with self._directory.transaction() as connection:
            await connection.execute(self._sql["end_slot_moves"], self._shards.region, slots)

    async def _has_left(self, source: str, slots: Sequence[int]) -> bool:
        """Whether its rows are there to be dropped."""
        async with self._of(source).transaction() as connection:
            states = [row["state"] for row in await connection.fetch(self._sql["slot_states"], slots)]
        return "left" in states

    async def _step(self, name: str, progress: Progress) -> None:
        progress.step = name
        self._note(progress)
        if self._after is not None:
            await self._after(name)

    def _of(self, shard: str) -> Database:
        database = self._shards.databases.get(shard)
        if database is None:
            known = ", ".join(self._shards.databases) or "none"
            raise BadRequest(f"No shard {shard!r} is in `[[shards]]` of this region; there are: {known}.", where="to")
        return database


def _ways(move: SlotMove) -> tuple[str, str]:
    return move.source, move.target
