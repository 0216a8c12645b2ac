"""Where agents leave word for each other. What is kept here is also told on the stream: `ports/broadcasts.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class MessageStore(Protocol):
    """Messages by name, in order, within a tenant. Methods raise `StoreUnavailable`."""

    async def send(self, tenant: str, to: str, *, sender: str, body: str) -> int:
        """Keep one; its number, which grows."""

    async def received(self, tenant: str, name: str, *, after: int) -> Sequence[tuple[int, str]]:
        """What came under this name past that number, oldest first; a thousand at most."""
