"""
Moves shard slots from one shard to another while their tenants go on working.

    begun      the directory has the move, and who makes it
    expected   the target says that the rows of the slot are on their way, so that nothing there touches them
    copied     all rows, and then what changed meanwhile, again and again until that is little
    fenced     the source gives the slot up once all who are in have ended; from now on everybody waits
    compared   the last changes are copied, and both sides are counted
    owned      the target owns the slot
    given      the directory says so, and everybody goes on
    tidied     word of tasks follows, and the source drops the rows

Whoever is killed in between is followed by somebody who calls `move` again: a slot that the target owns is only given
and tidied, and in all other states the source takes the slot back and all begins anew. Until then nobody waits: a mover
beats in the directory, and once its beat stands still a gateway or worker (`watching`) gives the slot to the target
that owns it, or back to its source. A mover that was only slow finds that at its next step, and ends.

Attempts of tasks go on throughout; their next word finds the task where it is by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from time import monotonic
from uuid import uuid4

import asyncpg

from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.sharded.handover import OVERTAKEN, Handover, Seen
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
BEAT_S = 1.0
"""Between two signs of life."""
BEAT_LIMIT_S = 5.0
"""For one of them."""


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
        beat_s: float = BEAT_S,
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
        self._beat_s = beat_s

    async def plan(self, moves: Sequence[SlotMove]) -> Sequence[Sequence[SlotMove]]:
        """What to move together: a slot with rows alone, and those without, or that have arrived, in large groups."""
        groups: list[Sequence[SlotMove]] = []
        for (source, target), found in groupby(sorted(moves, key=_ways), key=_ways):
            all_ = list(found)
            owned = (await self._handover([move.slot for move in all_], source, target).look()).owned
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
        rows = Rows(database, database, list(slots), mover="")
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
        handover, mover = self._handover(slots, source, target), uuid4().hex
        await self._begin(slots, source, target, mover)
        progress = Progress(slots, target)
        rows = Rows(handover.source, handover.target, slots, mover)
        counts: Mapping[str, int] = {}
        pause_s = 0.0
        async with self._beating(slots, mover):
            await self._step("begun", progress)
            seen = await handover.look()
            await self._check(slots, mover)  # so all of it is what those before us have left
            if len(seen.owned) not in {0, len(slots)}:
                raise Conflict("Some of these slots have arrived already. Move them one by one.")
            if seen.owned:
                await self._give(handover, mover)
            else:
                await handover.take_back(seen)
                counts, pause_s = await self._carry(rows, handover, mover, progress)
            await self._step("given", progress)
            await self._tidy(rows, handover, mover)
        await self._step("tidied", progress)
        return Moved(
            slots=slots, source=source, target=target, rows=counts, pause_s=pause_s, took_s=monotonic() - began
        )

    async def _carry(
        self, rows: Rows, handover: Handover, mover: str, progress: Progress
    ) -> tuple[Mapping[str, int], float]:
        """From the first row to the directory's word; the numbers of rows, and the pause in seconds."""
        slots = handover.slots

        def note() -> None:
            progress.copied = rows.copied
            self._note(progress)

        async with handover.target.transaction() as connection:
            if len(await connection.fetch(self._sql["expect_slots"], slots, mover)) != len(slots):
                raise StoreUnavailable(f"The shard {progress.target!r} owned a slot meanwhile. Begin the move again.")
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
        await self._check(slots, mover)
        try:
            began = await self._fence(handover, mover)
            await self._step("fenced", progress)
            tenants = await rows.tenants()
            await rows.copy_changed(mark)
            await rows.copy_tables(tenants, note)
            counts = await rows.verify(tenants)
            await self._step("compared", progress)
            await self._check(slots, mover)
            await self._own(handover, mover)
            await self._step("owned", progress)
            await self._give(handover, mover)
        except BaseException:
            # Also where this process is told to end: nobody is to wait for somebody who comes and finishes it.
            ours = dict.fromkeys(slots, mover)
            with suppress(StoreUnavailable):
                await asyncio.shield(handover.take_back(Seen(left=ours, arriving=ours, owned=frozenset())))
            raise
        return counts, monotonic() - began

    async def _begin(self, slots: Sequence[int], source: str, target: str, mover: str) -> None:
        async with self._directory.transaction() as connection:
            statement = self._sql["begin_slot_moves"]
            rows = await connection.fetch(statement, self._shards.region, slots, source, target, mover)
            for slot, from_, to in rows:
                if (from_, to) != (source, target):
                    raise Conflict(
                        f"The slot {slot} is on its way from {from_!r} to {to!r}. "
                        f"Finish that first with `sutazai shards move --slot {slot} --to {to}`."
                    )

    @asynccontextmanager
    async def _beating(self, slots: Sequence[int], mover: str) -> AsyncIterator[None]:
        """Give signs of life meanwhile."""
        # No task group: it would wrap what the caller raises.
        beating = asyncio.create_task(self._beat(slots, mover), name="tell that slots are moved")
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.wait([beating])

    async def _beat(self, slots: Sequence[int], mover: str) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            with suppress(StoreUnavailable):  # whether we were overtaken is found by the next step
                await self._check(slots, mover)

    async def _check(self, slots: Sequence[int], mover: str) -> None:
        """Give a sign of life. Raises `StoreUnavailable` where the move is another's, or we were taken for gone."""
        async with self._directory.transaction(within_s=BEAT_LIMIT_S) as connection:
            rows = await connection.fetch(self._sql["beat_slot_moves"], self._shards.region, slots, mover)
        if len(rows) != len(slots):
            raise StoreUnavailable(OVERTAKEN)

    async def _fence(self, handover: Handover, mover: str) -> float:
        """Let the source give the slots up; when others began to wait."""
        slots = handover.slots
        for tries_left in reversed(range(FENCE_TRIES)):
            began = monotonic()
            try:
                async with handover.source.transaction(within_s=2 * FENCE_S) as connection:
                    await connection.execute(f"SET LOCAL lock_timeout = '{FENCE_S:g}s'")
                    await connection.execute(self._sql["fence_slots"], [*ANY, *slots], timeout=2 * FENCE_S)
                    if len(await connection.fetch(self._sql["leave_slots"], slots, mover)) != len(slots):
                        raise StoreUnavailable("The source did not own all of the slots. Begin the move again.")
                return began
            except StoreUnavailable as error:
                if not tries_left or not isinstance(error.__cause__, asyncpg.LockNotAvailableError):
                    raise
            await asyncio.sleep(FENCE_PAUSE_S)
        raise AssertionError("the last try returns or raises")

    async def _own(self, handover: Handover, mover: str) -> None:
        async with handover.source.transaction() as connection:
            number = await connection.fetchval(self._sql["last_message_number"])
        async with handover.target.transaction() as connection:
            await connection.fetchval(self._sql["raise_message_number"], number)
            if len(await connection.fetch(self._sql["own_slots"], handover.slots, mover)) != len(handover.slots):
                raise StoreUnavailable(OVERTAKEN)

    async def _give(self, handover: Handover, mover: str) -> None:
        await self._check(handover.slots, mover)
        if len(await handover.give(dict.fromkeys(handover.slots, mover))) != len(handover.slots):
            raise StoreUnavailable(OVERTAKEN)

    async def _tidy(self, rows: Rows, handover: Handover, mover: str) -> None:
        await rows.move_words()
        seen = await handover.look()
        await self._check(handover.slots, mover)
        left = sorted(await handover.adopt(mover, seen))
        if len(left) != len(seen.left):
            raise StoreUnavailable(OVERTAKEN)
        if left:
            theirs = Rows(handover.source, handover.target, left, mover)
            await theirs.drop(await theirs.tenants())
            async with handover.source.transaction() as connection:
                await connection.execute(self._sql["drop_slots"], left, mover)
        async with self._directory.transaction() as connection:
            ended = await connection.fetch(self._sql["end_slot_moves"], self._shards.region, handover.slots, mover)
        if len(ended) != len(handover.slots):
            raise StoreUnavailable(OVERTAKEN)

    async def _step(self, name: str, progress: Progress) -> None:
        progress.step = name
        self._note(progress)
        if self._after is not None:
            await self._after(name)

    def _handover(self, slots: Sequence[int], source: str, target: str) -> Handover:
        return Handover(
            self._directory, self._shards.region, source=self._of(source), target=self._of(target), slots=slots
        )

    def _of(self, shard: str) -> Database:
        database = self._shards.databases.get(shard)
        if database is None:
            known = ", ".join(self._shards.databases) or "none"
            raise BadRequest(f"No shard {shard!r} is in `[[shards]]` of this region; there are: {known}.", where="to")
        return database


def _ways(move: SlotMove) -> tuple[str, str]:
    return move.source, move.target
