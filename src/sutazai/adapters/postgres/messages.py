"""Messages of agents in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence

from sutazai.adapters.postgres.database import Database


class PostgresMessageStore:
    """The `MessageStore` of production."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sql = database.sql

    async def send(self, tenant: str, to: str, *, sender: str, body: str) -> int:
        async with self._database.transaction() as connection:
            # One writer of a name at a time: a number that becomes visible late would be passed over by readers.
            await connection.execute(self._sql["lock_message_name"], tenant, to)
            number: int = await connection.fetchval(self._sql["send_message"], tenant, to, sender, body)
        return number

    async def received(self, tenant: str, name: str, *, after: int) -> Sequence[tuple[int, str]]:
        async with self._database.transaction() as connection:
            rows = await connection.fetch(self._sql["received_messages"], tenant, name, after)
        return [(row["number"], row["body"]) for row in rows]
