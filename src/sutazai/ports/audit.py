"""Where it is kept who changed what: entries that are added and never changed, each sealed with the one before."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

import msgspec

GENESIS = bytes(32)
"""What stands before the first entry."""


class Action(enum.Enum):
    """What administrators do."""

    KEY_CREATED = "key.created"
    KEY_REVOKED = "key.revoked"
    TENANT_SET = "tenant.set"
    TENANT_DELETED = "tenant.deleted"
    CACHE_FORGOTTEN = "cache.forgotten"
    REQUEST_CANCELLED = "request.cancelled"
    MODEL_PULLED = "model.pulled"
    MODEL_DELETED = "model.deleted"
    MODEL_COPIED = "model.copied"


class Outcome(enum.Enum):
    """How far it came. What changes the database has one entry; all else has one before and one after."""

    BEGUN = "begun"
    """With no later entry of the same request: nobody knows whether it took place."""
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who does it, and by which request."""

    id: str
    """The id of an admin key, `local` where no key is needed, or `cli:NAME` with the name of a user of the machine."""
    request_id: str = ""
    """Empty for what did not come through a gateway."""


UNNAMED = Actor(id="unnamed")
"""A program that does not say who it is. It is written down too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deed:
    """One action as it is to be written down. Never holds a secret."""

    action: Action
    subject: str
    """What it was done to: the id of a key or request, the name of a tenant or model."""
    detail: Mapping[str, object] = field(default_factory=dict)
    outcome: Outcome = Outcome.DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One action as it was written down."""

    number: int
    """1, 2, 3 and on, without a gap."""
    at: datetime
    actor: str
    action: str
    subject: str
    detail: str
    """JSON, as the store keeps it."""
    request_id: str
    outcome: str
    previous: bytes
    """The digest of the entry before; `GENESIS` for the first."""
    digest: bytes

    def plain(self) -> dict[str, object]:
        """As it is told in JSON, by the API and the command line."""
        return {
            "number": self.number,
            "at": self.at,
            "actor": self.actor,
            "action": self.action,
            "subject": self.subject,
            "detail": msgspec.Raw(self.detail.encode()),
            "request_id": self.request_id,
            "outcome": self.outcome,
            "digest": self.digest.hex(),
        }

    def sealed(self) -> bytes:
        """
        The digest that this entry must have: SHA-256 over the previous one and each field with its size.

        The size in bytes goes before each field, so that no text can be moved from one field to the next.
        """
        at = self.at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
        texts = (
            str(self.number),
            at,
            self.actor,
            self.action,
            self.subject,
            self.detail,
            self.request_id,
            self.outcome,
        )
        encoded = (text.encode() for text in texts)
        return hashlib.sha256(self.previous + b"".join(b"%d:%b" % (len(one), one) for one in encoded)).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What came of a look at all entries."""

    entries: int
    """Good ones, from the first on."""
    head: bytes
    """The digest of the last good one. Kept elsewhere, it proves later that no entry was cut off at the end."""
    fault: str = ""
    """What is wrong with the entry after them; empty where all are good."""


class AuditLog(Protocol):
    """Entries, in order. Every method raises `StoreUnavailable` within its time limit when the store is away."""

    async def add(self, deed: Deed, by: Actor) -> None:
        """Write one down. When it raised, the action must not take place."""

    async def newest(self, *, limit: int, before: int | None = None) -> Sequence[AuditEntry]:
        """So many entries, newest first; only those with numbers below `before` where that is given."""

    async def verify(self) -> Verified:
        """Look at every entry and its seal."""


def fault_of(entry: AuditEntry, number: int, previous: bytes) -> str:
    """What is wrong with the entry that should be that one; empty where nothing is."""
    if entry.number != number:
        return f"Entry {number} is missing: the next one there is {entry.number}."
    if entry.previous != previous:
        return f"Entry {number} does not follow the one before it: one of the two was replaced."
    if entry.digest != entry.sealed():
        return f"Entry {number} was changed after it was written."
    return ""
