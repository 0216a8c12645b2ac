"""A schedule: a task that is submitted again and again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sutazai.core.task import TaskDraft

PREFIX = "sched_"
ID_LENGTH = len(PREFIX) + 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A schedule as it stands."""

    id: str
    """`sched_` and 32 hexadecimal digits."""
    tenant: str
    cron: str
    """Five fields: minute, hour, day of the month, month, day of the week."""
    timezone: str
    """What the fields mean, such as `Europe/Berlin`."""
    draft: TaskDraft
    """What is submitted each time, but for its idempotency key."""
    created_at: datetime
    due_at: datetime
    """The next time."""
    last_due_at: datetime | None = None
    """The last time that something was submitted for, or was to be."""
    last_task: str = ""
    """The id of what was submitted then; empty where it was refused."""
    last_error: str = ""
    """Why it was refused."""


def schedule_uuid(schedule_id: str) -> UUID | None:
    """The UUID in an id; None where it is no id of a schedule."""
    digits = schedule_id.removeprefix(PREFIX)
    if len(schedule_id) != ID_LENGTH or not schedule_id.startswith(PREFIX) or not digits.isalnum():
        return None
    try:
        return UUID(digits)
    except ValueError:
        return None
