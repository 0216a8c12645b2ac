"""The statements that take long, as PostgreSQL's own extension pg_stat_statements counted them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from sutazai.adapters.postgres.database import Database
from sutazai.core.errors import StoreUnavailable

REMEDY = (
    "Set `shared_preload_libraries = 'pg_stat_statements'` in postgresql.conf, start the server again, and run"
    " `CREATE EXTENSION pg_stat_statements` in this database. The embedded PostgreSQL does not have the extension."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowStatement:
    """One statement, whatever its values."""

    mean_ms: float
    max_ms: float
    total_ms: float
    calls: int
    rows: int
    statement: str


async def slowest(database: Database, *, over_ms: float, limit: int) -> Sequence[SlowStatement]:
    """Those of this database whose mean is over so much, slowest first. Raises `StoreUnavailable`."""
    async with database.transaction() as connection:
        if await connection.fetchval(database.sql["has_statement_counts"]) is None:
            raise StoreUnavailable(f"The database does not count its statements. {REMEDY}")
        try:
            rows = await connection.fetch(database.sql["slow_statements"], over_ms, limit)
        except asyncpg.ObjectNotInPrerequisiteStateError as error:
            raise StoreUnavailable(f"The database has pg_stat_statements, but did not load it. {REMEDY}") from error
    return [SlowStatement(**row) for row in rows]
