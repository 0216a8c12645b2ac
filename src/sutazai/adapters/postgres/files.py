"""Files in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence

from sutazai.adapters.postgres.database import Database
from sutazai.core.file import File
from sutazai.core.mark import Mark


class PostgresFileStore:
    """The `FileStore` of production."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sql = database.sql

    async def add(self, file: File, *, at_most: int) -> bool:
        values = (file.id, file.tenant, file.name, file.purpose, file.size_bytes, file.created_at)
        async with self._database.transaction() as connection:
            await connection.execute(self._sql["lock_files_of_tenant"], file.tenant)
            return await connection.fetchval(self._sql["add_file"], *values, at_most) is not None

    async def get(self, tenant: str, file_id: str) -> File | None:
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(self._sql["file"], tenant, file_id)
        return None if row is None else File(**row)

    async def page(
        self, tenant: str, *, purpose: str, after: str, is_oldest_first: bool, limit: int, seen: Mark | None = None
    ) -> Sequence[File]:
        statement = self._sql["files_oldest_first" if is_oldest_first else "files_newest_first"]
        rows = await self._database.rows(statement, tenant, purpose, after, limit, tenant=tenant, seen=seen)
        return [File(**row) for row in rows]

    async def delete(self, tenant: str, file_id: str) -> bool:
        async with self._database.transaction() as connection:
            return await connection.fetchval(self._sql["delete_file"], tenant, file_id) is not None
