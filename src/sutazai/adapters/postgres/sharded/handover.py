"""
Who owns slots that are on their way: what a mover does about it, and whoever comes after one that is gone.

Each mover has an id, which stands beside a slot wherever it is not simply owned: in the directory (whose move it is),
in the source (who fenced it) and in the target (who may own it). A change is made only while the id that was seen
stands there still, and no mover does the same twice. So whoever was slow, and acts on what it saw long ago, changes
nothing: not what a later mover has begun, nor a later move the other way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sutazai.adapters.postgres.database import Database

OVERTAKEN = (
    "Another process moved the slots too, or took this one for gone, as it gave no sign of life. "
    "Look with `sutazai shards list`, and call the same command again."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Slots as they stood; by slot, the ids of movers."""

    left: Mapping[int, str]
    """Those that the source does not own any more, and who fenced them."""
    arriving: Mapping[int, str]
    """Those that the target expects, and from whom."""
    owned: frozenset[int]
    """Those that the target owns."""

    def of(self, slots: Collection[int]) -> Seen:
        """The same of these alone."""
        return Seen(
            left={slot: mover for slot, mover in self.left.items() if slot in slots},
            arriving={slot: mover for slot, mover in self.arriving.items() if slot in slots},
            owned=self.owned.intersection(slots),
        )


class Handover:
    """Slots of a region that go from one shard to another. Methods raise `StoreUnavailable`."""

    def __init__(
        self, directory: Database, region: str, *, source: Database, target: Database, slots: Sequence[int]
    ) -> None:
        self._directory = directory
        self._region = region
        self.source = source
        self.target = target
        self.slots = slots
        self._sql = directory.sql

    async def look(self) -> Seen:
        """The source first: a mover that has fenced a slot there was expected at the target before."""
        here = await self._states(self.source)
        there = await self._states(self.target)
        return Seen(left=_in(here, "left"), arriving=_in(there, "arriving"), owned=frozenset(_in(there, "owned")))

    async def take_back(self, seen: Seen) -> tuple[frozenset[int], frozenset[int]]:
        """
        Let the source own again what the target does not: first nobody can hand it over any more.

        What was seen must be of movers that are gone, or of the one who calls. Returns the slots that the source owns
        again, and those that the target owns.
        """
        await self._turn(self.target, seen.arriving, "arriving", "abandoned")
        owned = frozenset(_in(await self._states(self.target), "owned"))
        left = {slot: mover for slot, mover in seen.left.items() if slot not in owned}
        return await self._turn(self.source, left, "left", "owned"), owned

    async def give(self, movers: Mapping[int, str]) -> frozenset[int]:
        """Say in the directory that the target has these, which it owns; those whose move is still that mover's."""
        if not movers:
            return frozenset()
        async with self._directory.transaction() as connection:
            rows = await connection.fetch(self._sql["give_slots"], self._region, list(movers), list(movers.values()))
        return frozenset(row["slot"] for row in rows)

    async def adopt(self, mover: str, seen: Seen) -> frozenset[int]:
        """Make it this mover that has fenced them, and may drop their rows."""
        return await self._turn(self.source, seen.left, "left", "left", mover)

    async def _turn(
        self, database: Database, seen: Mapping[int, str], before: str, after: str, mover: str = ""
    ) -> frozenset[int]:
        """Those that were still as they were seen."""
        if not seen:
            return frozenset()
        async with database.transaction() as connection:
            rows = await connection.fetch(
                self._sql["turn_slots"], list(seen), list(seen.values()), before, after, mover
            )
        return frozenset(row["slot"] for row in rows)

    async def _states(self, database: Database) -> Mapping[int, tuple[str, str]]:
        async with database.transaction() as connection:
            rows = await connection.fetch(self._sql["slot_states"], self.slots)
        return {row["slot"]: (row["state"], row["mover"]) for row in rows}


def _in(states: Mapping[int, tuple[str, str]], wanted: str) -> Mapping[int, str]:
    """The slots in that state, and the movers beside them."""
    return {slot: mover for slot, (state, mover) in states.items() if state == wanted}
