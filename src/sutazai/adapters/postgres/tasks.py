"""Tasks in PostgreSQL."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from copy import copy
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeAlias, TypeVar

import asyncpg

from sutazai.adapters.postgres.claims import Claims
from sutazai.adapters.postgres.database import Connection, Database
from sutazai.adapters.postgres.ear import heard
from sutazai.adapters.postgres.queue import PostgresQueue
from sutazai.adapters.postgres.tail import EventTail
from sutazai.adapters.postgres.task_changes import TaskChanges
from sutazai.adapters.postgres.task_rows import event_of, keys, read, read_in, task_of
from sutazai.core.errors import BadRequest, Conflict, Overloaded, StoreUnavailable
from sutazai.core.mark import Mark
from sutazai.core.task import (
    CancelAsked,
    Cancelled,
    Failed,
    FailureReason,
    Requeued,
    Submitted,
    Suspended,
    Task,
    TaskDraft,
    TaskStatus,
    created_at_of,
    digits_of,
    id_of,
    is_task_id,
)
from sutazai.core.task_ids import TaskIds
from sutazai.policy.sharding import slot_of
from sutazai.policy.tasks import check_draft, holds_count, may_wait, on_delivery
from sutazai.ports.task_events import KeptEvent
from sutazai.ports.tasks import Change, Refused, Start, TaskFilter

T = TypeVar("T")
Begin: TypeAlias = Callable[[], AbstractAsyncContextManager[Connection]]

LOOK_S = 5.0
CHANNEL = "sutazai_tasks"
TRIES = 10
"""Each knows more of what it needs."""
IN_THE_WAY = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
RETRY_AFTER_S = 5.0


@dataclass(slots=True, eq=False)
class _Seen:
    """A queue as it was counted, up to its length."""

    depth: int
    at: float
    added: int = 0
    """By this store since then, and perhaps not committed."""


class PostgresTaskStore:
    """The `TaskStore` of production."""

    def __init__(
        self,
        database: Database,
        *,
        max_length: int,
        queue: PostgresQueue | None = None,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Nothing was counted yet.

        Args:
            queue: whose consumers hold word of new tasks from the start where they are idle.
        """
        self._database = database
        self._queue = queue
        self._sql = database.sql
        self._max_length = max_length
        self._wall = wall
        self._clock = clock
        self._seen: dict[tuple[Database, str], _Seen] = {}
        """How full each queue was, in each database."""
        self._tail = EventTail(database)
        self._ids = TaskIds(secrets.randbits)

    def on(self, database: Database) -> PostgresTaskStore:
        """The same store for a view of its database."""
        view = copy(self)
        view._database = database
        return view

    async def submit(self, drafts: Sequence[TaskDraft]) -> Sequence[Task]:
        for draft in drafts:
            check_draft(draft)
        # Where nothing is to be read or locked before, one statement writes it all.
        is_plain = not any(draft.idempotency_key or draft.after for draft in drafts)
        return await self._in_turn(
            lambda changes, connection: self._submit(changes, connection, drafts),
            self._database.statement if is_plain else None,
        )

    async def _submit(self, changes: TaskChanges, connection: Connection, drafts: Sequence[TaskDraft]) -> list[Task]:
        await self._check_room(connection, drafts)
        known = await self._known(connection, drafts, changes.now)
        await changes.lock([before for draft in drafts for before in draft.after])
        made: list[Task] = []
        for draft, (new_id, existing) in zip(drafts, known, strict=True):
            made.append(existing or changes.get(new_id) or await self._make(changes, connection, draft, new_id))
        return made

    async def _make(self, changes: TaskChanges, connection: Connection, draft: TaskDraft, new_id: str) -> Task:
        before = {waited: changes.get(waited) for waited in draft.after}
        for waited, task in before.items():
            if task is None or task.draft.tenant != draft.tenant:
                raise BadRequest(f"`after` named {waited[:64]!r}, which is no task here.", where="after")
        open_ = [task for task in before.values() if task is not None and not task.status.is_end]
        lost = [one for one in before.values() if one and one.status in {TaskStatus.FAILED, TaskStatus.CANCELLED}]
        task = changes.submit(new_id, Submitted(draft, len(open_) + len(lost)))
        if lost:
            why = f"{lost[0].id}, which it was to wait for, is {lost[0].status.value}."
            return changes.apply(new_id, Failed(0, FailureReason.DEPENDENCY, why)) or task
        waits = [digits_of(one.id) for one in open_]
        if waits:
            await connection.execute(
                self._sql["add_waits"], waits, [digits_of(new_id)] * len(waits), [True] * len(waits)
            )
        return task

    async def _check_room(self, connection: Connection, drafts: Sequence[TaskDraft]) -> None:
        for queue, added in Counter(draft.queue for draft in drafts).items():
            known = (self._database.whole, queue)
            seen = self._seen.get(known)
            now = self._clock()
            if seen is None or not holds_count(seen.depth, seen.added + added, now - seen.at, self._max_length):
                depth = await connection.fetchval(self._sql["depth_dispatch"], queue, self._max_length)
                seen = self._seen[known] = _Seen(depth, now)
            if seen.depth >= self._max_length:
                raise Overloaded(
                    f"The queue {queue!r} held {seen.depth:,} tasks, all that it may. Nothing was kept; send it later.",
                    retry_after_s=RETRY_AFTER_S,
                )
            seen.added += added

    async def _known(
        self, connection: Connection, drafts: Sequence[TaskDraft], now: datetime
    ) -> Sequence[tuple[str, Task | None]]:
        """For each draft the id that it is to have, and the task where there is one already."""
        # Of the time of this transaction: a task is due from the time in its id on, and one of a moment later would
        # wait for the next look at what has become due, while those that come after it go first.
        ids = [self._ids.next(now, slot_of(draft.tenant)) for draft in drafts]
        keyed: dict[tuple[str, str], str] = {}
        for place, draft in enumerate(drafts):
            if draft.idempotency_key:
                ids[place] = keyed.setdefault((draft.tenant, draft.idempotency_key), ids[place])
        if not keyed:
            return [(one, None) for one in ids]
        columns = [[tenant for tenant, _ in keyed], [key for _, key in keyed]]
        claimed = await connection.fetch(
            self._sql["claim_task_keys"], *columns, [digits_of(one) for one in keyed.values()]
        )
        ours = {id_of(row["task"]) for row in claimed}
        rows = await connection.fetch(self._sql["tasks_of_keys"], *columns)
        of_key = {(row["tenant"], row["key"]): id_of(row["task"]) for row in rows}
        others = [one for one in of_key.values() if one not in ours]
        tasks = {task.id: task for task in await read_in(connection, self._database, None, others)}
        ids = [of_key.get((draft.tenant, draft.idempotency_key), own) for draft, own in zip(drafts, ids, strict=True)]
        return [(one, tasks.get(one)) for one in ids]

    async def of_key(self, tenant: str, key: str) -> Task | None:
        async with self._database.transaction() as connection:
            rows = await connection.fetch(self._sql["tasks_of_keys"], [tenant], [key])
            found = await read_in(connection, self._database, tenant, [id_of(row["task"]) for row in rows])
        return found[0] if found else None

    async def waiting(self, tenant: str, *, at_most: int) -> int:
        async with self._database.statement() as connection:
            waiting: int = await connection.fetchval(self._sql["waiting_of_tenant"], tenant, at_most)
        return waiting

    async def get(self, tenant: str, task_id: str, *, seen: Mark | None = None) -> Task | None:
        found = await read(self._database, tenant, [task_id], seen=seen)
        if not found and seen is not None and self._database.has_replicas:
            # what a replica does not have yet is no reason to deny it
            found = await read(self._database, tenant, [task_id])
        return found[0] if found else None

    async def several(self, tenant: str, task_ids: Sequence[str]) -> Sequence[Task]:
        return await read(self._database, tenant, task_ids)

    async def page(
        self, tenant: str | None, which: TaskFilter, *, before: str = "", limit: int, seen: Mark | None = None
    ) -> Sequence[Task]:
        if (before and not is_task_id(before)) or (which.parent and not is_task_id(which.parent)):
            return ()
        rows = await self._database.rows(
            self._sql["tasks_page"],
            tenant,
            digits_of(before) if before else None,
            None if which.status is None else which.status.value,
            which.agent,
            digits_of(which.parent) if which.parent else None,
            which.user,
            limit,
            tenant=tenant,
            seen=seen,
        )
        return [task_of(row) for row in rows]

    async def begin(self, starts: Sequence[Start], *, worker: str, delivery_limit: int) -> Sequence[Task | Refused]:
        async def work(changes: TaskChanges, _: Connection) -> list[Task | Refused]:
            await changes.lock([start.task for start in starts])
            return [self._begin(changes, start, worker, delivery_limit) for start in starts]

        return await self._in_turn(work)

    def _begin(self, changes: TaskChanges, start: Start, worker: str, delivery_limit: int) -> Task | Refused:
        task = changes.get(start.task)
        if task is None:
            return Refused(task=start.task, why="it is not there")
        decision = on_delivery(
            task, worker=worker, may_take_over=start.may_take_over, delivery_limit=delivery_limit, now=self._wall()
        )
        if isinstance(decision, str):
            return Refused(task=start.task, why=decision)
        begun = changes.apply(start.task, decision)
        if begun is None or begun.status is not TaskStatus.PROCESSING:
            return Refused(task=start.task, why=f"it was ended: {begun.error if begun else 'it changed meanwhile'}")
        return begun

    async def change(self, changes: Sequence[Change]) -> Sequence[Task | None]:
        async def work(under_way: TaskChanges, connection: Connection) -> list[Task | None]:
            await under_way.lock([change.task for change in changes])
            return [under_way.apply(change.task, change.event) for change in changes]

        return await self._in_turn(work)

    async def suspend(self, change: Change, waits_for: Sequence[str]) -> Task | None:
        async def work(changes: TaskChanges, connection: Connection) -> Task | None:
            await changes.lock([change.task, *waits_for])
            waiter = changes.get(change.task)
            if waiter is None or not isinstance(change.event, Suspended):
                return None
            open_ = [task for task in map(changes.get, dict.fromkeys(waits_for)) if task and may_wait(waiter, task)]
            task = changes.apply(change.task, replace(change.event, waits_for=len(open_)))
            if task is not None and open_:
                waits = [digits_of(one.id) for one in open_]
                await connection.execute(
                    self._sql["add_waits"], waits, [digits_of(change.task)] * len(waits), [False] * len(waits)
                )
            return task

        return await self._in_turn(work)

    async def cancel(self, tenant: str | None, task_id: str) -> Task | None:
        async def work(changes: TaskChanges, _: Connection) -> Task | None:
            await changes.lock([task_id])
            task = changes.get(task_id)
            if task is None or tenant not in {None, task.draft.tenant}:
                return None
            return (
                changes.apply(task_id, CancelAsked() if task.status is TaskStatus.PROCESSING else Cancelled()) or task
            )

        cancelled = await self._in_turn(work)
        if cancelled is not None:
            for child in await self._children(task_id):
                await self.cancel(tenant, child)
        return cancelled

    async def _children(self, parent: str) -> Sequence[str]:
        async with self._database.statement() as connection:
            rows = await connection.fetch(self._sql["unfinished_children"], [digits_of(parent)])
        return [id_of(row["id"]) for row in rows]

    async def requeue(self, tenant: str | None, task_id: str) -> Task | None:
        async def work(changes: TaskChanges, _: Connection) -> Task | None:
            await changes.lock([task_id])
            task = changes.get(task_id)
            if task is None or tenant not in {None, task.draft.tenant}:
                return None
            again = changes.apply(task_id, Requeued(changes.now))
            if again is None:
                raise Conflict(f"{task_id} is {task.status.value}; only failed and cancelled tasks can be retried.")
            return again

        return await self._in_turn(work)

    async def called_off(self, held: Sequence[tuple[str, int]]) -> Sequence[str]:
        known = [(task, fence) for task, fence in held if is_task_id(task)]
        async with self._database.statement() as connection:
            columns = keys([task for task, _ in known])
            rows = await connection.fetch(self._sql["called_off"], *columns, [fence for _, fence in known])
        return [id_of(row["id"]) for row in rows]

    async def expire(self, now: datetime, *, limit: int) -> int:
        async def work(changes: TaskChanges, connection: Connection) -> int:
            rows = await connection.fetch(self._sql["past_deadline"], now, limit)
            late = [id_of(row["id"]) for row in rows]
            await changes.lock(late)
            event = Failed(0, FailureReason.DEADLINE, "Its deadline was over before it was started.")
            return sum(changes.apply(one, event) is not None for one in late)

        return await self._in_turn(work)

    async def events(self, tenant: str | None, task_id: str, *, after: int = 0, limit: int) -> Sequence[KeptEvent]:
        if not is_task_id(task_id):
            return ()
        async with self._database.statement() as connection:
            rows = await connection.fetch(
                self._sql["events_of_task"], digits_of(task_id), created_at_of(task_id), after, tenant, limit
            )
        return [event_of(row) for row in rows]

    async def tail(self, *, after: int, limit: int) -> Sequence[KeptEvent]:
        return await self._tail.read(after=after, limit=limit)

    async def versions(self, task_ids: Sequence[str]) -> Mapping[str, int]:
        async with self._database.statement() as connection:
            rows = await connection.fetch(self._sql["task_versions"], *keys(task_ids))
        return {id_of(row["id"]): row["version"] for row in rows}

    async def changed(self) -> AsyncIterator[frozenset[str]]:
        async for payloads in heard(self._database, CHANNEL, look_s=LOOK_S):
            yield frozenset(f"task_{one}" for payload in payloads for one in payload.split(","))

    async def _in_turn(self, work: Callable[[TaskChanges, Connection], Awaitable[T]], begin: Begin | None = None) -> T:
        """A transaction of changes; again where others were in its way, with all that it needs from the start."""
        begin = begin or self._database.transaction
        wanted: Collection[str] = ()
        for _ in range(TRIES - 1):
            try:
                return await self._once(work, begin, wanted)
            except _InTheWay as error:
                wanted = error.wanted
        return await self._once(work, begin, wanted)

    async def _once(
        self, work: Callable[[TaskChanges, Connection], Awaitable[T]], begin: Begin, wanted: Collection[str]
    ) -> T:
        changes: TaskChanges | None = None
        claims = Claims(self._queue)
        try:
            async with begin() as connection:
                changes = TaskChanges(connection, self._database, self._wall(), claims=claims, wanted=wanted)
                done = await work(changes, connection)
                await changes.release_waiters()
                await changes.write()
        except BaseException as error:
            claims.drop()
            if changes is not None and isinstance(error, StoreUnavailable) and isinstance(error.__cause__, IN_THE_WAY):
                raise _InTheWay(error.message, changes.wanted) from error
            raise
        claims.keep()
        return done


class _InTheWay(StoreUnavailable):
    """Another transaction held what this one wanted."""

    def __init__(self, message: str, wanted: Collection[str]) -> None:
        super().__init__(message)
        self.wanted = wanted
