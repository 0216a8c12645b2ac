"""Who asks: keys and what they may do."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime


class Role(enum.Enum):
    """What a key may do."""

    USER = "user"
    """Inference, and the list of models."""
    ADMIN = "admin"
    """Also `/admin`, and pulling, copying and deleting models."""


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
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None
