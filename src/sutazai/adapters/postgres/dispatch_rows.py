"""Word of tasks as rows of the table `dispatch`, written within somebody's transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from sutazai.adapters.postgres.database import Connection
from sutazai.core.task import digits_of
from sutazai.ports.queue import Message


async def put(
    connection: Connection, sql: Mapping[str, str], messages: Sequence[tuple[Message, datetime]], *, now: datetime
) -> None:
    """Add them, each to be taken from its time on, and wake those who wait for what is due."""
    if not messages:
        return
    await connection.execute(
        sql["put_dispatch"],
        [message.queue for message, _ in messages],
        [digits_of(message.task) if message.task else None for message, _ in messages],
        [message.tenant for message, _ in messages],
        [message.agent for message, _ in messages],
        [message.priority.value for message, _ in messages],
        [available_at for _, available_at in messages],
        now,
    )


async def ripen(connection: Connection, sql: Mapping[str, str], *, now: datetime, limit: int) -> int:
    """Give those whose time has come a turn; how many they were."""
    ripe = await connection.fetch(sql["ripe_dispatch"], now, limit)
    rows = sorted(ripe, key=lambda row: (row["available_at"], row["id"]))  # a DELETE gives them in any order
    if rows:
        await connection.execute(
            sql["put_dispatch"],
            *([row[name] for row in rows] for name in ("queue", "task", "tenant", "agent", "priority", "available_at")),
            now,
        )
    return len(rows)
