"""Tenants in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sutazai.adapters.postgres.audit import record
from sutazai.adapters.postgres.checks import check_tenant
from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.identity import plain_limits, plain_tenant, tenant_of, word_of
from sutazai.core.identity import Tenant
from sutazai.ports.audit import UNNAMED, Action, Actor, Deed


class PostgresTenantStore:
    """The `TenantStore` of production."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sql = database.sql

    async def all(self) -> Sequence[Tenant]:
        """Every defined tenant, by name."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(self._sql["all_tenants"])
        return sorted(map(tenant_of, rows), key=lambda tenant: tenant.name)  # by code point, whatever the collation

    async def set(self, tenant: Tenant, *, by: Actor = UNNAMED) -> None:
        """Define it, in place of what it was before. Raises `BadRequest` for what no tenant can be."""
        check_tenant(tenant)
        limits = msgspec.json.encode(plain_limits(tenant.limits)).decode()
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(self._sql["lock_tenant"], tenant.name)
            before = tenant_of(row) if row else None
            await connection.execute(
                self._sql["set_tenant"],
                tenant.name,
                tenant.weight,
                word_of(tenant.priority),
                limits,
                tenant.region,
                tenant.waiting_tasks,
            )
            await record(connection, self._sql, tenant_set(before, tenant), by)

    async def delete(self, name: str, *, by: Actor = UNNAMED) -> Tenant | None:
        """Give it the defaults again; None where it was not defined."""
        if not name.isprintable():
            return None  # what no tenant can be called, the server may refuse even to compare
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(self._sql["delete_tenant"], name)
            if row is None:
                return None
            tenant = tenant_of(row)
            await record(connection, self._sql, tenant_deleted(tenant), by)
        return tenant


def tenant_set(before: Tenant | None, after: Tenant) -> Deed:
    """What is written down of a tenant that was defined or changed."""
    detail = {"before": plain_tenant(before), "after": plain_tenant(after)}
    return Deed(action=Action.TENANT_SET, subject=after.name, detail=detail)


def tenant_deleted(tenant: Tenant) -> Deed:
    """What is written down of a tenant that was deleted."""
    return Deed(action=Action.TENANT_DELETED, subject=tenant.name, detail={"before": plain_tenant(tenant)})
