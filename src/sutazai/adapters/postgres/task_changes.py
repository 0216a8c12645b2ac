"""
One transaction of changes to tasks: rows are locked, events are applied by the rules of `core.task`, and rows, events
and word for the queue are written together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from itertools import groupby
from operator import attrgetter

from sutazai.adapters.postgres.claims import Claims, word_of
from sutazai.adapters.postgres.database import Connection, Database
from sutazai.adapters.postgres.dispatch_rows import put
from sutazai.adapters.postgres.task_rows import changed_rows, event_rows, keys, new_rows, task_of
from sutazai.core.task import (
    Event,
    Failed,
    FailureReason,
    IllegalChange,
    Released,
    Submitted,
    Task,
    TaskStatus,
    after,
    digits_of,
    id_of,
    storable,
)
from sutazai.ports.task_events import form_of

MAX_TOLD = 200
"""Ids in one notification; PostgreSQL takes 8,000 bytes."""


class TaskChanges:
    """What one transaction does, gathered until `write`."""

    def __init__(
        self,
        connection: Connection,
        database: Database,
        now: datetime,
        *,
        claims: Claims | None = None,
        wanted: Collection[str] = (),
    ) -> None:
        """
        Nothing is locked yet.

        Args:
            claims: what consumers here hold of it from the start.
            wanted: what an earlier try found out that it needs; locked together with the first ones.
        """
        self._connection = connection
        self._sql = database.sql
        self._claims = claims or Claims(None)
        self.now = now
        self.wanted = set(wanted)
        """All that was to be locked."""
        self._has_locked = False
        self._tasks: dict[str, Task] = {}
        self._before: dict[str, Task] = {}
        """As their rows are, or will be before what happened to them here."""
        self._new: dict[str, Task] = {}
        self._changed: dict[str, Task] = {}
        self._events: list[tuple[Task, Event]] = []

    async def lock(self, ids: Sequence[str]) -> None:
        """
        Lock these, and know them as they stand; those that are not there stay unknown.

        The first time it waits for others who have them. Later, while they may wait for us, the database refuses it at
        once: then all that is `wanted` is to be locked from the start.
        """
        self.wanted.update(ids)
        unknown = sorted(self.wanted - self._tasks.keys()) if ids else ()
        if unknown:
            statement = self._sql["lock_more_tasks" if self._has_locked else "lock_tasks"]
            self._has_locked = True
            rows = await self._connection.fetch(statement, *keys(unknown))
            locked = {task.id: task for task in map(task_of, rows)}
            self._tasks.update(locked)
            self._before.update(locked)

    def get(self, task_id: str) -> Task | None:
        """A locked task, with what happened to it in this transaction."""
        return self._tasks.get(task_id)

    def submit(self, task_id: str, event: Submitted) -> Task:
        """A new task."""
        task = after(None, event, id=task_id, at=self.now)
        self._tasks[task_id] = self._new[task_id] = self._before[task_id] = task
        return task

    def apply(self, task_id: str, event: Event) -> Task | None:
        """Let it happen to a locked task; None where it could not."""
        before = self._tasks.get(task_id)
        event = storable(event)
        try:
            task = after(before, event, id=task_id, at=self.now)
        except IllegalChange:
            return None
        self._tasks[task_id] = self._changed[task_id] = task
        self._events.append((task, event))
        return task

    async def release_waiters(self) -> None:
        """Those that waited for what ended go on, or fail with it; and so on for those that waited for them."""
        ended = [task.id for task in self._changed.values() if task.status.is_end]
        while ended:
            gone = await self._connection.fetch(self._sql["end_waits"], [digits_of(task_id) for task_id in ended])
            # What one of them waited for itself is of no meaning any more, should it be requeued and wait again.
            rows = [row for row in gone if id_of(row["waiter"]) not in ended]
            await self.lock([id_of(row["waiter"]) for row in rows])
            ended = []
            for row in rows:
                task = self.apply(id_of(row["waiter"]), self._release(id_of(row["waits_for"]), row["needs_success"]))
                if task is not None and task.status.is_end:
                    ended.append(task.id)

    def _release(self, task_id: str, needs_success: bool) -> Event:
        ended = self._tasks[task_id]
        if needs_success and ended.status is not TaskStatus.COMPLETED:
            why = f"{task_id}, which it waited for, is {ended.status.value}: {ended.error or 'it was ended on request'}"
            return Failed(0, FailureReason.DEPENDENCY, why)
        return Released(task_id)

    async def write(self) -> None:
        """Everything, and tell who listens. A new task is written as it was submitted, and then what happened to it."""
        for created_at, made in groupby(self._new.values(), key=attrgetter("created_at")):
            await self._submit(list(made), created_at)
        if self._changed:
            changed = list(self._changed.values())
            await self._change(changed)
            pending = [task for task in changed if task.status is TaskStatus.PENDING]
            await put(self._connection, self._sql, [(word_of(task), task.run_at) for task in pending], now=self.now)
            await self._leave_webhooks(changed)

    async def _submit(self, tasks: Sequence[Task], created_at: datetime) -> None:
        claimed = self._claims.claim(tasks, self.now)
        also = (created_at, self.now, *form_of(Submitted), list(claimed), list(claimed.values()))
        rows = await self._connection.fetch(self._sql["submit_tasks"], *new_rows(tasks), *also)
        if claimed:
            self._claims.written(rows, tasks)

    async def _change(self, tasks: Sequence[Task]) -> None:
        last = {task.id: (task, event) for task, event in self._events}
        earlier = [(task, event) for task, event in self._events if last[task.id][0] is not task]
        if earlier:
            whose = [
                [digits_of(task.id) for task, _ in earlier],
                [task.created_at for task, _ in earlier],
                [task.version for task, _ in earlier],
            ]
            await self._connection.execute(self._sql["add_events"], *whose, *event_rows(earlier), self.now)
        rows = changed_rows(tasks, [self._before[task.id] for task in tasks])
        events = event_rows([last[task.id] for task in tasks])
        await self._connection.execute(self._sql["change_tasks"], *rows, *events, self.now, _told(tasks))

    async def _leave_webhooks(self, tasks: Sequence[Task]) -> None:
        """Ends that somebody wants to be told of; kept with the end itself, so that none is forgotten."""
        ended = [task for task in tasks if task.status.is_end and task.draft.webhook]
        if ended:
            await self._connection.execute(
                self._sql["add_webhooks"],
                [digits_of(task.id) for task in ended],
                [task.version for task in ended],
                [task.created_at for task in ended],
                [task.status.value for task in ended],
            )
            await self._connection.execute(self._sql["tell_webhooks"])


def _told(tasks: Sequence[Task]) -> str:
    """For a notification; empty where so many changed that whoever listens had better look himself."""
    return ",".join(digits_of(task.id) for task in tasks) if len(tasks) <= MAX_TOLD else ""
