"""Where tasks and their events are kept."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from sutazai.core.mark import Mark
from sutazai.core.task import Event, Task, TaskDraft, TaskStatus
from sutazai.ports.task_events import KeptEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFilter:
    """Which tasks to list; what is None or empty does not matter."""

    status: TaskStatus | None = None
    agent: str = ""
    parent: str = ""
    user: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A delivery that a worker wants to begin."""

    task: str
    may_take_over: bool
    """Whoever had it before is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Why a delivery was not begun; it is to be acknowledged."""

    task: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """An event that is to happen to a task."""

    task: str
    event: Event


class TaskStore(Protocol):
    """
    Tasks as the fold of their events, tenant by tenant.

    Each method is one transaction: all or nothing, except where it says that it answers for each by itself. What makes
    a task pending also puts word of it into the queue in that transaction. Every method raises `StoreUnavailable`
    within its time limit; what it was to write may be there all the same, and can be written again.
    """

    async def submit(self, drafts: Sequence[TaskDraft]) -> Sequence[Task]:
        """
        Make tasks; in the given order.

        A draft whose idempotency key its tenant used before gives the task of then, whatever its other fields are.
        Raises `Overloaded` where the queue is full, and `BadRequest` where one names a task to wait for that its
        tenant does not have.
        """

    async def of_key(self, tenant: str, key: str) -> Task | None:
        """The task that was made with this idempotency key."""

    async def waiting(self, tenant: str, *, at_most: int) -> int:
        """Tasks of a tenant that were not started, or are to be started again, counted up to so many."""

    async def get(self, tenant: str, task_id: str, *, seen: Mark | None = None) -> Task | None:
        """One task; None also for one of another tenant. `seen` is as in `ports/marks.py`."""

    async def several(self, tenant: str, task_ids: Sequence[str]) -> Sequence[Task]:
        """Those that are there, in no particular order."""

    async def page(
        self, tenant: str | None, which: TaskFilter, *, before: str = "", limit: int, seen: Mark | None = None
    ) -> Sequence[Task]:
        """Newest first: those made before the id `before`. With no tenant those of all, and always the newest."""

    async def begin(self, starts: Sequence[Start], *, worker: str, delivery_limit: int) -> Sequence[Task | Refused]:
        """
        Start an attempt of each; in the given order, each by itself.

        One that was started too often, is past its deadline or is to be cancelled ends instead, and is refused.
        """

    async def change(self, changes: Sequence[Change]) -> Sequence[Task | None]:
        """
        Let these happen; each by itself: None for one that could not happen to its task as it stands.

        The end of a task releases those that wait for it.
        """

    async def suspend(self, change: Change, waits_for: Sequence[str]) -> Task | None:
        """
        Let a task wait for others (`Suspended`); those that have ended by now are not waited for.

        The event's own number is not looked at. None where it could not happen.
        """

    async def cancel(self, tenant: str | None, task_id: str) -> Task | None:
        """
        End one that was not started, ask one that was to end, and leave one that has ended; None where it is not there.

        Its unfinished children are cancelled with it.
        """

    async def requeue(self, tenant: str | None, task_id: str) -> Task | None:
        """Give a failed or cancelled one its attempts again. Raises `Conflict` where it is neither."""

    async def called_off(self, held: Sequence[tuple[str, int]]) -> Sequence[str]:
        """Of these attempts (task and fence), the tasks that are to be cancelled or have another attempt by now."""

    async def expire(self, now: datetime, *, limit: int) -> int:
        """End tasks that were not started by their deadline; how many."""

    async def events(self, tenant: str | None, task_id: str, *, after: int = 0, limit: int) -> Sequence[KeptEvent]:
        """Events of one task past that version, oldest first."""

    async def tail(self, *, after: int, limit: int) -> Sequence[KeptEvent]:
        """
        Events of all tasks past that position, in the order of positions, and only those before which none can come.
        """

    async def versions(self, task_ids: Sequence[str]) -> Mapping[str, int]:
        """How many events each of these has, of any tenant; those that are not there are missing."""

    def changed(self) -> AsyncIterator[frozenset[str]]:
        """
        Ids of tasks that something happened to since they were submitted, by any process; empty where that cannot be
        told, so look.

        Never ends; raises only on cancellation.
        """
