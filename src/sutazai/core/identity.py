"""Who asks: tenants, their keys, and what these may do."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime

from sutazai.core.request import Priority


class Role(enum.Enum):
    """What a key may do to the gateway itself."""

    USER = "user"
    """Nothing: it may ask, within its scopes."""
    ADMIN = "admin"
    """Also `/admin`, and pulling, copying and deleting models."""


class Scope(enum.Enum):
    """What a key may ask for."""

    INFERENCE = "inference"
    """Chat, completions, embeddings, sessions, the list of models."""
    TASKS = "tasks"
    """Agent tasks."""
    ADMIN = "admin"
    """What `Role.ADMIN` may; a key needs both to use it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one tenant or one key may take; None = as much as there is."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Input and output together."""
    bytes_per_minute: int | None = None
    """Of request bodies."""
    concurrent_requests: int | None = None
    tokens_per_month: int | None = None
    money_per_month: float | None = None
    """In the currency of `[models."NAME"].price_*`."""
    burst_s: float = 60.0
    """How much of a limit per minute may be taken at once, in seconds of it: 60 = the whole minute."""

    @property
    def is_unlimited(self) -> bool:
        """Whether nothing is limited."""
        return self == Limits(burst_s=self.burst_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Whoever shares a part of the pool: a team, a customer."""

    name: str
    weight: float = 1.0
    """Its share of the pool when all are busy, relative to others."""
    priority: Priority = Priority.NORMAL
    """What its requests have; they may ask for less."""
    limits: Limits = Limits()
    region: str = ""
    """Its home: where its data is kept. Empty where there are no regions."""
    waiting_tasks: int | None = None
    """Tasks that may wait to be started; None = as many as the settings say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key as it is kept: its hash, never the key."""

    id: str
    """Short and public: what `keys list` shows and `keys revoke` takes."""
    name: str
    tenant: str
    role: Role
    digest: bytes
    """SHA-256 of the whole key. Keys are 256 random bits, so a slow hash would protect nothing more."""
    created_at: datetime
    scopes: frozenset[Scope] = frozenset(Scope)
    priority: Priority | None = None
    """What its requests have; None = the tenant's."""
    limits: Limits = Limits()
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """The limits that one request must fit into."""

    tenant: str
    key_id: str
    of_tenant: Limits
    of_key: Limits
