"""Schedules in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import asyncpg
import msgspec

from sutazai.adapters.postgres.database import Database
from sutazai.core.mark import Mark
from sutazai.core.schedule import PREFIX, Schedule, schedule_uuid
from sutazai.core.task import TaskDraft

_draft = msgspec.json.Decoder(TaskDraft)


class PostgresScheduleStore:
    """The `ScheduleStore` of production."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sql = database.sql

    async def add(self, schedule: Schedule, *, at_most: int) -> bool:
        async with self._database.transaction() as connection:
            await connection.execute(self._sql["lock_schedules_of"], schedule.tenant)
            if await connection.fetchval(self._sql["count_schedules"], schedule.tenant) >= at_most:
                return False
            await connection.execute(
                self._sql["add_schedule"],
                schedule_uuid(schedule.id),
                schedule.tenant,
                schedule.cron,
                schedule.timezone,
                msgspec.json.encode(schedule.draft).decode(),
                schedule.created_at,
                schedule.due_at,
            )
        return True

    async def replace(self, schedule: Schedule) -> bool:
        async with self._database.transaction() as connection:
            found = await connection.fetchval(
                self._sql["replace_schedule"],
                schedule_uuid(schedule.id),
                schedule.tenant,
                schedule.cron,
                schedule.timezone,
                msgspec.json.encode(schedule.draft).decode(),
                schedule.due_at,
            )
        return found is not None

    async def get(self, tenant: str, schedule_id: str) -> Schedule | None:
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(self._sql["schedule"], tenant, schedule_uuid(schedule_id))
        return None if row is None else _schedule(row)

    async def page(self, tenant: str, *, after: str = "", limit: int, seen: Mark | None = None) -> Sequence[Schedule]:
        values = (tenant, schedule_uuid(after), limit)
        rows = await self._database.rows(self._sql["schedules_page"], *values, tenant=tenant, seen=seen)
        return list(map(_schedule, rows))

    async def delete(self, tenant: str, schedule_id: str) -> bool:
        async with self._database.transaction() as connection:
            found = await connection.fetchval(self._sql["delete_schedule"], tenant, schedule_uuid(schedule_id))
        return found is not None

    async def due(self, *, limit: int) -> tuple[datetime, Sequence[Schedule]]:
        async with self._database.transaction() as connection:
            now: datetime = await connection.fetchval("SELECT clock_timestamp()")
            rows = await connection.fetch(self._sql["due_schedules"], now, limit)
        return now, list(map(_schedule, rows))

    async def next_in_s(self) -> float | None:
        async with self._database.transaction() as connection:
            seconds: float | None = await connection.fetchval(self._sql["next_schedule_in_s"])
        return seconds

    async def advance(
        self, schedule: Schedule, *, due_at: datetime, last_due_at: datetime, last_task: str, last_error: str
    ) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(
                self._sql["advance_schedule"],
                schedule_uuid(schedule.id),
                schedule.due_at,
                due_at,
                last_due_at,
                last_task,
                last_error,
            )


def _schedule(row: asyncpg.Record) -> Schedule:
    return Schedule(**{**row, "id": f"{PREFIX}{row['id'].hex}", "draft": _draft.decode(row["draft"])})
