"""
Which shard has whose data, as this process knows it, and what is done where it was wrong.

The directory has the truth for readers: a table from slot to shard, of which each process keeps a copy. Each shard has
the truth for writers: a transaction holds the slots that it is about, and fails at once where the shard does not own
them. So a copy may be old; whoever went to the wrong shard reads the table anew and goes to the right one.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import structlog

from sutazai.adapters.postgres.database import Database, SlotMoved
from sutazai.adapters.postgres.ear import heard
from sutazai.core.errors import Misdirected, StoreUnavailable
from sutazai.policy.sharding import SLOTS, slot_of

T = TypeVar("T")

log = structlog.get_logger("sutazai.shards")

CHANNEL = "sutazai_shards"
LOOK_S = 5.0
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.25
PATIENCE_S = 10.0
"""For a slot that is being moved: its writers wait as long as that at most."""
ANY = (-1,)
"""For `Database.of`: a transaction about no slot in particular. No slot leaves before it has ended."""


class Shards:
    """The shards of one region. `run` has to run beside it."""

    def __init__(self, directory: Database, databases: Mapping[str, Database], *, region: str) -> None:
        """
        Args:
            databases: those of this region, by the name of the shard, as the settings say.
            region: this process's own; empty where there are none.
        """
        self._directory = directory
        self._sql = directory.sql
        self.databases = databases
        self.region = region
        self._owners: Sequence[str] = [""] * SLOTS
        self._homes: Mapping[str, str] = {}
        self._weights: Mapping[str, float] = {}
        self._told: dict[str, Mapping[str, float]] = {}
        """By shard, the weights that it knows."""
        self._readings = 0
        self._turn = asyncio.Lock()

    async def refresh(self) -> None:
        """Read the tables anew. Raises `StoreUnavailable`; what was known then stays."""
        async with self._directory.transaction() as connection:
            slots = await connection.fetch(self._sql["slots_of_region"], self.region)
            tenants = await connection.fetch(self._sql["all_tenants"])
        owners = [""] * SLOTS
        for slot, shard in slots:
            owners[slot] = shard
        self._owners = owners
        self._homes = {row["name"]: row["region"] for row in tenants if row["region"]}
        self._weights = {row["name"]: row["weight"] for row in tenants}
        self._readings += 1

    async def run(self) -> None:
        """Follow the directory until cancelled."""
        async for _ in heard(self._directory, CHANNEL, look_s=LOOK_S):
            try:
                await self.refresh()
            except StoreUnavailable as error:
                log.warning("the table of shards was not read; the known one stays", why=error.message)
            await self._tell_weights()

    async def _tell_weights(self) -> None:
        """Write the weights of tenants into shards that do not know them: their queues go by them."""
        weights = self._weights
        for name, database in self.databases.items():
            if database is self._directory or self._told.get(name) == weights:
                continue
            try:
                async with database.transaction() as connection:
                    await connection.execute(self._sql["tell_weights"], list(weights), list(weights.values()))
            except StoreUnavailable as error:
                log.warning("a shard was not told the weights of tenants", shard=name, why=error.message)
            else:
                self._told[name] = weights

    async def check_names(self) -> None:
        """Raises `StoreUnavailable` where a shard's address leads to another one."""
        for name, database in self.databases.items():
            async with database.transaction() as connection:
                found = await connection.fetchval(self._sql["shard_here"])
            if found not in {None, name}:
                raise StoreUnavailable(
                    f"The url of the shard {name!r} led to the shard {found!r}. Correct `[[shards]]` in the settings."
                )

    def owner(self, slot: int) -> str:
        """The shard of a slot, as far as is known here. Raises `StoreUnavailable` where none is, or not in reach."""
        shard = self._owners[slot]
        if not shard:
            raise StoreUnavailable("No shard has the data. Take one into use with `sutazai shards add NAME`.")
        if shard not in self.databases:
            raise StoreUnavailable(f"The data is in the shard {shard!r}, which is not in `[[shards]]`. Add it there.")
        return shard

    def check_home(self, tenant: str) -> None:
        """Raises `Misdirected` where the tenant's data is not to be kept in this region."""
        home = self._homes.get(tenant, "")
        if home == self.region:
            return
        if not home:
            raise Misdirected(
                f"The tenant {tenant!r} has no home region, so none of its data can be kept. "
                f"Name one with `sutazai tenants set {tenant} --region {self.region}`."
            )
        here = f"this is {self.region!r}" if self.region else "this one serves no region"
        raise Misdirected(f"The data of {tenant!r} is kept in the region {home!r}, and {here}. Ask a gateway there.")

    async def of_tenant(self, tenant: str, work: Callable[[Database], Awaitable[T]]) -> T:
        """Do it in the shard of a tenant. Raises `Misdirected`, and what it raises; again where the data has moved."""
        self.check_home(tenant)
        return await self.of_slot(slot_of(tenant), work)

    async def of_slot(self, slot: int, work: Callable[[Database], Awaitable[T]]) -> T:
        """The same for a slot."""
        [(_, done)] = await self.spread([slot], lambda database, _: work(database))
        return done

    async def spread(
        self, slots: Sequence[int], work: Callable[[Database, Sequence[int]], Awaitable[T]]
    ) -> Sequence[tuple[Sequence[int], T]]:
        """
        Do it once in each shard that has some of these slots, one shard after another.

        `work` is given the places in `slots` that are the shard's, and so is what comes back for each.
        """
        done: list[tuple[Sequence[int], T]] = []
        left: Sequence[int] = range(len(slots))
        until = asyncio.get_running_loop().time() + PATIENCE_S
        pause_s = 0.0
        while left:
            readings = self._readings
            groups: dict[str, list[int]] = defaultdict(list)
            for place in left:
                groups[self.owner(slots[place])].append(place)
            left = []
            for shard, places in groups.items():
                view = self.databases[shard].of({slots[place] for place in places})
                try:
                    done.append((places, await work(view, places)))
                except SlotMoved:
                    if asyncio.get_running_loop().time() > until:
                        raise
                    left = [*left, *places]
            if left:
                await asyncio.sleep(random.uniform(0.5, 1.0) * pause_s)  # noqa: S311
                pause_s = min(2 * pause_s or FIRST_PAUSE_S, LONGEST_PAUSE_S)
                await self._look_again(readings)
        return done

    async def in_each(self, work: Callable[[Database], Awaitable[T]]) -> Sequence[T]:
        """
        Do it in every shard, in transactions about no slot in particular; what those said that answered.

        Raises `StoreUnavailable` where none did.
        """
        found: list[T] = []
        faults: list[StoreUnavailable] = []
        for name, database in self.databases.items():
            try:
                found.append(await work(database.of(ANY)))
            except StoreUnavailable as error:
                log.warning("a shard did not answer", shard=name, why=error.message)
                faults.append(error)
        if faults and not found:
            raise faults[0]
        return found

    async def _look_again(self, readings: int) -> None:
        """Read the table, unless somebody has since; while the directory is away the known one is tried again."""
        async with self._turn:
            if self._readings == readings:
                try:
                    await self.refresh()
                except StoreUnavailable as error:
                    log.warning("the table of shards was not read; the known one stays", why=error.message)


async def check_unsharded(database: Database) -> None:
    """Raises `StoreUnavailable` where the data of tenants is in shards: this process would see none of it."""
    async with database.transaction() as connection:
        shards = await connection.fetch(database.sql["all_shards"])
    if shards:
        names = ", ".join(row["name"] for row in shards)
        raise StoreUnavailable(
            f"The data of tenants is in the shards {names}, and the settings name none. "
            "Give `[[shards]]` to all processes."
        )
