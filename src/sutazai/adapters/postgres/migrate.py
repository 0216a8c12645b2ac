"""
Brings a database to the shape this program needs.

The SQL files in `migrations/` are Alembic's revisions, applied in the order of their numbers, each in one
transaction, under one advisory lock: the first of many gateways does the work and the others find it done. A file
that was once applied never changes again; `schema_migrations` holds the checksums that prove it. That table is older
than Alembic here, and a database that has it alone is taken over as it is.

Alembic is loaded where there is something to apply: it takes 20 MB and 0.3 s, and most starts find all done.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType

from sutazai.adapters.postgres.database import Connection, Database
from sutazai.adapters.postgres.sql_files import STATEMENT_S, Migration, read
from sutazai.core.errors import StoreUnavailable

__all__ = ["Migration", "migrate", "missing", "read"]

LOCK_ID = 0x5357544149
"""The advisory lock of migrations; any number that others do not use."""

TURN_S = 60.0
"""How long to wait while another process migrates."""
LOCK_S = 2.0
"""How long a migration may wait for tables in use: everybody else waits behind it."""


async def migrate(database: Database, migrations: Sequence[Migration]) -> Sequence[Migration]:
    """
    Apply what is missing; what that was.

    Raises `StoreUnavailable` where a file was changed after it was applied, where the database is newer than
    the program, and where a statement failed or took too long. Whatever was applied before then stays.
    """
    applied = []
    while (migration := await _apply_next(database, migrations)) is not None:
        applied.append(migration)
    return applied


async def missing(database: Database, migrations: Sequence[Migration]) -> Sequence[Migration]:
    """What `migrate` would apply; nothing is changed. Raises as it does."""
    async with database.transaction() as connection:
        known = await _applied(connection, database.sql)
    _check(migrations, known)
    return migrations[len(known) :]


async def _apply_next(database: Database, migrations: Sequence[Migration]) -> Migration | None:
    """Apply one file; None when none is missing. The lock ends with the transaction: PgBouncer is fine."""
    async with database.transaction(within_s=TURN_S + 2 * STATEMENT_S) as connection:
        await _take_turn(connection)
        known = await _applied(connection, database.sql)
        _check(migrations, known)
        await _adopt(connection, database.sql, migrations[: len(known)])
        if len(known) == len(migrations):
            return None
        migration = migrations[len(known)]
        await _apply(connection, database.sql, migrations, migration)
    return migration


async def _apply(
    connection: Connection, sql: Mapping[str, str], migrations: Sequence[Migration], migration: Migration
) -> None:
    if migration.version == 1:
        await connection.execute(sql["create_migrations_table"])
    await _alembic().take(connection, migrations, migration)
    await connection.execute(sql["record_migration"], migration.version, migration.name, migration.checksum)


async def _adopt(connection: Connection, sql: Mapping[str, str], known: Sequence[Migration]) -> None:
    """Tell Alembic of what was applied before there was Alembic."""
    if known and await connection.fetchval(sql["alembic_table"]) is None:
        await _alembic().adopt(connection, known)


def _alembic() -> ModuleType:
    return importlib.import_module("sutazai.adapters.postgres.revisions")


async def _take_turn(connection: Connection) -> None:
    await connection.execute(f"SET LOCAL lock_timeout = '{TURN_S:.0f}s'")
    await connection.execute(f"SELECT pg_advisory_xact_lock({LOCK_ID})", timeout=TURN_S)
    await connection.execute(
        f"SET LOCAL lock_timeout = '{LOCK_S:.0f}s'; SET LOCAL statement_timeout = '{STATEMENT_S:.0f}s'"
    )


async def _applied(connection: Connection, sql: Mapping[str, str]) -> Sequence[tuple[int, str, str]]:
    if await connection.fetchval(sql["migrations_table"]) is None:
        return ()
    return [tuple(row) for row in await connection.fetch(sql["applied_migrations"])]


def _check(migrations: Sequence[Migration], known: Sequence[tuple[int, str, str]]) -> None:
    if len(known) > len(migrations):
        raise StoreUnavailable(
            f"The database is at version {len(known)} and this program knows only {len(migrations)}."
            " Start the newer sutazai that wrote it, or restore a backup from before."
        )
    for migration, (version, name, checksum) in zip(migrations, known, strict=False):
        if (migration.version, migration.checksum) != (version, checksum):
            raise StoreUnavailable(
                f"Migration {version} ({name}) was changed after the database had applied it."
                " Install the sutazai that belongs to this database, and put changes into a new file."
            )
