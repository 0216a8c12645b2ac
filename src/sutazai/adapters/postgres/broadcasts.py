"""The `BroadcastStore` of production: the tables of events and messages, and a row that says how far they were told."""

from __future__ import annotations

import asyncpg
import msgspec

from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.tail import EVENTS, MESSAGES, Tail
from sutazai.core.task import id_of
from sutazai.ports.broadcasts import LEFT_OUT, EventNotice, MessageNotice, Page, Source, Turn

MAX_DATA_BYTES = 64 * 1024
"""Of an event: a result may have many megabytes, which no reader of a stream waits for."""


class PostgresBroadcastStore:
    """The notices of both sources."""

    def __init__(self, database: Database, *, shard: str = "") -> None:
        self.shard = shard
        self._database = database
        self._sql = database.sql
        self._events = Tail(database, EVENTS)
        self._messages = Tail(database, MESSAGES)

    async def notices(self, source: Source, *, after: int, limit: int) -> Page:
        if source is Source.EVENTS:
            rows, newest = await self._events.rows("broadcast_events", after, limit, MAX_DATA_BYTES)
            return Page(notices=[_event(row, self.shard) for row in rows], newest=newest)
        rows, newest = await self._messages.rows("broadcast_messages", after, limit)
        return Page(notices=[_message(row, self.shard) for row in rows], newest=newest)

    async def turn(self, source: Source) -> Turn:
        async with self._database.transaction() as connection:
            return _turn(await connection.fetchrow(self._sql["broadcast"], source))

    async def take(self, source: Source, seen: Turn) -> Turn | None:
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(self._sql["take_broadcast"], source, seen.fence, seen.beat)
        return None if row is None else _turn(row)

    async def advance(self, source: Source, fence: int, position: int) -> bool:
        async with self._database.transaction() as connection:
            beat = await connection.fetchval(self._sql["advance_broadcast"], source, fence, position)
        return beat is not None

    async def leave(self, source: Source, fence: int) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(self._sql["leave_broadcast"], source, fence)


def _turn(row: asyncpg.Record) -> Turn:
    return Turn(position=row["position"], fence=row["fence"], beat=row["beat"])


def _event(row: asyncpg.Record, shard: str) -> EventNotice:
    data = LEFT_OUT if row["data"] is None else msgspec.Raw(row["data"].encode())
    return EventNotice(**{**row, "task": id_of(row["task"]), "data": data, "shard": shard})


def _message(row: asyncpg.Record, shard: str) -> MessageNotice:
    return MessageNotice(
        position=row["position"],
        number=row["number"],
        tenant=row["tenant"],
        to=row["name"],
        sender=row["sender"],
        at=row["at"],
        shard=shard,
        body=msgspec.Raw(row["body"].encode()),
    )
