"""What lets those who wrote read from copies of a store and yet see what they wrote."""

from __future__ import annotations

from typing import Protocol

from sutazai.core.mark import Mark


class Marks(Protocol):
    """
    Who wrote what, here.

    The reads of stores take `seen`: None asks for the newest of all. With a mark the answer may be older than that by
    little, but holds what the mark stands for, and what was noted of its tenant here.
    """

    def note(self, tenant: str) -> None:
        """The tenant wrote something, or was told the newest, by now."""

    async def newest(self, tenant: str) -> Mark | None:
        """A mark of all that was written by now; None where none is needed, or none can be had soon."""
