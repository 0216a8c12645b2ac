"""How a key is made, and what its name may be. Pure but for the randomness: no database."""

from __future__ import annotations

import base64
import hashlib
import secrets
from datetime import datetime

from sutazai.core.errors import BadRequest
from sutazai.core.identity import ApiKey, Role

PREFIX = "sk-sutazai-"
"""So that scanners for leaked secrets can know our keys."""
KEY_BYTES = 32
ID_BYTES = 5
"""Eight characters in base32."""
MAX_NAME_CHARACTERS = 64


def mint(*, name: str, tenant: str, role: Role, created_at: datetime) -> tuple[ApiKey, str]:
    """A new record and the key itself. Raises `BadRequest` for a name or tenant that cannot be shown."""
    check_label(name, where="name")
    check_label(tenant, where="tenant")
    key = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).rstrip(b"=").decode()
    record = ApiKey(
        id=base64.b32encode(secrets.token_bytes(ID_BYTES)).decode().lower(),
        name=name,
        tenant=tenant,
        role=role,
        digest=digest_of(key),
        created_at=created_at,
    )
    return record, key


def digest_of(key: str) -> bytes:
    """What is stored in place of the key: 32 bytes."""
    return hashlib.sha256(key.encode()).digest()


def check_label(label: str, *, where: str) -> None:
    """Names and tenants are 1 to 64 printable characters. Raises `BadRequest`."""
    if not (label.strip() and label.isprintable() and len(label) <= MAX_NAME_CHARACTERS):
        raise BadRequest(
            f"The {where} {label[:MAX_NAME_CHARACTERS]!r} was refused."
            f" Use 1 to {MAX_NAME_CHARACTERS} printable characters.",
            where=where,
        )


def name_taken(name: str) -> BadRequest:
    """The answer to a second live key of one name."""
    return BadRequest(
        f"A live key named {name!r} was there already. Choose another name, or revoke that key first.",
        where="name",
    )
