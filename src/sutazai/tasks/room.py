"""Places of one queue in a worker."""

from __future__ import annotations

import asyncio


class Room:
    """Counts free places; whoever needs one, or all, can wait."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.count = slots
        self._some = asyncio.Event()
        self._some.set()
        self._all = asyncio.Event()
        self._all.set()

    def take(self) -> None:
        """One is taken."""
        self.count -= 1
        self._all.clear()
        if self.count <= 0:
            self._some.clear()

    def give(self) -> None:
        """One is free again."""
        self.count += 1
        self._some.set()
        if self.count == self.slots:
            self._all.set()

    async def wait(self) -> None:
        """Until one is free."""
        await self._some.wait()

    async def wait_all(self) -> None:
        """Until all are free."""
        await self._all.wait()
