"""
How far a copy must have come before a tenant reads from it: past what the tenant wrote.

Writing costs nothing here. It is the time of a write that is noted; the next look at the original, which is looked at
all the time, then tells a position past it. Until then nobody knows, and the tenant reads from the original.
"""

from __future__ import annotations

from collections import OrderedDict

AT_MOST = 10_000
"""Tenants that are told apart. All others are held to have written the last that any forgotten one did."""


class OwnWrites:
    """Of each tenant the newest write. Times are seconds of a clock that never goes back."""

    def __init__(self, at_most: int = AT_MOST) -> None:
        self._at_most = at_most
        self._unplaced: dict[str, float] = {}
        """When those wrote of whose writes no position is known yet."""
        self._all_unplaced_at: float | None = None
        """Set where these were too many: as if everybody had written then."""
        self._positions: OrderedDict[str, int] = OrderedDict()
        self._floor = 0
        """For everybody."""

    def note(self, tenant: str, now: float) -> None:
        """It wrote something, and what it wrote is there by now."""
        self._unplaced[tenant] = now
        if len(self._unplaced) > self._at_most:
            self._unplaced.clear()
            self._all_unplaced_at = now

    def looked(self, began: float, position: int) -> None:
        """The original was at this position at some moment after `began`."""
        if self._all_unplaced_at is not None and self._all_unplaced_at <= began:
            self._all_unplaced_at = None
            self._floor = max(self._floor, position)
        for tenant in [tenant for tenant, at in self._unplaced.items() if at <= began]:
            del self._unplaced[tenant]
            self._positions[tenant] = position
            self._positions.move_to_end(tenant)
        while len(self._positions) > self._at_most:
            _, forgotten = self._positions.popitem(last=False)
            self._floor = max(self._floor, forgotten)

    def needed(self, tenant: str) -> int | None:
        """The position that a copy must have; None where only the original will do."""
        if tenant in self._unplaced or self._all_unplaced_at is not None:
            return None
        return max(self._positions.get(tenant, 0), self._floor)
