"""How a key is made. Pure but for the randomness: no database."""

from __future__ import annotations

import base64
import hashlib
import secrets
from datetime import datetime

from sutazai.adapters.postgres.checks import check_label, check_limits, scopes_for
from sutazai.core.errors import BadRequest
from sutazai.core.identity import ApiKey, Limits, Role, Scope
from sutazai.core.request import Priority

PREFIX = "sk-sutazai-"
"""So that scanners for leaked secrets can know our keys."""
KEY_BYTES = 32
ID_BYTES = 5
"""Eight characters in base32."""


def mint(
    *,
    name: str,
    tenant: str,
    role: Role,
    scopes: frozenset[Scope] | None,
    priority: Priority | None,
    limits: Limits,
    created_at: datetime,
) -> tuple[ApiKey, str]:
    """A new record and the key itself. Raises `BadRequest` for what no key can be."""
    check_label(name, where="name")
    check_label(tenant, where="tenant")
    check_limits(limits)
    key = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).rstrip(b"=").decode()
    record = ApiKey(
        id=base64.b32encode(secrets.token_bytes(ID_BYTES)).decode().lower(),
        name=name,
        tenant=tenant,
        role=role,
        digest=digest_of(key),
        created_at=created_at,
        scopes=scopes_for(role, scopes),
        priority=priority,
        limits=limits,
    )
    return record, key


def digest_of(key: str) -> bytes:
    """What is stored in place of the key: 32 bytes."""
    return hashlib.sha256(key.encode()).digest()


def name_taken(name: str) -> BadRequest:
    """The answer to a second live key of one name."""
    return BadRequest(
        f"A live key named {name!r} was there already. Choose another name, or revoke that key first.",
        where="name",
    )
