"""Keys, usage and tenants in memory: the second implementation of these ports, for tests and for the curious."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from sutazai.adapters.postgres.checks import check_tenant
from sutazai.adapters.postgres.keys import key_created, key_revoked
from sutazai.adapters.postgres.mint import mint, name_taken
from sutazai.adapters.postgres.tenants import tenant_deleted, tenant_set
from sutazai.core.errors import StoreUnavailable
from sutazai.core.identity import ApiKey, Limits, Role, Scope, Tenant
from sutazai.core.request import Priority
from sutazai.ports.audit import UNNAMED, Actor
from sutazai.ports.keys import NO_LIMITS, UsageRow
from sutazai.testing.audit import MemoryAuditLog


class MemoryStore:
    """A `KeyStore` and `UsageStore` of one event loop, which can be told to fail as a lost database does."""

    def __init__(self) -> None:
        self._keys: dict[str, ApiKey] = {}
        self._usage: dict[tuple[datetime, str, str, str], UsageRow] = {}
        self._version = 0
        self._changed = asyncio.Condition()
        self._away = False
        self.audit = MemoryAuditLog()
        """Where keys and tenants of this store are written down."""
        self.tenants = MemoryTenantStore(self)
        """Tenants that are told of with the keys."""

    def leave(self) -> None:
        """From now on every call raises `StoreUnavailable`."""
        self._away = True

    async def come_back(self) -> None:
        """Answer again, and tell listeners to look."""
        self._away = False
        await self.tell()

    async def create(
        self,
        *,
        name: str,
        tenant: str,
        role: Role,
        scopes: frozenset[Scope] | None = None,
        priority: Priority | None = None,
        limits: Limits = NO_LIMITS,
        by: Actor = UNNAMED,
    ) -> tuple[ApiKey, str]:
        """Make a key. Raises `BadRequest` for a name that is taken or cannot be shown."""
        self.check()
        record, key = mint(
            name=name,
            tenant=tenant,
            role=role,
            scopes=scopes,
            priority=priority,
            limits=limits,
            created_at=datetime.now(UTC),
        )
        if any(known.name == name and known.revoked_at is None for known in self._keys.values()):
            raise name_taken(name)
        await self.audit.add(key_created(record), by)
        self._keys[record.id] = record
        await self.tell()
        return record, key

    async def all(self) -> Sequence[ApiKey]:
        """Every key, revoked ones too, oldest first."""
        self.check()
        return list(self._keys.values())

    async def revoke(self, key_id: str, *, by: Actor = UNNAMED) -> ApiKey | None:
        """Revoke by id or by name; None where there is no such live key."""
        self.check()
        live = [key for key in self._keys.values() if key.revoked_at is None]
        found = [key for key in live if key.id == key_id] or [key for key in live if key.name == key_id]
        if not found:
            return None
        revoked = replace(found[0], revoked_at=datetime.now(UTC))
        await self.audit.add(key_revoked(revoked), by)
        self._keys[revoked.id] = revoked
        await self.tell()
        return revoked

    async def changes(self) -> AsyncIterator[None]:
        """Yield once at the start, and after each change of a key or tenant."""
        seen = self._version
        yield
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._version != seen)  # noqa: B023
            seen = self._version
            yield

    async def add(self, rows: Sequence[UsageRow]) -> None:
        """Add counts and move the keys' `last_used_at` on."""
        self.check()
        for row in rows:
            place = (row.hour, row.key_id, row.tenant, row.model)
            self._usage[place] = _sum(self._usage[place], row) if place in self._usage else row
            if key := self._keys.get(row.key_id):
                until = min(datetime.now(UTC), row.hour + timedelta(hours=1))
                self._keys[key.id] = replace(key, last_used_at=max(key.last_used_at or until, until))

    async def total(self, *, since: datetime) -> Sequence[UsageRow]:
        """Sums by key and model from that hour on; `hour` is the newest one in the sum."""
        self.check()
        sums: dict[tuple[str, str, str], UsageRow] = {}
        for row in self._usage.values():
            if row.hour >= since:
                place = (row.key_id, row.tenant, row.model)
                sums[place] = _sum(sums[place], row) if place in sums else row
        return [sums[place] for place in sorted(sums)]

    def check(self) -> None:
        """Raise `StoreUnavailable` while away."""
        if self._away:
            raise StoreUnavailable("The store in memory was told to be away. Call `come_back`.")

    async def tell(self) -> None:
        """Let listeners know that a key or a tenant changed."""
        self._version += 1
        async with self._changed:
            self._changed.notify_all()


class MemoryTenantStore:
    """A `TenantStore` beside the keys of one `MemoryStore`."""

    def __init__(self, keys: MemoryStore) -> None:
        self._keys = keys
        self._tenants: dict[str, Tenant] = {}

    async def all(self) -> Sequence[Tenant]:
        """Every defined tenant, by name."""
        self._keys.check()
        return [self._tenants[name] for name in sorted(self._tenants)]

    async def set(self, tenant: Tenant, *, by: Actor = UNNAMED) -> None:
        """Define it, in place of what it was before."""
        self._keys.check()
        check_tenant(tenant)
        await self._keys.audit.add(tenant_set(self._tenants.get(tenant.name), tenant), by)
        self._tenants[tenant.name] = tenant
        await self._keys.tell()

    async def delete(self, name: str, *, by: Actor = UNNAMED) -> Tenant | None:
        """Give it the defaults again; None where it was not defined."""
        self._keys.check()
        tenant = self._tenants.get(name)
        if tenant is None:
            return None
        await self._keys.audit.add(tenant_deleted(tenant), by)
        del self._tenants[name]
        await self._keys.tell()
        return tenant


def _sum(one: UsageRow, other: UsageRow) -> UsageRow:
    return replace(
        one,
        hour=max(one.hour, other.hour),
        requests=one.requests + other.requests,
        errors=one.errors + other.errors,
        input_tokens=one.input_tokens + other.input_tokens,
        output_tokens=one.output_tokens + other.output_tokens,
    )
