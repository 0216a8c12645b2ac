"""How identities look in the admin API: what may be sent, and what is told."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import msgspec

from sutazai.core.identity import ApiKey, Limits, Role, Scope, Tenant
from sutazai.core.request import Priority

PriorityName = Literal["high", "normal", "low"]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A body in which a word too many is a mistake: a limit misspelt would be no limit."""


class LimitsBody(Body, frozen=True):
    """Limits; null, or left out: as much as there is."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    bytes_per_minute: Count | None = None
    concurrent_requests: Count | None = None
    tokens_per_month: Count | None = None
    money_per_month: Annotated[float, msgspec.Meta(ge=0)] | None = None
    burst_s: float = 60.0

    def limits(self) -> Limits:
        """As a value of the core."""
        return Limits(**msgspec.structs.asdict(self))


class KeyBody(Body, frozen=True):
    """A key to be made."""

    name: str
    tenant: str = "default"
    role: Literal["user", "admin"] = "user"
    scopes: frozenset[Literal["inference", "tasks", "admin"]] | None = None
    """Null, or left out: all that the role can use."""
    priority: PriorityName | None = None
    limits: LimitsBody = LimitsBody()

    def wanted_role(self) -> Role:
        """The role as a value of the core."""
        return Role(self.role)

    def wanted_scopes(self) -> frozenset[Scope] | None:
        """The scopes as values of the core."""
        return None if self.scopes is None else frozenset(map(Scope, self.scopes))

    def wanted_priority(self) -> Priority | None:
        """The priority as a value of the core."""
        return None if self.priority is None else Priority[self.priority.upper()]


class TenantBody(Body, frozen=True):
    """What a tenant is to be, all of it: what is left out gets its default."""

    weight: float = 1.0
    priority: PriorityName = "normal"
    limits: LimitsBody = LimitsBody()
    waiting_tasks: Count | None = None
    region: str = ""

    def tenant(self, name: str) -> Tenant:
        """As a value of the core."""
        return Tenant(
            name=name,
            weight=self.weight,
            priority=Priority[self.priority.upper()],
            limits=self.limits.limits(),
            waiting_tasks=self.waiting_tasks,
            region=self.region,
        )


def told_key(key: ApiKey) -> dict[str, object]:
    """A key without its hash."""
    return {
        "id": key.id,
        "name": key.name,
        "tenant": key.tenant,
        "role": key.role.value,
        "scopes": sorted(scope.value for scope in key.scopes),
        "priority": None if key.priority is None else told_priority(key.priority),
        "limits": asdict(key.limits),
        "created_at": key.created_at,
        "last_used_at": key.last_used_at,
        "revoked_at": key.revoked_at,
    }


def told_tenant(tenant: Tenant, *, is_defined: bool) -> dict[str, object]:
    """A tenant; `is_defined` is False for one that only keys name, which has the defaults."""
    return {
        "name": tenant.name,
        "weight": tenant.weight,
        "priority": told_priority(tenant.priority),
        "limits": asdict(tenant.limits),
        "waiting_tasks": tenant.waiting_tasks,
        "region": tenant.region,
        "is_defined": is_defined,
    }


def told_priority(priority: Priority) -> str:
    """The word for it."""
    return priority.name.lower()
