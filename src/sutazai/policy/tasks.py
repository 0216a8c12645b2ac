"""What becomes of a task that is delivered, and of one whose attempt failed."""

from __future__ import annotations

from datetime import datetime, timedelta
from operator import attrgetter

from sutazai.core.errors import BadRequest
from sutazai.core.task import (
    Cancelled,
    Event,
    Failed,
    FailureReason,
    HandedBack,
    Retried,
    Started,
    Task,
    TaskDraft,
    TaskStatus,
    is_storable,
    is_task_id,
)

FIRST_PAUSE_S = 1.0
"""Upper bound of the pause before the second attempt; doubles with each."""
LONGEST_PAUSE_S = 300.0
FINAL = frozenset({FailureReason.UNREADABLE, FailureReason.UNKNOWN_AGENT, FailureReason.BUDGET, FailureReason.DEADLINE})
"""Trying again would end the same way."""
LONGEST_NAME = 512

FULL_HOLDS_S = 0.1
FASTEST_PER_S = 10_000.0
"""More than any database of ours was seen to keep."""


def holds_count(counted: int, added: int, age_s: float, limit: int) -> bool:
    """
    Whether what was counted in a queue still tells how full it is. Another count reads every message that waits.

    It holds while we added less than half of the room that was found, and while all the others together can hardly
    have filled the other half. A full queue holds for a moment: those who are refused shall not cost a count each.

    Args:
        added: by us since then, and what is about to be; whatever was taken meanwhile is not known.
        limit: the length that the queue may have.
    """
    half = (limit - counted) / 2
    return age_s < FULL_HOLDS_S if half <= 0 else added <= half and age_s < half / FASTEST_PER_S


_NAMES = ("agent", "queue", "idempotency_key", "tenant", "user")
_TEXTS = (*_NAMES, "webhook", "input")
_texts_of = attrgetter(*_TEXTS)


def check_draft(draft: TaskDraft) -> None:
    """Raises `BadRequest` for what no store could keep."""
    for where, text in zip(_TEXTS, _texts_of(draft), strict=True):
        if len(text) > LONGEST_NAME and where in _NAMES:
            raise BadRequest(f"`{where}` had {len(text):,} characters. Use {LONGEST_NAME} at most.", where=where)
        if not is_storable(text):
            raise BadRequest(f"`{where}` held a NUL or half a surrogate pair. Take it out.", where=where)
    if draft.parent and not is_task_id(draft.parent):
        raise BadRequest(f"`parent` was {draft.parent[:64]!r}, which is no id of a task.", where="parent")


def may_wait(waiter: Task, other: Task) -> bool:
    """Whether a task can wait for another one: not for itself, another tenant's, or one that has ended."""
    return other.id != waiter.id and other.draft.tenant == waiter.draft.tenant and not other.status.is_end


def on_delivery(task: Task, *, worker: str, may_take_over: bool, delivery_limit: int, now: datetime) -> Event | str:
    """
    What to do with a task that was delivered to a worker: an event, or in words why there is nothing to do.

    Args:
        may_take_over: whoever had the message before is gone.
        delivery_limit: workers that a task may outlive. Starts after a pause, a hand-over or a join are not counted:
            those workers lived.
    """
    if task.status.is_end:
        return f"it is {task.status.value}"
    if task.status is TaskStatus.WAITING:
        return "it waits for other tasks"
    is_under_way = task.status is TaskStatus.PROCESSING
    if is_under_way and not may_take_over:
        return f"{task.worker} works on it"
    fence = task.deliveries if is_under_way else 0
    if task.is_cancelling:
        return Cancelled(fence)
    if task.draft.deadline is not None and task.draft.deadline <= now:
        return Failed(fence, FailureReason.DEADLINE, "Its deadline was over before it was started.")
    if task.losses + is_under_way >= delivery_limit:
        why = f"{task.losses + is_under_way} of its workers did not live to its end."
        return Failed(fence, FailureReason.DELIVERY_LIMIT, why)
    return Started(worker, task.deliveries + 1)


def on_failure(task: Task, reason: FailureReason, error: str, *, tokens: int, now: datetime, random: float) -> Event:
    """
    Another attempt after a pause, or a dead letter.

    Args:
        random: from 0 to 1. The pause is a random part of a bound that doubles ("full jitter": Brooker, "Exponential
            backoff and jitter", AWS 2015), so that tasks which failed together do not come back together.
    """
    fence = task.deliveries
    if reason in FINAL or task.attempts + 1 >= task.draft.max_attempts:
        return Failed(fence, reason, error, tokens)
    bound_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**task.attempts)
    run_at = now + timedelta(seconds=bound_s * random)
    if task.draft.deadline is not None and run_at >= task.draft.deadline:
        return Failed(fence, reason, error, tokens)
    return Retried(fence, reason, error, run_at, tokens)


def on_leaving(task: Task, *, tokens: int, now: datetime) -> Event:
    """A worker stops before the end: somebody else starts it at once."""
    return HandedBack(task.deliveries, now, tokens)
