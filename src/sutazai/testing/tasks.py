"""
Tasks in memory, by the same rules as in production.

A turn works on a copy and is written down at its end, all or nothing. What becomes pending is put into a queue; what
is to run later waits in `later` until `ripen` is called, or `run` runs.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from sutazai.core.errors import BadRequest, Conflict, Overloaded, StoreUnavailable
from sutazai.core.mark import Mark
from sutazai.core.task import (
    CancelAsked,
    Cancelled,
    Event,
    Failed,
    FailureReason,
    IllegalChange,
    Released,
    Requeued,
    Submitted,
    Suspended,
    Task,
    TaskDraft,
    TaskStatus,
    after,
    storable,
)
from sutazai.core.task_ids import TaskIds
from sutazai.policy.sharding import slot_of
from sutazai.policy.tasks import check_draft, may_wait, on_delivery
from sutazai.ports.queue import Message, Queue
from sutazai.ports.task_events import KeptEvent, encode
from sutazai.ports.tasks import Change, Refused, Start, TaskFilter

RIPE_S = 0.05


class MemoryTaskStore:
    """A `TaskStore` that can be told to fail."""

    def __init__(
        self,
        queue: Queue,
        *,
        max_length: int = 100_000,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.is_away = False
        """Raise `StoreUnavailable` from every call."""
        self.later: list[tuple[datetime, Message]] = []
        self._queue = queue
        self._max_length = max_length
        self._wall = wall
        self._ids = TaskIds(secrets.randbits)
        self._tasks: dict[str, Task] = {}
        self._events: list[KeptEvent] = []
        self._keys: dict[tuple[str, str], str] = {}
        self._waits: dict[str, dict[str, bool]] = {}
        """For each task who waits for it, and whether that one needs its success."""
        self._listeners: set[_Listener] = set()

    async def submit(self, drafts: Sequence[TaskDraft]) -> Sequence[Task]:
        self._check()
        for draft in drafts:
            check_draft(draft)
        for queue in {draft.queue for draft in drafts}:
            if await self._queue.depth(queue) >= self._max_length:
                raise Overloaded(f"The queue {queue!r} was full. Send it later.", retry_after_s=5.0)
        turn = _Turn(self._tasks, self._waits, self._wall())
        keys = dict(self._keys)
        made = [self._submit(turn, keys, draft) for draft in drafts]
        self._keys = keys
        await self._end(turn)
        return [turn.tasks[task.id] for task in made]

    def _submit(self, turn: _Turn, keys: dict[tuple[str, str], str], draft: TaskDraft) -> Task:
        if draft.idempotency_key:
            known = keys.get((draft.tenant, draft.idempotency_key))
            if known is not None:
                return turn.tasks[known]
        before = {waited: turn.tasks.get(waited) for waited in draft.after}
        for waited, task in before.items():
            if task is None or task.draft.tenant != draft.tenant:
                raise BadRequest(f"`after` named {waited[:64]!r}, which is no task here.", where="after")
        new = self._ids.next(turn.now, slot_of(draft.tenant))
        if draft.idempotency_key:
            keys[draft.tenant, draft.idempotency_key] = new
        open_ = [task.id for task in before.values() if task is not None and not task.status.is_end]
        lost = [one for one in before.values() if one and one.status in {TaskStatus.FAILED, TaskStatus.CANCELLED}]
        turn.apply(new, Submitted(draft, len(open_) + len(lost)))
        if lost:
            why = f"{lost[0].id}, which it was to wait for, is {lost[0].status.value}."
            turn.apply(new, Failed(0, FailureReason.DEPENDENCY, why))
        else:
            turn.wait(new, open_, needs_success=True)
        return turn.tasks[new]

    async def of_key(self, tenant: str, key: str) -> Task | None:
        self._check()
        known = self._keys.get((tenant, key))
        return None if known is None else self._tasks[known]

    async def waiting(self, tenant: str, *, at_most: int) -> int:
        self._check()
        unstarted = {TaskStatus.WAITING, TaskStatus.PENDING}
        found = [one for one in self._tasks.values() if one.draft.tenant == tenant and one.status in unstarted]
        return min(len(found), at_most)

    async def get(self, tenant: str, task_id: str, *, seen: Mark | None = None) -> Task | None:
        found = await self.several(tenant, [task_id])
        return found[0] if found else None

    async def several(self, tenant: str, task_ids: Sequence[str]) -> Sequence[Task]:
        self._check()
        found = [self._tasks[one] for one in dict.fromkeys(task_ids) if one in self._tasks]
        return [task for task in found if task.draft.tenant == tenant]

    async def page(
        self, tenant: str | None, which: TaskFilter, *, before: str = "", limit: int, seen: Mark | None = None
    ) -> Sequence[Task]:
        self._check()
        found = [
            task
            for task in sorted(self._tasks.values(), key=lambda task: task.id, reverse=True)
            if tenant in {None, task.draft.tenant}
            and (not before or task.id < before)
            and which.status in {None, task.status}
            and which.agent in {"", task.draft.agent}
            and which.parent in {"", task.draft.parent}
            and which.user in {"", task.draft.user}
        ]
        return found[:limit]

    async def begin(self, starts: Sequence[Start], *, worker: str, delivery_limit: int) -> Sequence[Task | Refused]:
        self._check()
        turn = _Turn(self._tasks, self._waits, self._wall())
        begun = [self._begin(turn, start, worker, delivery_limit) for start in starts]
        await self._end(turn)
        return begun

    def _begin(self, turn: _Turn, start: Start, worker: str, delivery_limit: int) -> Task | Refused:
        task = turn.tasks.get(start.task)
        if task is None:
            return Refused(task=start.task, why="it is not there")
        decision = on_delivery(
            task, worker=worker, may_take_over=start.may_take_over, delivery_limit=delivery_limit, now=turn.now
        )
        if isinstance(decision, str):
            return Refused(task=start.task, why=decision)
        begun = turn.apply(start.task, decision)
        if begun is None or begun.status is not TaskStatus.PROCESSING:
            return Refused(task=start.task, why=f"it was ended: {begun.error if begun else 'it changed meanwhile'}")
        return begun

    async def change(self, changes: Sequence[Change]) -> Sequence[Task | None]:
        self._check()
        turn = _Turn(self._tasks, self._waits, self._wall())
        changed = [turn.apply(change.task, change.event) for change in changes]
        await self._end(turn)
        return changed

    async def suspend(self, change: Change, waits_for: Sequence[str]) -> Task | None:
        self._check()
        turn = _Turn(self._tasks, self._waits, self._wall())
        waiter = turn.tasks.get(change.task)
        if waiter is None or not isinstance(change.event, Suspended):
            return None
        others = [turn.tasks.get(other) for other in dict.fromkeys(waits_for)]
        open_ = [other.id for other in others if other is not None and may_wait(waiter, other)]
        task = turn.apply(change.task, replace(change.event, waits_for=len(open_)))
        if task is not None:
            turn.wait(task.id, open_, needs_success=False)
        await self._end(turn)
        return task

    async def cancel(self, tenant: str | None, task_id: str) -> Task | None:
        task = self._of(tenant, task_id)
        if task is None:
            return None
        turn = _Turn(self._tasks, self._waits, self._wall())
        event = CancelAsked() if task.status is TaskStatus.PROCESSING else Cancelled()
        cancelled = turn.apply(task_id, event) or task
        await self._end(turn)
        children = [one.id for one in self._tasks.values() if one.draft.parent == task_id and not one.status.is_end]
        for child in children:
            await self.cancel(tenant, child)
        return cancelled

    async def requeue(self, tenant: str | None, task_id: str) -> Task | None:
        task = self._of(tenant, task_id)
        if task is None:
            return None
        turn = _Turn(self._tasks, self._waits, self._wall())
        again = turn.apply(task_id, Requeued(turn.now))
        if again is None:
            raise Conflict(f"{task_id} is {task.status.value}; only failed and cancelled tasks can be retried.")
        await self._end(turn)
        return again

    async def called_off(self, held: Sequence[tuple[str, int]]) -> Sequence[str]:
        self._check()
        known = [(self._tasks[task], fence) for task, fence in held if task in self._tasks]
        return [
            task.id
            for task, fence in known
            if task.is_cancelling or task.deliveries != fence or task.status is not TaskStatus.PROCESSING
        ]

    async def expire(self, now: datetime, *, limit: int) -> int:
        self._check()
        unstarted = {TaskStatus.WAITING, TaskStatus.PENDING}
        late = [
            (task.draft.deadline, task.id)
            for task in self._tasks.values()
            if task.draft.deadline is not None and task.draft.deadline <= now and task.status in unstarted
        ]
        turn = _Turn(self._tasks, self._waits, self._wall())
        event = Failed(0, FailureReason.DEADLINE, "Its deadline was over before it was started.")
        expired = sum(turn.apply(one, event) is not None for _, one in sorted(late)[:limit])
        await self._end(turn)
        return expired

    async def events(self, tenant: str | None, task_id: str, *, after: int = 0, limit: int) -> Sequence[KeptEvent]:
        self._check()
        found = [one for one in self._events if one.task == task_id and one.version > after]
        return [one for one in found if tenant in {None, one.tenant}][:limit]

    async def tail(self, *, after: int, limit: int) -> Sequence[KeptEvent]:
        self._check()
        return self._events[after : after + limit]

    async def versions(self, task_ids: Sequence[str]) -> Mapping[str, int]:
        """How many events each of these has, of any tenant; those that are not there are missing."""
        self._check()
        return {one: self._tasks[one].version for one in task_ids if one in self._tasks}

    async def changed(self) -> AsyncIterator[frozenset[str]]:
        listener = _Listener()
        self._listeners.add(listener)
        try:
            yield frozenset()
            while True:
                await listener.called.wait()
                yield listener.news()
        finally:
            self._listeners.discard(listener)

    async def ripen(self) -> None:
        """Put word of those whose time has come by the wall clock."""
        now = self._wall()
        ripe = [word for run_at, word in self.later if run_at <= now]
        self.later = [(run_at, word) for run_at, word in self.later if run_at > now]
        await self._queue.put(ripe)

    async def run(self) -> None:
        """Ripen what waits. Runs until cancelled."""
        while True:
            await self.ripen()
            await asyncio.sleep(RIPE_S)

    def _of(self, tenant: str | None, task_id: str) -> Task | None:
        self._check()
        task = self._tasks.get(task_id)
        return task if task is not None and tenant in {None, task.draft.tenant} else None

    async def _end(self, turn: _Turn) -> None:
        turn.release_waiters()
        self._tasks, self._waits = turn.tasks, turn.waits
        for task, event in turn.events:
            self._events.append(_kept(len(self._events) + 1, task, event, turn.now))
        last = {task.id: turn.tasks[task.id] for task, _ in turn.events}
        older = {task.id: task for task, event in turn.events if not isinstance(event, Submitted)}
        pending = [task for task in last.values() if task.status is TaskStatus.PENDING]
        self.later += [(task.run_at, _word(task)) for task in pending if task.run_at > turn.now]
        if older:
            for listener in self._listeners:
                listener.hear(older)
        await self._queue.put([_word(task) for task in pending if task.run_at <= turn.now])

    def _check(self) -> None:
        if self.is_away:
            raise StoreUnavailable("The store in memory was told to be away. Set `is_away` to False.")


class _Turn:
    """What one call does, on copies."""

    def __init__(self, tasks: dict[str, Task], waits: dict[str, dict[str, bool]], now: datetime) -> None:
        self.tasks = dict(tasks)
        self.waits = {waited: dict(waiters) for waited, waiters in waits.items()}
        self.events: list[tuple[Task, Event]] = []
        self.now = now

    def apply(self, task_id: str, event: Event) -> Task | None:
        event = storable(event)
        try:
            task = after(self.tasks.get(task_id), event, id=task_id, at=self.now)
        except IllegalChange:
            return None
        self.tasks[task_id] = task
        self.events.append((task, event))
        return task

    def wait(self, waiter: str, others: Sequence[str], *, needs_success: bool) -> None:
        for other in others:
            self.waits.setdefault(other, {}).setdefault(waiter, needs_success)

    def release_waiters(self) -> None:
        looked_at = 0
        while looked_at < len(self.events):
            task_id = self.events[looked_at][0].id
            looked_at += 1
            if not self.tasks[task_id].status.is_end:
                continue
            for waiters in self.waits.values():
                waiters.pop(task_id, None)
            for waiter, needs_success in self.waits.pop(task_id, {}).items():
                self.apply(waiter, self._release(self.tasks[task_id], needs_success))

    def _release(self, ended: Task, needs_success: bool) -> Event:
        if needs_success and ended.status is not TaskStatus.COMPLETED:
            how = f"{ended.status.value}: {ended.error or 'it was ended on request'}"
            return Failed(0, FailureReason.DEPENDENCY, f"{ended.id}, which it waited for, is {how}")
        return Released(ended.id)


class _Listener:
    def __init__(self) -> None:
        self.called = asyncio.Event()
        self._ids: set[str] = set()

    def hear(self, ids: dict[str, Task]) -> None:
        self._ids.update(ids)
        self.called.set()

    def news(self) -> frozenset[str]:
        news = frozenset(self._ids)
        self._ids.clear()
        self.called.clear()
        return news


def _kept(position: int, task: Task, event: Event, now: datetime) -> KeptEvent:
    kind, schema, data = encode(event)
    return KeptEvent(
        position=position,
        task=task.id,
        version=task.version,
        tenant=task.draft.tenant,
        kind=kind,
        schema=schema,
        at=now,
        data=data,
    )


def _word(task: Task) -> Message:
    draft = task.draft
    return Message(task=task.id, queue=draft.queue, tenant=draft.tenant, agent=draft.agent, priority=draft.priority)
