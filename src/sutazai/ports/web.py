"""Addresses of strangers, asked on behalf of tenants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Web(Protocol):
    """The way out: never to an address of our own network, whatever a name resolves to."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """
        Send; the status of the answer. Follows no redirect.

        Raises `Forbidden` where the address is one that strangers must not reach through us, and another
        `SutazaiError` within its time limit where nobody answered.
        """
