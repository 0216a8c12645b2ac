"""Files, messages, sessions, schedules and webhooks over several shards: each call goes where its tenant's data is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import datetime
from heapq import merge
from itertools import islice

from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.files import PostgresFileStore
from sutazai.adapters.postgres.messages import PostgresMessageStore
from sutazai.adapters.postgres.schedules import PostgresScheduleStore
from sutazai.adapters.postgres.sessions import PostgresSessionStore
from sutazai.adapters.postgres.sharded.merged import merged
from sutazai.adapters.postgres.sharded.shards import Shards
from sutazai.adapters.postgres.webhooks import PostgresWebhookStore
from sutazai.core.errors import StoreUnavailable
from sutazai.core.file import File
from sutazai.core.mark import Mark
from sutazai.core.schedule import Schedule
from sutazai.core.session import Message, Session
from sutazai.core.task import slot_in
from sutazai.policy.sharding import slot_of
from sutazai.ports.webhooks import DueWebhook


class ShardedMarks:
    """The `Marks` over shards; a mark of one says nothing in another, whose readers then go to its primary."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def note(self, tenant: str) -> None:
        with suppress(StoreUnavailable):
            self._database(tenant).note(tenant)

    async def newest(self, tenant: str) -> Mark | None:
        with suppress(StoreUnavailable):
            return await self._database(tenant).newest(tenant)
        return None

    def _database(self, tenant: str) -> Database:
        return self._shards.databases[self._shards.owner(slot_of(tenant))]


class ShardedFileStore:
    """The `FileStore` over shards."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    async def add(self, file: File, *, at_most: int) -> bool:
        return await self._shards.of_tenant(file.tenant, lambda at: PostgresFileStore(at).add(file, at_most=at_most))

    async def get(self, tenant: str, file_id: str) -> File | None:
        return await self._shards.of_tenant(tenant, lambda at: PostgresFileStore(at).get(tenant, file_id))

    async def page(
        self, tenant: str, *, purpose: str, after: str, is_oldest_first: bool, limit: int, seen: Mark | None = None
    ) -> Sequence[File]:
        return await self._shards.of_tenant(
            tenant,
            lambda at: PostgresFileStore(at).page(
                tenant, purpose=purpose, after=after, is_oldest_first=is_oldest_first, limit=limit, seen=seen
            ),
        )

    async def delete(self, tenant: str, file_id: str) -> bool:
        return await self._shards.of_tenant(tenant, lambda at: PostgresFileStore(at).delete(tenant, file_id))


class ShardedMessageStore:
    """The `MessageStore` over shards."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    async def send(self, tenant: str, to: str, *, sender: str, body: str) -> int:
        return await self._shards.of_tenant(
            tenant, lambda at: PostgresMessageStore(at).send(tenant, to, sender=sender, body=body)
        )

    async def received(self, tenant: str, name: str, *, after: int) -> Sequence[tuple[int, str]]:
        return await self._shards.of_tenant(
            tenant, lambda at: PostgresMessageStore(at).received(tenant, name, after=after)
        )


class ShardedSessionStore:
    """The `SessionStore` over shards."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    async def create(self, session: Session, *, at_most: int) -> bool:
        return await self._shards.of_tenant(
            session.tenant, lambda at: PostgresSessionStore(at).create(session, at_most=at_most)
        )

    async def get(self, tenant: str, session_id: str) -> Session | None:
        return await self._shards.of_tenant(tenant, lambda at: PostgresSessionStore(at).get(tenant, session_id))

    async def page(
        self, tenant: str, *, now: datetime, before: str, limit: int, seen: Mark | None = None
    ) -> Sequence[Session]:
        return await self._shards.of_tenant(
            tenant, lambda at: PostgresSessionStore(at).page(tenant, now=now, before=before, limit=limit, seen=seen)
        )

    async def history(self, session: Session) -> Sequence[Message]:
        return await self._shards.of_tenant(session.tenant, lambda at: PostgresSessionStore(at).history(session))

    async def append(self, session: Session, kept: Sequence[Message], news: Sequence[Message]) -> None:
        await self._shards.of_tenant(session.tenant, lambda at: PostgresSessionStore(at).append(session, kept, news))

    async def delete(self, tenant: str, session_id: str) -> bool:
        return await self._shards.of_tenant(tenant, lambda at: PostgresSessionStore(at).delete(tenant, session_id))

    async def sweep(self, now: datetime, *, limit: int) -> int:
        return sum(await self._shards.in_each(lambda at: PostgresSessionStore(at).sweep(now, limit=limit)))


class ShardedScheduleStore:
    """The `ScheduleStore` over shards."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    async def add(self, schedule: Schedule, *, at_most: int) -> bool:
        return await self._shards.of_tenant(
            schedule.tenant, lambda at: PostgresScheduleStore(at).add(schedule, at_most=at_most)
        )

    async def replace(self, schedule: Schedule) -> bool:
        return await self._shards.of_tenant(schedule.tenant, lambda at: PostgresScheduleStore(at).replace(schedule))

    async def get(self, tenant: str, schedule_id: str) -> Schedule | None:
        return await self._shards.of_tenant(tenant, lambda at: PostgresScheduleStore(at).get(tenant, schedule_id))

    async def page(self, tenant: str, *, after: str = "", limit: int, seen: Mark | None = None) -> Sequence[Schedule]:
        return await self._shards.of_tenant(
            tenant, lambda at: PostgresScheduleStore(at).page(tenant, after=after, limit=limit, seen=seen)
        )

    async def delete(self, tenant: str, schedule_id: str) -> bool:
        return await self._shards.of_tenant(tenant, lambda at: PostgresScheduleStore(at).delete(tenant, schedule_id))

    async def due(self, *, limit: int) -> tuple[datetime, Sequence[Schedule]]:
        """The time is that of the shard whose clock is the latest; what is due is due by its own shard's clock."""
        found = await self._shards.in_each(lambda at: PostgresScheduleStore(at).due(limit=limit))
        ordered = merge(*(schedules for _, schedules in found), key=lambda schedule: schedule.due_at)
        return max(now for now, _ in found), list(islice(ordered, limit))

    async def next_in_s(self) -> float | None:
        found = await self._shards.in_each(lambda at: PostgresScheduleStore(at).next_in_s())
        return min((seconds for seconds in found if seconds is not None), default=None)

    async def advance(
        self, schedule: Schedule, *, due_at: datetime, last_due_at: datetime, last_task: str, last_error: str
    ) -> None:
        await self._shards.of_slot(  # a tenant that is not at home any more must not be due for ever
            slot_of(schedule.tenant),
            lambda at: PostgresScheduleStore(at).advance(
                schedule, due_at=due_at, last_due_at=last_due_at, last_task=last_task, last_error=last_error
            ),
        )


class ShardedWebhookStore:
    """The `WebhookStore` over shards."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    async def claim(self, *, limit: int, lease_s: float) -> Sequence[DueWebhook]:
        found: list[DueWebhook] = []

        async def claim(at: Database) -> None:
            if left := limit - len(found):
                found.extend(await PostgresWebhookStore(at).claim(limit=left, lease_s=lease_s))

        await self._shards.in_each(claim)
        return found

    async def settle(self, webhook: DueWebhook) -> None:
        await self._shards.of_slot(slot_in(webhook.task.id), lambda at: PostgresWebhookStore(at).settle(webhook))

    async def postpone(self, webhook: DueWebhook, *, pause_s: float) -> None:
        await self._shards.of_slot(
            slot_in(webhook.task.id), lambda at: PostgresWebhookStore(at).postpone(webhook, pause_s=pause_s)
        )

    async def due(self) -> AsyncIterator[None]:
        async for _ in merged([PostgresWebhookStore(at).due() for at in self._shards.databases.values()]):
            yield None
