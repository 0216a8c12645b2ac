"""
How many tasks of one tenant may wait, so that one who submits without end leaves room for the others.

A tenant's tasks are counted in the store once in a while, and in between those are added that come through here. So a
gateway by itself lets no tenant past its bound. One submission waits for the count; others that come meanwhile do so
only where their tenant may be at its bound. Of several, each hears of the others' at its next count: together they
can go past it by what a tenant submits through the others in `COUNT_S`, or in the time that all of them need to fill
half of the room.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sutazai.core.errors import TooManyWaiting
from sutazai.policy.tasks import FASTEST_PER_S
from sutazai.ports.tasks import TaskStore

COUNT_S = 1.0
"""Between two counts of a tenant's tasks, at least."""
COUNT_PART = 20
"""A count that took long is not made again before so many times as long have passed: some percent of one connection."""
REMEMBERED = 1000
"""Tenants that are remembered without a look whether they must be."""
RETRY_AFTER_S = 5.0


class _Known:
    """What is known of one tenant."""

    __slots__ = ("counting", "full_until", "lasts_until", "on_the_way", "uncounted", "waiting")

    def __init__(self) -> None:
        self.waiting = math.inf
        """Until the first count."""
        self.lasts_until = float("-inf")
        """The count; however many others add, there is room until then."""
        self.full_until = float("-inf")
        """As `lasts_until`, where there is no room."""
        self.on_the_way = 0
        """Let through, and not yet kept or refused by the store."""
        self.uncounted = 0
        """Those that the count under way may have missed: on the way when it began, or let through since."""
        self.counting = asyncio.Lock()


class WaitingBound:
    """Lets tasks of clients through while their tenant has room."""

    def __init__(
        self, store: TaskStore, most: Callable[[str], int], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Nothing is known yet.

        Args:
            most: how many tasks of a tenant may wait.
        """
        self._store = store
        self._most = most
        self._clock = clock
        self._known: dict[str, _Known] = {}

    @property
    def remembered(self) -> int:
        """Tenants of whom something is known."""
        return len(self._known)

    @asynccontextmanager
    async def room(self, tenant: str) -> AsyncIterator[None]:
        """Room for one more, while it is submitted. Raises `TooManyWaiting`, or what counting raises."""
        most = self._most(tenant)
        known = self._of(tenant)
        if self._is_old(known, most) and (known.waiting >= most or not known.counting.locked()):
            async with known.counting:
                if self._is_old(known, most):
                    await self._count(tenant, known, most)
        if known.waiting >= most:
            raise TooManyWaiting(
                f"{known.waiting:,} tasks of the tenant {tenant!r} waited already, all that may. Nothing was kept; "
                "send it again when some of them were started, or raise `tasks.max_waiting_per_tenant`.",
                retry_after_s=RETRY_AFTER_S,
            )
        known.waiting += 1
        known.uncounted += 1
        known.on_the_way += 1
        try:
            yield
        except BaseException:
            known.waiting -= 1
            raise
        finally:
            known.on_the_way -= 1

    def _is_old(self, known: _Known, most: int) -> bool:
        return self._clock() >= (known.full_until if known.waiting >= most else known.lasts_until)

    async def _count(self, tenant: str, known: _Known, most: int) -> None:
        """Some may be counted twice, so that none is missed."""
        began = self._clock()
        known.uncounted = known.on_the_way
        counted = await self._store.waiting(tenant, at_most=most)
        ended = self._clock()
        known.waiting = counted + known.uncounted
        rest_s = max(COUNT_S, COUNT_PART * (ended - began))
        known.full_until = ended + rest_s
        known.lasts_until = ended + max(rest_s, (most - known.waiting) / 2 / FASTEST_PER_S)

    def _of(self, tenant: str) -> _Known:
        known = self._known.get(tenant)
        if known is None:
            if len(self._known) >= REMEMBERED:
                self._forget()
            known = self._known[tenant] = _Known()
        return known

    def _forget(self) -> None:
        """Those that would be counted again anyway."""
        now = self._clock()
        self._known = {
            tenant: known
            for tenant, known in self._known.items()
            if known.on_the_way or known.counting.locked() or now < known.lasts_until
        }
