"""The directory: which shards there are, what each owns, and how one is taken into use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.sharded.shards import Shards
from sutazai.core.errors import BadRequest, Conflict
from sutazai.policy.sharding import SLOTS, SlotMove


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardView:
    """A shard as the directory and the settings know it."""

    name: str
    region: str
    slots: int
    is_added: bool
    """False for one that only the settings name."""
    is_named: bool
    """False for one that the settings of this region do not name."""


class Directory:
    """That of one region, from a process that runs there."""

    def __init__(self, database: Database, shards: Shards) -> None:
        self._database = database
        self._shards = shards
        self._sql = database.sql

    async def views(self) -> Sequence[ShardView]:
        """All shards of all regions, in the order they were added; then those that were not."""
        async with self._database.transaction() as connection:
            added = {row["name"]: row["region"] for row in await connection.fetch(self._sql["all_shards"])}
            counts = {row["shard"]: row["slots"] for row in await connection.fetch(self._sql["count_slots"])}
        names = [*added, *(name for name in self._shards.databases if name not in added)]
        return [
            ShardView(
                name=name,
                region=added.get(name, self._shards.region),
                slots=counts.get(name, 0),
                is_added=name in added,
                is_named=name in self._shards.databases,
            )
            for name in names
        ]

    async def owners(self) -> Mapping[int, str]:
        """The shard of each slot of this region; empty where none was added."""
        async with self._database.transaction() as connection:
            return dict(await connection.fetch(self._sql["slots_of_region"], self._shards.region))

    async def under_way(self) -> Sequence[SlotMove]:
        """Moves that have begun and not ended."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(self._sql["slot_moves"], self._shards.region)
        return [SlotMove(row["slot"], row["source"], row["target"]) for row in rows]

    async def add(self, name: str) -> int:
        """
        Take a shard of this region into use; how many slots it has.

        The first one gets all, and has to be where the data is; a later one none, until they are moved. Raises
        `BadRequest` for one that the settings do not name, and `Conflict` where it is another shard already.
        """
        shard = self._shards.databases.get(name)
        if shard is None:
            known = ", ".join(self._shards.databases) or "none"
            raise BadRequest(f"No shard {name!r} is in `[[shards]]` of this region; there are: {known}.", where="name")
        is_first = not await self.owners()
        if is_first and shard is not self._database and await _is_used(self._database):
            raise Conflict(
                "The first shard must be where the data is: in `[database]`. Give `[[shards]]` an entry without a url, "
                "and add that one first."
            )
        if shard is not self._database and not await self._is_added(name) and await _is_used(shard):
            raise Conflict(f"The shard {name!r} holds data of tenants already. Give it an empty database.")
        async with shard.transaction() as connection:
            await connection.execute(self._sql["name_shard"], name)
            if is_first:
                await connection.execute(self._sql["own_all_slots"], SLOTS - 1)
        async with self._database.transaction() as connection:
            await connection.execute(self._sql["add_shard"], name, self._shards.region)
            if is_first:
                await connection.execute(self._sql["give_all_slots"], self._shards.region, name, SLOTS - 1)
        return Counter((await self.owners()).values())[name]

    async def _is_added(self, name: str) -> bool:
        return any(view.name == name and view.is_added for view in await self.views())


async def _is_used(database: Database) -> bool:
    async with database.transaction() as connection:
        return bool(await connection.fetchval(database.sql["has_any_data"]))
