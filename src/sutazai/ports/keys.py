"""Where keys and their usage are kept."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from sutazai.core.identity import ApiKey, Role


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
    """Keys by hash. Every method raises `StoreUnavailable` within its time limit when the store is away."""

    async def create(self, *, name: str, tenant: str, role: Role) -> tuple[ApiKey, str]:
        """Make a key; the second value is the key itself, told once and never kept."""

    async def all(self) -> Sequence[ApiKey]:
        """Every key, revoked ones too, oldest first."""

    async def revoke(self, key_id: str) -> ApiKey | None:
        """Revoke by id or by name where the name is unique; None where there is no such live key."""

    def changes(self) -> AsyncIterator[None]:
        """
        Yield whenever any process changed a key.

        Also yields once after the store came back from being away. Ends never; raises only on cancellation.
        """


class UsageStore(Protocol):
    """The ledger of tokens."""

    async def add(self, rows: Sequence[UsageRow]) -> None:
        """Add counts in one transaction: all or nothing. Raises `StoreUnavailable`."""

    async def total(self, *, since: datetime) -> Sequence[UsageRow]:
        """Sums by key and model from that hour on; `hour` is the newest one in the sum."""
