"""
Brings a database to the shape this program needs.

Files in `migrations/` are applied in the order of their numbers, each in one transaction, under one advisory
lock: the first of many gateways does the work and the others find it done. A file that was once applied never
changes again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from sutazai.adapters.postgres.database import Connection, Database
from sutazai.core.errors import StoreUnavailable

LOCK_ID = 0x5357544149
"""The advisory lock of migrations; any number that others do not use."""

TURN_S = 60.0
"""How long to wait while another process migrates."""
LOCK_S = 2.0
"""How long a migration may wait for tables in use: everybody else waits behind it."""
STATEMENT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One file."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the file, as hexadecimal digits."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def read(folder: Traversable | None = None) -> Sequence[Migration]:
    """The files of this program, or of `folder`, in order. Raises `ValueError` for a gap or a double."""
    folder = folder or files(__package__) / "migrations"
    found = [_parse(entry) for entry in folder.iterdir() if entry.name.endswith(".sql")]
    found.sort(key=lambda migration: migration.version)
    if [migration.version for migration in found] != list(range(1, len(found) + 1)):
        raise ValueError("Migrations were not numbered 1, 2, 3 and on. Rename the files.")
    return found


async def migrate(database: Database, migrations: Sequence[Migration]) -> int:
    """
    Apply what is missing; how many that were.

    Raises `StoreUnavailable` where a file was changed after it was applied, where the database is newer than
    the program, and where a statement failed or took too long. Whatever was applied before then stays.
    """
    applied = 0
    while await _apply_next(database, migrations):
        applied += 1
    return applied


async def _apply_next(database: Database, migrations: Sequence[Migration]) -> bool:
    """Apply one file; False when none is missing. The lock ends with the transaction: PgBouncer is fine."""
    async with database.transaction(within_s=TURN_S + 2 * STATEMENT_S) as connection:
        await _take_turn(connection)
        known = await _applied(connection, database.sql)
        _check(migrations, known)
        if len(known) == len(migrations):
            return False
        migration = migrations[len(known)]
        await connection.execute(migration.sql, timeout=STATEMENT_S)
        await connection.execute(
            database.sql["record_migration"], migration.version, migration.name, migration.checksum
        )
    return True


async def _take_turn(connection: Connection) -> None:
    await connection.execute(f"SET LOCAL lock_timeout = '{TURN_S:.0f}s'")
    await connection.execute(f"SELECT pg_advisory_xact_lock({LOCK_ID})", timeout=TURN_S)
    await connection.execute(
        f"SET LOCAL lock_timeout = '{LOCK_S:.0f}s'; SET LOCAL statement_timeout = '{STATEMENT_S:.0f}s'"
    )


async def _applied(connection: Connection, sql: Mapping[str, str]) -> Sequence[tuple[int, str, str]]:
    # Asked first, because `IF NOT EXISTS` needs the right to create even where the table is there.
    if await connection.fetchval(sql["migrations_table"]) is None:
        await connection.execute(sql["create_migrations_table"])
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


def _parse(entry: Traversable) -> Migration:
    version, _, name = entry.name.removesuffix(".sql").partition("_")
    return Migration(version=int(version), name=name, sql=entry.read_text("utf-8"))
