"""Tasks over several shards: the slot of the tenant is in the id of each task, so that an id alone finds its shard."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from itertools import chain, islice
from typing import TypeVar

from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.sharded.merged import merged
from sutazai.adapters.postgres.sharded.shards import ANY, Shards
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.core.mark import Mark
from sutazai.core.task import Task, TaskDraft, slot_in
from sutazai.policy.sharding import slot_of
from sutazai.policy.tasks import check_draft
from sutazai.ports.task_events import KeptEvent
from sutazai.ports.tasks import Change, Refused, Start, TaskFilter

T = TypeVar("T")

POSITION_BITS = 48
"""Of one shard, in a position of all."""


class ShardedTaskStore:
    """
    The `TaskStore` over shards.

    A call that is about tasks of several shards is one transaction in each of them: where one fails, it has happened
    in the others. Such calls are those of workers and of the gateway's own, not those of one client.
    """

    def __init__(
        self, shards: Shards, *, max_length: int, wall: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._shards = shards
        self._tails = [
            PostgresTaskStore(database, max_length=max_length, wall=wall) for database in shards.databases.values()
        ]

    def _in(self, database: Database) -> PostgresTaskStore:
        """The store in a shard; what a store knows beside its database is the same for all."""
        return self._tails[0].on(database)

    async def submit(self, drafts: Sequence[TaskDraft]) -> Sequence[Task]:
        for draft in drafts:
            check_draft(draft)
            self._shards.check_home(draft.tenant)
        return _aligned(
            await self._shards.spread(
                [slot_of(draft.tenant) for draft in drafts],
                lambda at, places: self._in(at).submit([drafts[place] for place in places]),
            )
        )

    async def of_key(self, tenant: str, key: str) -> Task | None:
        return await self._shards.of_tenant(tenant, lambda at: self._in(at).of_key(tenant, key))

    async def waiting(self, tenant: str, *, at_most: int) -> int:
        return await self._shards.of_tenant(tenant, lambda at: self._in(at).waiting(tenant, at_most=at_most))

    async def get(self, tenant: str, task_id: str, *, seen: Mark | None = None) -> Task | None:
        return await self._shards.of_tenant(tenant, lambda at: self._in(at).get(tenant, task_id, seen=seen))

    async def several(self, tenant: str, task_ids: Sequence[str]) -> Sequence[Task]:
        return await self._shards.of_tenant(tenant, lambda at: self._in(at).several(tenant, task_ids))

    async def page(
        self, tenant: str | None, which: TaskFilter, *, before: str = "", limit: int, seen: Mark | None = None
    ) -> Sequence[Task]:
        if tenant is not None:
            return await self._shards.of_tenant(
                tenant, lambda at: self._in(at).page(tenant, which, before=before, limit=limit, seen=seen)
            )
        pages = [
            await self._in(database.of(ANY)).page(None, which, before=before, limit=limit)
            for database in self._shards.databases.values()
        ]
        newest_first = heapq.merge(*pages, key=lambda task: task.id, reverse=True)
        return list(islice(newest_first, limit))

    async def begin(self, starts: Sequence[Start], *, worker: str, delivery_limit: int) -> Sequence[Task | Refused]:
        return _aligned(
            await self._shards.spread(
                [slot_in(start.task) for start in starts],
                lambda at, places: self._in(at).begin(
                    [starts[place] for place in places], worker=worker, delivery_limit=delivery_limit
                ),
            )
        )

    async def change(self, changes: Sequence[Change]) -> Sequence[Task | None]:
        return _aligned(
            await self._shards.spread(
                [slot_in(change.task) for change in changes],
                lambda at, places: self._in(at).change([changes[place] for place in places]),
            )
        )

    async def suspend(self, change: Change, waits_for: Sequence[str]) -> Task | None:
        slot = slot_in(change.task)
        # Those of another slot are of another tenant, for whom nobody waits.
        own = [task_id for task_id in waits_for if slot_in(task_id) == slot]
        return await self._shards.of_slot(slot, lambda at: self._in(at).suspend(change, own))

    async def cancel(self, tenant: str | None, task_id: str) -> Task | None:
        return await self._of_task(tenant, task_id, lambda store: store.cancel(tenant, task_id))

    async def requeue(self, tenant: str | None, task_id: str) -> Task | None:
        return await self._of_task(tenant, task_id, lambda store: store.requeue(tenant, task_id))

    async def called_off(self, held: Sequence[tuple[str, int]]) -> Sequence[str]:
        found = await self._shards.spread(
            [slot_in(task_id) for task_id, _ in held],
            lambda at, places: self._in(at).called_off([held[place] for place in places]),
        )
        return list(chain.from_iterable(called_off for _, called_off in found))

    async def expire(self, now: datetime, *, limit: int) -> int:
        return sum(await self._shards.in_each(lambda at: self._in(at).expire(now, limit=limit)))

    async def events(self, tenant: str | None, task_id: str, *, after: int = 0, limit: int) -> Sequence[KeptEvent]:
        return await self._of_task(
            tenant, task_id, lambda store: store.events(tenant, task_id, after=after, limit=limit)
        )

    async def tail(self, *, after: int, limit: int) -> Sequence[KeptEvent]:
        """
        As the port says, but for tasks that were moved: their events come again, with new positions.

        A position is those of all shards one above the other, so it is good for as long as the shards are the same.
        """
        positions = [after >> POSITION_BITS * place & (1 << POSITION_BITS) - 1 for place in range(len(self._tails))]
        pages = [await tail.tail(after=positions[place], limit=limit) for place, tail in enumerate(self._tails)]
        marked = [[(kept.at, place, kept) for kept in page] for place, page in enumerate(pages)]
        found: list[KeptEvent] = []
        for _, place, kept in islice(heapq.merge(*marked, key=lambda one: one[:2]), limit):
            positions[place] = kept.position
            position = sum(one << POSITION_BITS * other for other, one in enumerate(positions))
            found.append(replace(kept, position=position))
        return found

    async def versions(self, task_ids: Sequence[str]) -> Mapping[str, int]:
        found = await self._shards.spread(
            [slot_in(task_id) for task_id in task_ids],
            lambda at, places: self._in(at).versions([task_ids[place] for place in places]),
        )
        return {task_id: version for _, versions in found for task_id, version in versions.items()}

    async def changed(self) -> AsyncIterator[frozenset[str]]:
        async with aclosing(merged([tail.changed() for tail in self._tails])) as news:
            async for changed in news:
                yield changed

    async def _of_task(self, tenant: str | None, task_id: str, work: Callable[[PostgresTaskStore], Awaitable[T]]) -> T:
        if tenant is not None:
            self._shards.check_home(tenant)
        return await self._shards.of_slot(slot_in(task_id), lambda at: work(self._in(at)))


def _aligned(groups: Sequence[tuple[Sequence[int], Sequence[T]]]) -> Sequence[T]:
    """What came back for each place, in their order."""
    found = {place: one for places, given in groups for place, one in zip(places, given, strict=True)}
    return [found[place] for place in sorted(found)]
