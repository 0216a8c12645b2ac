"""Where schedules are kept."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from sutazai.core.mark import Mark
from sutazai.core.schedule import Schedule


class ScheduleStore(Protocol):
    """Schedules, tenant by tenant. Every method raises `StoreUnavailable` within its time limit."""

    async def add(self, schedule: Schedule, *, at_most: int) -> bool:
        """Keep a new one; False where its tenant has so many already."""

    async def replace(self, schedule: Schedule) -> bool:
        """Put it in the place of the one with its id and tenant; False where there is none."""

    async def get(self, tenant: str, schedule_id: str) -> Schedule | None:
        """One; None also for one of another tenant."""

    async def page(self, tenant: str, *, after: str = "", limit: int, seen: Mark | None = None) -> Sequence[Schedule]:
        """In the order of ids: those behind the id `after`. `seen` is as in `ports/marks.py`."""

    async def delete(self, tenant: str, schedule_id: str) -> bool:
        """Whether it was there."""

    async def due(self, *, limit: int) -> tuple[datetime, Sequence[Schedule]]:
        """The time by the store's clock, and schedules that are due by it: the oldest first."""

    async def next_in_s(self) -> float | None:
        """Seconds until the next one is due; None where there is none."""

    async def advance(
        self, schedule: Schedule, *, due_at: datetime, last_due_at: datetime, last_task: str, last_error: str
    ) -> None:
        """It was dealt with and is due then; nothing where somebody else did so, or it was changed meanwhile."""
