"""The audit log in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import msgspec

from sutazai.adapters.postgres.audit import storable
from sutazai.core.errors import StoreUnavailable
from sutazai.ports.audit import GENESIS, Actor, AuditEntry, Deed, Verified, fault_of


class MemoryAuditLog:
    """An `AuditLog` that can be told to fail, and whose entries a test may spoil."""

    def __init__(self) -> None:
        self.entries: list[AuditEntry] = []
        self.is_away = False
        """Raise `StoreUnavailable` from every call."""

    async def add(self, deed: Deed, by: Actor) -> None:
        """Write one down."""
        self._check()
        entry = AuditEntry(
            number=len(self.entries) + 1,
            at=datetime.now(UTC),
            actor=by.id,
            action=deed.action.value,
            subject=str(storable(deed.subject)),
            detail=msgspec.json.encode(storable(deed.detail)).decode(),
            request_id=by.request_id,
            outcome=deed.outcome.value,
            previous=self.entries[-1].digest if self.entries else GENESIS,
            digest=b"",
        )
        self.entries.append(replace(entry, digest=entry.sealed()))

    async def newest(self, *, limit: int, before: int | None = None) -> Sequence[AuditEntry]:
        """So many entries, newest first."""
        self._check()
        found = [entry for entry in reversed(self.entries) if before is None or entry.number < before]
        return found[:limit]

    async def verify(self) -> Verified:
        """Look at every entry and its seal."""
        self._check()
        good, head = 0, GENESIS
        for entry in self.entries:
            if fault := fault_of(entry, good + 1, head):
                return Verified(entries=good, head=head, fault=fault)
            good, head = entry.number, entry.digest
        return Verified(entries=good, head=head)

    def _check(self) -> None:
        if self.is_away:
            raise StoreUnavailable("The log in memory was told to be away. Set `is_away` to False.")
