"""Where keys and their usage are kept."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from sutazai.core.identity import ApiKey, Limits, Role, Scope
from sutazai.core.request import Priority
from sutazai.ports.audit import UNNAMED, Actor

NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """What one key took from one model since the last write; counts are added to what is stored."""

    key_id: str
    """Empty where no key was needed."""
    tenant: str
    model: str
    hour: datetime
    """The start of the hour, UTC."""
    requests: int
    errors: int
    input_tokens: int
    output_tokens: int


class KeyStore(Protocol):
    """
    Keys by hash.

    Every method raises `StoreUnavailable` within its time limit when the store is away. What changes a key writes its
    audit entry with it: both or neither.
    """

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
        """
        Make a key; the second value is the key itself, told once and never kept.

        With no `scopes` it gets all that its role can use. Raises `BadRequest` for what no key can be.
        """

    async def all(self) -> Sequence[ApiKey]:
        """Every key, revoked ones too, oldest first."""

    async def revoke(self, key_id: str, *, by: Actor = UNNAMED) -> ApiKey | None:
        """Revoke by id or by name where the name is unique; None where there is no such live key."""

    def changes(self) -> AsyncIterator[None]:
        """
        Yield whenever any process changed a key or a tenant.

        Also yields once after the store came back from being away. Ends never; raises only on cancellation.
        """


class UsageStore(Protocol):
    """The ledger of tokens."""

    async def add(self, rows: Sequence[UsageRow]) -> None:
        """Add counts in one transaction: all or nothing. Raises `StoreUnavailable`."""

    async def total(self, *, since: datetime) -> Sequence[UsageRow]:
        """Sums by key and model from that hour on; `hour` is the newest one in the sum."""
