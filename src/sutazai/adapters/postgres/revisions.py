"""
The SQL files as Alembic's revisions: each file is one, known by its number, and the files are one line.

There is no Python file for a revision, so there is nothing that could say something else than the SQL does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import sqlalchemy
from alembic.runtime.migration import MigrationContext, MigrationStep
from alembic.script import Script, ScriptDirectory
from alembic.script.revision import RevisionMap

from sutazai.adapters.postgres.alchemy import run_script, within
from sutazai.adapters.postgres.database import Connection
from sutazai.adapters.postgres.sql_files import STATEMENT_S, Migration


async def take(connection: Connection, migrations: Sequence[Migration], migration: Migration) -> None:
    """Apply one of them, and remember it as where the database is."""
    await within(connection, lambda view: SqlScripts(migrations).take(view, migration))


async def adopt(connection: Connection, known: Sequence[Migration]) -> None:
    """Remember the last as where the database is, without applying anything."""
    await within(connection, lambda view: SqlScripts(known).adopt(view, known[-1]))


class SqlScripts(ScriptDirectory):
    """Alembic's folder of revisions, made of SQL files."""

    def __init__(self, migrations: Sequence[Migration]) -> None:
        super().__init__(str(Path(__file__).parent))  # it wants a folder, and reads nothing there
        self.revision_map = RevisionMap(lambda: _line(self, migrations))

    def take(self, view: sqlalchemy.Connection, migration: Migration) -> None:
        """Apply one, and remember it as where the database is."""
        script = self.get_revision(migration.revision)
        step = MigrationStep.upgrade_from_script(self.revision_map, script)
        MigrationContext.configure(view, opts={"fn": lambda *_: [step], "script": self}).run_migrations(view=view)

    def adopt(self, view: sqlalchemy.Connection, migration: Migration) -> None:
        """Remember one as where the database is, without applying anything."""
        MigrationContext.configure(view).stamp(self, migration.revision)


def _line(scripts: ScriptDirectory, migrations: Sequence[Migration]) -> Iterator[Script]:
    before = None
    for migration in migrations:
        module = _Revision(migration, before)
        yield Script(module, migration.revision, scripts.dir)
        before = migration.revision


class _Revision(ModuleType):
    """What Alembic expects a revision's Python file to hold."""

    def __init__(self, migration: Migration, before: str | None) -> None:
        super().__init__(migration.name, migration.sql)
        self.down_revision = before
        self._sql = migration.sql

    def upgrade(self, *, view: sqlalchemy.Connection) -> None:
        run_script(view, self._sql, within_s=STATEMENT_S)
