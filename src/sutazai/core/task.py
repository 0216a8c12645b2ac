"""
A task: work that an agent does for a tenant, and what can become of it.

A task is the fold of its events: `after(task, event)` is the only way from one state to the next, in the stores, in
replay and in tests. Whatever an event could not have happened to is refused with `IllegalChange`.

    waiting -> pending -> processing -> completed
                  ^           |------> failed       (a dead letter: `requeued` brings it back)
                  |           |------> cancelled
                  |-----------|        retried, lost, handed back
    waiting <-----------------|        suspended: it waits for other tasks

JSON values are kept as text, as they were written.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import lru_cache
from operator import attrgetter
from typing import Any
from uuid import UUID

from sutazai.core.errors import Conflict
from sutazai.core.request import Priority

PREFIX = "task_"
ID_LENGTH = len(PREFIX) + 32
_ID = re.compile(PREFIX + "([0-9a-fA-F]{32})")


class TaskStatus(enum.Enum):
    """Where a task stands."""

    WAITING = "waiting"
    """Other tasks must end first."""
    PENDING = "pending"
    """May be started once `run_at` has come."""
    PROCESSING = "processing"
    """An attempt is under way."""
    COMPLETED = "completed"
    FAILED = "failed"
    """Given up: a dead letter."""
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        """Whether it stays so by itself."""
        return self in _ENDS


_ENDS = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED})


class FailureReason(enum.Enum):
    """Why a task was given up, or an attempt ended."""

    ERROR = "error"
    """The agent raised an error."""
    TIMED_OUT = "timed_out"
    """An attempt took longer than it may."""
    DEADLINE = "deadline"
    """The task was of no use any more."""
    DELIVERY_LIMIT = "delivery_limit"
    """Its workers died so often that it is taken for the cause."""
    UNKNOWN_AGENT = "unknown_agent"
    UNREADABLE = "unreadable"
    """Its input, or the message about it, was not understood."""
    BUDGET = "budget"
    """It took more tokens or money than it may."""
    DEPENDENCY = "dependency"
    """A task that it waited for did not complete."""


class IllegalChange(Conflict):
    """An event that could not happen to the task as it stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDraft:
    """What is asked for: everything about a task that is settled when it is submitted."""

    tenant: str
    user: str = ""
    """The id of the key that submitted it; empty where none was needed."""
    agent: str
    input: str = "{}"
    """JSON."""
    queue: str = "task_processing"
    priority: Priority = Priority.NORMAL
    run_at: datetime | None = None
    """Not before; None = at once."""
    deadline: datetime | None = None
    """Of no use afterwards."""
    idempotency_key: str = ""
    """Of two submissions of a tenant with the same one only the first makes a task; empty = always a new one."""
    parent: str = ""
    """The task that made it; empty for one that a client made."""
    after: tuple[str, ...] = ()
    """Tasks that must have completed before."""
    max_attempts: int = 3
    time_limit_s: float = 600.0
    """Of one attempt."""
    webhook: str = ""
    """Told when the task has ended; empty = nobody."""
    budget_tokens: int | None = None
    """Of all its attempts together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task as it stands after `version` events."""

    id: str
    """`task_` and a UUID of version 7 in 32 hexadecimal digits: sorts by the time it was made."""
    draft: TaskDraft
    version: int
    status: TaskStatus
    created_at: datetime
    """The time in the id, to the millisecond."""
    run_at: datetime
    attempts: int = 0
    """Attempts that failed."""
    deliveries: int = 0
    """How often it was started; the fencing token of the attempt under way."""
    losses: int = 0
    """Attempts whose worker was gone before their end, since it was submitted or requeued."""
    waits_for: int = 0
    """Tasks that must end before it goes on."""
    worker: str = ""
    """Who works on it, or did last."""
    is_cancelling: bool = False
    """Asked to end while an attempt is under way."""
    result: str = ""
    """JSON; empty until it completed, and where the result is an object."""
    result_object: str = ""
    """Name of the object that holds a large result."""
    progress: str = ""
    """JSON: what the agent told last."""
    checkpoint: str = ""
    """JSON: where the agent goes on after a crash."""
    reason: FailureReason | None = None
    error: str = ""
    """What went wrong last, for people."""
    tokens: int = 0
    """Input and output tokens that it took of models, all attempts together."""
    started_at: datetime | None = None
    """The last start."""
    ended_at: datetime | None = None


class Event:
    """Something that happened to a task. Every kind is a frozen dataclass below."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Submitted(Event):
    """It exists."""

    draft: TaskDraft
    waits_for: int = 0


@dataclass(frozen=True, slots=True)
class Released(Event):
    """A task that it waited for has ended."""

    by: str


@dataclass(frozen=True, slots=True)
class Started(Event):
    """An attempt began; where one was under way already, its worker is taken for gone."""

    worker: str
    fence: int


@dataclass(frozen=True, slots=True)
class Progressed(Event):
    """The agent told how far it is."""

    fence: int
    progress: str


@dataclass(frozen=True, slots=True)
class Checkpointed(Event):
    """The agent kept where to go on."""

    fence: int
    checkpoint: str


@dataclass(frozen=True, slots=True)
class Suspended(Event):
    """The agent waits for other tasks, and is started again when they have ended."""

    fence: int
    waits_for: int
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class HandedBack(Event):
    """A worker that stops gave it back, or one that cannot run it; no attempt is counted."""

    fence: int
    run_at: datetime
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Lost(Event):
    """The worker of the attempt is gone, and somebody else starts it."""

    fence: int


@dataclass(frozen=True, slots=True)
class Retried(Event):
    """An attempt failed and another follows."""

    fence: int
    reason: FailureReason
    error: str
    run_at: datetime
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completed(Event):
    """It has a result."""

    fence: int
    result: str
    """JSON; empty where the result is an object."""
    result_object: str = ""
    """Its name, which ends with its SHA-256."""
    result_bytes: int = 0
    """Size of that object."""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """It was given up; `fence` is 0 where no attempt was under way."""

    fence: int
    reason: FailureReason
    error: str
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class CancelAsked(Event):
    """It is to end; its worker is told."""


@dataclass(frozen=True, slots=True)
class Cancelled(Event):
    """It was ended on request."""

    fence: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Requeued(Event):
    """A dead letter, or a cancelled task, gets all its attempts again."""

    run_at: datetime


def after(task: Task | None, event: Event, *, id: str, at: datetime) -> Task:  # noqa: A002 - the id of the task
    """
    The task once the event has happened.

    Raises `IllegalChange` where it could not have.
    """
    if isinstance(event, Submitted):
        if task is not None:
            raise _illegal(task, event)
        created_at = created_at_of(id)
        return Task(
            id=id,
            draft=event.draft,
            version=1,
            status=TaskStatus.WAITING if event.waits_for else TaskStatus.PENDING,
            created_at=created_at,
            run_at=event.draft.run_at or created_at,
            waits_for=event.waits_for,
        )
    if task is None:
        raise IllegalChange(f"{type(event).__name__} happened to a task that does not exist. Submit it first.")
    changes = _CHANGES[type(event)](task, event, at)
    values = dict(zip(_TASK_FIELDS, _task_values(task), strict=True))  # as `replace` does, in half of its time
    values.update(changes, version=task.version + 1)
    return Task(**values)


Changes = dict[str, Any]
_TASK_FIELDS = tuple(field.name for field in fields(Task))
_task_values = attrgetter(*_TASK_FIELDS)


def _released(task: Task, event: Released, at: datetime) -> Changes:
    _need(task, event, TaskStatus.WAITING)
    left = task.waits_for - 1
    if left > 0:
        return {"waits_for": left}
    run_at = max(at, task.run_at)
    return {"waits_for": 0, "status": TaskStatus.PENDING, "run_at": run_at}


def _started(task: Task, event: Started, at: datetime) -> Changes:
    _need(task, event, TaskStatus.PENDING, TaskStatus.PROCESSING)
    if event.fence != task.deliveries + 1:
        raise _illegal(task, event)
    return {
        "status": TaskStatus.PROCESSING,
        "deliveries": event.fence,
        "losses": task.losses + (task.status is TaskStatus.PROCESSING),
        "worker": event.worker,
        "started_at": at,
    }


def _progressed(task: Task, event: Progressed, _: datetime) -> Changes:
    _need_hold(task, event, event.fence)
    return {"progress": event.progress}


def _checkpointed(task: Task, event: Checkpointed, _: datetime) -> Changes:
    _need_hold(task, event, event.fence)
    return {"checkpoint": event.checkpoint}


def _suspended(task: Task, event: Suspended, at: datetime) -> Changes:
    _need_hold(task, event, event.fence)
    waits = event.waits_for > 0
    return {
        "status": TaskStatus.WAITING if waits else TaskStatus.PENDING,
        "waits_for": event.waits_for,
        "tokens": task.tokens + event.tokens,
        "run_at": at,
    }


def _handed_back(task: Task, event: HandedBack, _: datetime) -> Changes:
    _need_hold(task, event, event.fence)
    return {"status": TaskStatus.PENDING, "run_at": event.run_at, "tokens": task.tokens + event.tokens}


def _lost(task: Task, event: Lost, at: datetime) -> Changes:
    _need_hold(task, event, event.fence)
    return {"status": TaskStatus.PENDING, "run_at": at, "losses": task.losses + 1}


def _retried(task: Task, event: Retried, _: datetime) -> Changes:
    _need_hold(task, event, event.fence)
    return {
        "status": TaskStatus.PENDING,
        "attempts": task.attempts + 1,
        "run_at": event.run_at,
        "reason": event.reason,
        "error": event.error,
        "tokens": task.tokens + event.tokens,
    }


def _completed(task: Task, event: Completed, at: datetime) -> Changes:
    _need_hold(task, event, event.fence)
    return {
        "status": TaskStatus.COMPLETED,
        "result": event.result,
        "result_object": event.result_object,
        "reason": None,
        "error": "",
        "is_cancelling": False,
        "tokens": task.tokens + event.tokens,
        "ended_at": at,
    }


def _failed(task: Task, event: Failed, at: datetime) -> Changes:
    if task.status is TaskStatus.PROCESSING:
        _need_hold(task, event, event.fence)
    else:
        _need(task, event, TaskStatus.PENDING, TaskStatus.WAITING)
        if event.fence:
            raise _illegal(task, event)
    return {
        "status": TaskStatus.FAILED,
        "attempts": task.attempts + (1 if event.fence else 0),
        "reason": event.reason,
        "error": event.error,
        "waits_for": 0,
        "is_cancelling": False,
        "tokens": task.tokens + event.tokens,
        "ended_at": at,
    }


def _cancel_asked(task: Task, event: CancelAsked, _: datetime) -> Changes:
    _need(task, event, TaskStatus.PROCESSING)
    if task.is_cancelling:
        raise _illegal(task, event)
    return {"is_cancelling": True}


def _cancelled(task: Task, event: Cancelled, at: datetime) -> Changes:
    if task.status is TaskStatus.PROCESSING:
        _need_hold(task, event, event.fence)
    else:
        _need(task, event, TaskStatus.PENDING, TaskStatus.WAITING)
        if event.fence:
            raise _illegal(task, event)
    return {
        "status": TaskStatus.CANCELLED,
        "waits_for": 0,
        "is_cancelling": False,
        "tokens": task.tokens + event.tokens,
        "ended_at": at,
    }


def _requeued(task: Task, event: Requeued, _: datetime) -> Changes:
    _need(task, event, TaskStatus.FAILED, TaskStatus.CANCELLED)
    return {
        "status": TaskStatus.PENDING,
        "attempts": 0,
        "losses": 0,
        "run_at": event.run_at,
        "reason": None,
        "error": "",
        "ended_at": None,
    }


_CHANGES: Mapping[type[Event], Callable[[Task, Any, datetime], Changes]] = {
    Released: _released,
    Started: _started,
    Progressed: _progressed,
    Checkpointed: _checkpointed,
    Suspended: _suspended,
    HandedBack: _handed_back,
    Lost: _lost,
    Retried: _retried,
    Completed: _completed,
    Failed: _failed,
    CancelAsked: _cancel_asked,
    Cancelled: _cancelled,
    Requeued: _requeued,
}


def _need(task: Task, event: Event, *statuses: TaskStatus) -> None:
    if task.status not in statuses:
        raise _illegal(task, event)


def _need_hold(task: Task, event: Event, fence: int) -> None:
    """The attempt that speaks must be the one under way."""
    if task.status is not TaskStatus.PROCESSING or fence != task.deliveries:
        raise _illegal(task, event)


def _illegal(task: Task, event: Event) -> IllegalChange:
    return IllegalChange(
        f"{type(event).__name__} cannot happen to {task.id}, which is {task.status.value} in its delivery "
        f"{task.deliveries}. Somebody else went on with it, or it has ended; read it again."
    )


def task_id(now_s: float, random_bits: int, *, slot: int = 0) -> str:
    """
    A new id: UUID version 7 (RFC 9562), so that ids sort by time.

    Args:
        now_s: Unix seconds; kept to the millisecond.
        random_bits: 62 of them.
        slot: the shard slot of its tenant, by which stores find the task; of the 74 random bits it takes 12.
    """
    milliseconds, low = int(now_s * 1000), random_bits & (1 << 62) - 1
    return f"{PREFIX}{milliseconds << 80 | 0x7 << 76 | slot << 64 | 0b10 << 62 | low:032x}"


def slot_in(id: str) -> int:  # noqa: A002 - the id of the task
    """The shard slot in an id; 0 for what is none."""
    return uuid_of(id).int >> 64 & 0xFFF if is_task_id(id) else 0


def created_at_of(id: str) -> datetime:  # noqa: A002 - the id of the task
    """The time in an id. Raises `ValueError` for what is none."""
    return _time_in(digits_of(id)[:12])


@lru_cache(maxsize=1024)  # many are made in one millisecond
def _time_in(digits: str) -> datetime:
    seconds, rest = divmod(int(digits, 16), 1000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest * 1000)


def uuid_of(id: str) -> UUID:  # noqa: A002 - the id of the task
    """The UUID in an id. Raises `ValueError` for what is none."""
    return UUID(digits_of(id))


def digits_of(id: str) -> str:  # noqa: A002 - the id of the task
    """The hexadecimal digits in an id. Raises `ValueError` for what is none."""
    found = _ID.fullmatch(id)
    if found is None:
        raise ValueError(f"{id[:ID_LENGTH]!r} was no id of a task. Ids begin with `{PREFIX}`.")
    return found[1]


def is_task_id(text: str) -> bool:
    """Whether it could be one."""
    try:
        created_at_of(text)
    except (ValueError, OverflowError, OSError):
        return False
    return True


def id_of(uuid: UUID) -> str:
    """The id around a UUID."""
    return f"{PREFIX}{uuid.hex}"


def is_storable(text: str) -> bool:
    """Whether every store can keep it: no NUL, and no half of a surrogate pair."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= one <= "\udfff" for one in text))


def storable(event: Event) -> Event:
    """The event as every store can keep it: what an agent or its error says must never keep a task from ending."""
    texts = [(name, getattr(event, name)) for name in _TEXTS_OF.get(type(event), ())]
    spoiled = {name: text for name, text in texts if not is_storable(text)}
    if not spoiled:
        return event
    mended = {name: text.encode("utf-8", "replace").decode().replace("\0", "?") for name, text in spoiled.items()}
    return replace(event, **mended)  # type: ignore[type-var]


_TEXTS = frozenset({"error", "worker", "result", "result_object", "progress", "checkpoint"})
"""Fields of events that come from outside."""
_TEXTS_OF = {kind: tuple(field.name for field in fields(kind) if field.name in _TEXTS) for kind in _CHANGES}  # type: ignore[arg-type]
