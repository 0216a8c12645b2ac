"""The `RefillStore` of production."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from sutazai.adapters.postgres.database import Database
from sutazai.core.task import id_of
from sutazai.ports.refill import UnderWay


class PostgresRefillStore:
    """Tasks, workers, and word of tasks in the table `dispatch`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sql = database.sql

    async def beat(self, worker: str) -> None:
        async with self._database.statement() as connection:
            await connection.execute(self._sql["beat_worker"], worker)

    async def beats(self) -> Mapping[str, int]:
        async with self._database.statement() as connection:
            rows = await connection.fetch(self._sql["worker_beats"])
        return {row["name"]: row["beat"] for row in rows}

    async def forget(self, workers: Mapping[str, int]) -> None:
        async with self._database.statement() as connection:
            await connection.execute(self._sql["forget_workers"], list(workers), list(workers.values()))

    async def under_way(self, workers: Sequence[str], *, limit: int) -> Sequence[UnderWay]:
        async with self._database.statement() as connection:
            rows = await connection.fetch(self._sql["tasks_under_way"], workers, limit)
        return [UnderWay(task=id_of(row["id"]), fence=row["deliveries"], queue=row["queue"]) for row in rows]

    async def without_word(self, queue: str, *, since: datetime, limit: int) -> int:
        async with self._database.statement() as connection:
            count: int = await connection.fetchval(self._sql["count_without_word"], queue, since, limit)
        return count

    async def refill(self, queue: str, *, since: datetime, limit: int) -> int:
        async with self._database.transaction() as connection:
            if not await connection.fetchval(self._sql["lock_refill"], queue):
                return 0
            count: int = await connection.fetchval(self._sql["refill_dispatch"], queue, since, limit)
        return count
