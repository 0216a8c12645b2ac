"""The home region of a tenant, which cannot be changed while its data is in another one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.sharded.shards import ANY, Shards
from sutazai.core.errors import Conflict, StoreUnavailable
from sutazai.core.identity import Tenant
from sutazai.ports.audit import UNNAMED, Actor
from sutazai.ports.tenants import TenantStore


class HomedTenantStore:
    """A `TenantStore` that looks for data before a tenant gets another home."""

    def __init__(self, tenants: TenantStore, shards: Shards) -> None:
        self._tenants = tenants
        self._shards = shards

    async def all(self) -> Sequence[Tenant]:
        return await self._tenants.all()

    async def set(self, tenant: Tenant, *, by: Actor = UNNAMED) -> None:
        """As the port says. Raises `Conflict` where it would leave data behind in another region."""
        await self._check(tenant.name, await self._home(tenant.name), tenant.region)
        await self._tenants.set(tenant, by=by)
        await self._follow()

    async def delete(self, name: str, *, by: Actor = UNNAMED) -> Tenant | None:
        """As the port says; its home goes too. Raises `Conflict` where it has data there."""
        await self._check(name, await self._home(name), "")
        deleted = await self._tenants.delete(name, by=by)
        await self._follow()
        return deleted

    async def _follow(self) -> None:
        """Know it here before whoever changed it goes on; other processes hear of it."""
        with suppress(StoreUnavailable):
            await self._shards.refresh()

    async def _home(self, name: str) -> str:
        return next((tenant.region for tenant in await self._tenants.all() if tenant.name == name), "")

    async def _check(self, name: str, before: str, after: str) -> None:
        here = self._shards.region
        if before == after or (not before and after == here):
            return
        if before and before != here:
            raise Conflict(
                f"The home of the tenant {name!r} is {before!r}, where its data was not looked for. Change it there."
            )
        for database in self._shards.databases.values():
            if await _has_data(database.of(ANY), name):
                raise Conflict(
                    f"The tenant {name!r} has data in {here or 'this region'!r}, which was not to be left behind. "
                    "Delete its tasks, files, sessions and schedules first, or leave its home as it is."
                )


async def _has_data(database: Database, tenant: str) -> bool:
    async with database.transaction() as connection:
        return bool(await connection.fetchval(database.sql["has_data"], tenant))
