"""
The audit log in PostgreSQL.

Numbers, times and seals are made by a trigger of the table, and a second one refuses every change of what is there.
Who owns the table could still take the triggers off; `verify` computes every seal anew, and so finds what was done
meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import asyncpg
import msgspec

from sutazai.adapters.postgres.database import Connection, Database
from sutazai.ports.audit import GENESIS, Actor, AuditEntry, Deed, Verified, fault_of

BATCH = 1000
"""Entries of one look: a few milliseconds."""


class PostgresAuditLog:
    """The `AuditLog` of production."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sql = database.sql

    async def add(self, deed: Deed, by: Actor) -> None:
        """Write one down. Raises `StoreUnavailable`, also where nobody can tell whether it was written."""
        async with self._database.transaction() as connection:
            await record(connection, self._sql, deed, by)

    async def newest(self, *, limit: int, before: int | None = None) -> Sequence[AuditEntry]:
        """So many entries, newest first."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(self._sql["newest_audit"], before, limit)
        return [_entry(row) for row in rows]

    async def verify(self) -> Verified:
        """Look at every entry, a batch at a time; those written meanwhile are looked at too."""
        good, head = 0, GENESIS
        while True:
            async with self._database.transaction() as connection:
                rows = await connection.fetch(self._sql["audit_from"], good, BATCH)
            for entry in map(_entry, rows):
                if fault := fault_of(entry, good + 1, head):
                    return Verified(entries=good, head=head, fault=fault)
                good, head = entry.number, entry.digest
            if len(rows) < BATCH:
                return Verified(entries=good, head=head)


async def record(connection: Connection, sql: Mapping[str, str], deed: Deed, by: Actor) -> None:
    """Write an entry within the transaction of the action, so that there are both or neither."""
    detail = msgspec.json.encode(storable(deed.detail)).decode()
    await connection.execute(
        sql["add_audit"],
        storable(by.id),
        deed.action.value,
        storable(deed.subject),
        detail,
        by.request_id,
        deed.outcome.value,
    )


def storable(value: object) -> object:
    """The value with no character that PostgreSQL refuses: names come from clients, and no name may end the log."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\0", "?")
    if isinstance(value, Mapping):
        return {storable(key): storable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [storable(inner) for inner in value]
    return value


def _entry(row: asyncpg.Record) -> AuditEntry:
    return AuditEntry(**row)
