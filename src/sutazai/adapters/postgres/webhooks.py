"""Webhooks in PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.ear import heard
from sutazai.adapters.postgres.task_rows import read_in
from sutazai.core.task import TaskStatus, id_of, uuid_of
from sutazai.ports.webhooks import DueWebhook

CHANNEL = "sutazai_webhooks"
LOOK_S = 5.0
"""Between two looks for those that were postponed."""


class PostgresWebhookStore:
    """The `WebhookStore` of production."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sql = database.sql

    async def claim(self, *, limit: int, lease_s: float) -> Sequence[DueWebhook]:
        async with self._database.transaction() as connection:
            rows = await connection.fetch(self._sql["claim_webhooks"], limit, lease_s)
            tasks = {
                task.id: task
                for task in await read_in(connection, self._database, None, [id_of(row["task"]) for row in rows])
            }
            for row in rows:
                if id_of(row["task"]) not in tasks:  # deleted since
                    await connection.execute(self._sql["settle_webhook"], row["task"], row["version"])
        return [
            DueWebhook(
                task=tasks[id_of(row["task"])],
                version=row["version"],
                status=TaskStatus(row["status"]),
                attempt=row["attempts"],
            )
            for row in rows
            if id_of(row["task"]) in tasks
        ]

    async def settle(self, webhook: DueWebhook) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(self._sql["settle_webhook"], uuid_of(webhook.task.id), webhook.version)

    async def postpone(self, webhook: DueWebhook, *, pause_s: float) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(self._sql["postpone_webhook"], uuid_of(webhook.task.id), webhook.version, pause_s)

    async def due(self) -> AsyncIterator[None]:
        async for _ in heard(self._database, CHANNEL, look_s=LOOK_S):
            yield None
