"""
Where bytes are kept that are too large for a row: files of clients, results of batches.

A name is a path whose first part stands for the tenant, made by `object_name` alone, so that no text of a client can
lead out of its tenant's part or out of the store. Rows about objects do not belong here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from sutazai.core.errors import BadRequest

MAX_PARTS = 8
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PLAIN_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class ObjectStore(Protocol):
    """
    Objects by name. Each is written whole or not at all.

    Every call ends within the store's time limit (of a stream: every part) and raises `StoreUnavailable` where the
    store is away, `BadRequest` for a name that `object_name` would not make.
    """

    async def put(self, name: str, content: bytes, *, is_new: bool = False) -> bool:
        """
        Write an object in place of what was there.

        With `is_new` only where nothing was there: False tells that something was, and stays. Of several writers at
        once one gets True. A writer that had a `StoreUnavailable` and tries again may get False for its own object.
        Raises `TooLarge` for more than the store's size limit.
        """

    async def put_stream(self, name: str, parts: AsyncIterator[bytes]) -> int:
        """
        Write an object of any size, in place of what was there; its size in bytes.

        It is there once all parts are. Raises what `parts` raises, and then nothing was written.
        """

    async def get(self, name: str) -> bytes:
        """All of it. Raises `NotFound`."""

    async def get_range(self, name: str, *, start: int, length: int) -> bytes:
        """So many bytes from `start` (0 = the first) on; fewer, or none, at the end. Raises `NotFound`."""

    def stream(self, name: str) -> AsyncIterator[bytes]:
        """All of it, part by part, none of them empty. Raises `NotFound` before the first."""

    async def delete(self, name: str) -> None:
        """Forget it; no error where it is gone already."""

    async def list(self, prefix: str, *, limit: int) -> Sequence[str]:
        """At most so many names below these first parts of a name, in no certain order."""


def object_name(tenant: str, *parts: str) -> str:
    """
    The name of a tenant's object, or the prefix of several.

    Tenants may be called what no folder can, so unusual names are hashed; the letter before keeps both kinds apart.
    Raises `BadRequest` for parts that are no plain words.
    """
    if _PLAIN_TENANT.fullmatch(tenant):
        owner = f"t-{tenant}"
    else:
        owner = "h-" + hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()
    return checked_name("/".join((owner, *parts)))


def checked_name(name: str) -> str:
    """The name, if it is one. Raises `BadRequest`."""
    parts = name.split("/")
    if len(parts) > MAX_PARTS or not all(map(_PART.fullmatch, parts)):
        raise BadRequest(
            f"The name of an object was {name[:200]!r}. Give it at most {MAX_PARTS} parts of letters, digits, "
            "`.`, `_` and `-`, each beginning with a letter or digit."
        )
    return name
