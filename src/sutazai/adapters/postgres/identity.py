"""Tenants and keys between the columns of the database and the words of the core."""

from __future__ import annotations

from typing import Any

import asyncpg
import msgspec

from sutazai.adapters.postgres.checks import given
from sutazai.core.identity import ApiKey, Limits, Role, Scope, Tenant
from sutazai.core.request import Priority

_LIMITS = msgspec.json.Decoder(Limits)
_SCOPES = {scope.value: scope for scope in Scope}
"""A newer program on the same database may know more; those mean nothing here."""


def key_of(row: asyncpg.Record) -> ApiKey:
    """A row of `keys`."""
    return ApiKey(
        id=row["id"],
        name=row["name"],
        tenant=row["tenant"],
        role=Role(row["role"]),
        digest=row["digest"],
        created_at=row["created_at"],
        scopes=frozenset(_SCOPES[scope] for scope in row["scopes"] if scope in _SCOPES),
        priority=None if row["priority"] is None else priority_of(row["priority"]),
        limits=_LIMITS.decode(row["limits"]),
        last_used_at=row["last_used_at"],
        revoked_at=row["revoked_at"],
    )


def tenant_of(row: asyncpg.Record) -> Tenant:
    """A row of `tenants`."""
    return Tenant(
        name=row["name"],
        weight=row["weight"],
        priority=priority_of(row["priority"]),
        limits=_LIMITS.decode(row["limits"]),
        region=row["region"],
        waiting_tasks=row["waiting_tasks"],
    )


def priority_of(word: str) -> Priority:
    """The priority that is stored as this word."""
    return Priority[word.upper()]


def word_of(priority: Priority) -> str:
    """How a priority is stored."""
    return priority.name.lower()


def plain_limits(limits: Limits) -> dict[str, float]:
    """What is stored of limits: those that are set."""
    plain: dict[str, float] = dict(given(limits))
    if limits.burst_s != Limits().burst_s:
        plain["burst_s"] = limits.burst_s
    return plain


def plain_key(key: ApiKey) -> dict[str, Any]:
    """What the audit log tells of a key."""
    return {
        "name": key.name,
        "tenant": key.tenant,
        "role": key.role.value,
        "scopes": sorted(scope.value for scope in key.scopes),
        "priority": None if key.priority is None else word_of(key.priority),
        "limits": plain_limits(key.limits),
    }


def plain_tenant(tenant: Tenant | None) -> dict[str, Any] | None:
    """What the audit log tells of a tenant."""
    if tenant is None:
        return None
    plain: dict[str, Any] = {
        "weight": tenant.weight,
        "priority": word_of(tenant.priority),
        "limits": plain_limits(tenant.limits),
    }
    if tenant.region:
        plain["region"] = tenant.region
    if tenant.waiting_tasks is not None:
        plain["waiting_tasks"] = tenant.waiting_tasks
    return plain
