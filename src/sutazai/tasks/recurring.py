"""
Submits what is due: each due time of a schedule once, whichever gateways look at it.

The idempotency key of a task is made of its schedule and its due time, so that gateways which see the same thing due
get the same task. What was missed while nobody looked is made up for by its latest time alone.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import structlog

from sutazai.core.errors import BadRequest, Conflict, Misdirected, NotFound, Overloaded, SutazaiError, TooManyWaiting
from sutazai.core.schedule import PREFIX, Schedule
from sutazai.core.task import TaskDraft
from sutazai.policy.cron import check, last_due, next_due
from sutazai.ports.schedules import ScheduleStore
from sutazai.tasks.submit import Submission

log = structlog.get_logger("sutazai.schedules")

AT_ONCE = 100
MAX_PER_TENANT = 1000
LOOK_S = 15.0
"""Between two looks: another gateway may have got a schedule that is due before all that is known here."""
AGAIN_S = 2.0
"""After a failure."""
EARLY_S = 0.01
"""Clocks run differently; whoever wakes a moment too early would look again and again."""
PUT_OFF = timedelta(hours=1)
"""Where nobody can tell the next time: the zone is not known any more."""


class Recurring:
    """Schedules, and what they make. `run` has to run beside it."""

    def __init__(
        self,
        store: ScheduleStore,
        submission: Submission,
        *,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._submission = submission
        self._wall = wall
        self._called = asyncio.Event()

    async def add(self, cron: str, timezone: str, draft: TaskDraft) -> Schedule:
        """A new schedule. Raises `BadRequest`, and `Conflict` where the tenant has too many."""
        schedule = self._made(f"{PREFIX}{uuid.uuid4().hex}", cron, timezone, draft)
        if not await self._store.add(schedule, at_most=MAX_PER_TENANT):
            raise Conflict(f"There were {MAX_PER_TENANT:,} schedules already. Delete one first.")
        self._called.set()
        return schedule

    async def replace(self, schedule_id: str, cron: str, timezone: str, draft: TaskDraft) -> Schedule:
        """The same schedule with other contents. Raises `BadRequest` or `NotFound`."""
        if await self._store.replace(self._made(schedule_id, cron, timezone, draft)):
            self._called.set()
            found = await self._store.get(draft.tenant, schedule_id)
            if found is not None:
                return found
        raise NotFound(f"No schedule is {schedule_id[:64]!r} here; `GET /v1/schedules` lists those that are.")

    def _made(self, schedule_id: str, cron: str, timezone: str, draft: TaskDraft) -> Schedule:
        check(cron, timezone)
        now = self._wall()
        return Schedule(
            id=schedule_id,
            tenant=draft.tenant,
            cron=cron,
            timezone=timezone,
            draft=draft,
            created_at=now,
            due_at=next_due(cron, timezone, after=now),
        )

    async def run(self) -> None:
        """Submit what is due until cancelled."""
        while True:
            try:
                while await self.submit_due() == AT_ONCE:
                    pass
                seconds = await self._store.next_in_s()
                pause_s = LOOK_S if seconds is None else min(LOOK_S, max(0.0, seconds) + EARLY_S)
            except SutazaiError as error:
                log.warning("schedules wait; what is due is submitted later", why=error.message)
                pause_s = AGAIN_S
            except Exception:  # the border of one turn
                log.exception("schedules were not looked at")
                pause_s = AGAIN_S
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._called.wait()
            self._called.clear()

    async def submit_due(self) -> int:
        """Submit what is due now, up to a bound; how many schedules that were. Raises what is to be tried again."""
        now, due = await self._store.due(limit=AT_ONCE)
        for schedule in due:
            await self._submit(schedule, now)
        return len(due)

    async def _submit(self, schedule: Schedule, now: datetime) -> None:
        """Raises `Overloaded` and `StoreUnavailable`: it stays due then."""
        task_id, why, at, then = "", "", schedule.due_at, now + PUT_OFF
        try:
            at = max(schedule.due_at, last_due(schedule.cron, schedule.timezone, until=now))
            then = next_due(schedule.cron, schedule.timezone, after=now)
            key = f"schedule {schedule.id} {at.isoformat()}"
            task_id = (await self._submission.repeat(replace(schedule.draft, idempotency_key=key))).id
        except Overloaded:
            raise
        except (BadRequest, Misdirected, NotFound, TooManyWaiting) as error:
            why = error.message
            log.warning("schedule made no task", schedule=schedule.id, why=why)
        await self._store.advance(schedule, due_at=then, last_due_at=at, last_task=task_id, last_error=why)
