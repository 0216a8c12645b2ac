"""Where it is kept what each tenant may take, and its share of the pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sutazai.core.identity import Tenant
from sutazai.ports.audit import UNNAMED, Actor


class TenantStore(Protocol):
    """
    Tenants that somebody defined; all others have the defaults.

    Every method raises `StoreUnavailable` within its time limit when the store is away. What changes a tenant writes
    its audit entry with it: both or neither. `KeyStore.changes` tells of tenants too.
    """

    async def all(self) -> Sequence[Tenant]:
        """Every defined tenant, by name."""

    async def set(self, tenant: Tenant, *, by: Actor = UNNAMED) -> None:
        """Define it, in place of what it was before. Raises `BadRequest` for what no tenant can be."""

    async def delete(self, name: str, *, by: Actor = UNNAMED) -> Tenant | None:
        """Give it the defaults again; None where it was not defined. Its keys stay."""
