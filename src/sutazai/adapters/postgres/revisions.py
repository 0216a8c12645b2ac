"""
The SQL files as Alembic's revisions: each file is one, known by its number, and the files are one line.

There is no Python file for a revision, so there is nothing that could say something else than the SQL does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import ModuleType

import sqlalchemy
from alembic.runtime.migration import MigrationContext, MigrationStep
from alembic.script import Script, ScriptDirectory
from alembic.script.revision import RevisionMap

from sutazai.adapters.postgres.alchemy import run_script

STATEMENT_S = 60.0
"""For one file."""


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

    @property
    def revision(self) -> str:
        """What Alembic calls it."""
        return f"{self.version:04}"


def read(folder: Traversable | None = None) -> Sequence[Migration]:
    """The files of this program, or of `folder`, in order. Raises `ValueError` for a gap or a double."""
    folder = folder or files(__package__) / "migrations"
    found = [_parse(entry) for entry in folder.iterdir() if entry.name.endswith(".sql")]
    found.sort(key=lambda migration: migration.version)
    if [migration.version for migration in found] != list(range(1, len(found) + 1)):
        raise ValueError("Migrations were not numbered 1, 2, 3 and on. Rename the files.")
    return found


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


def _parse(entry: Traversable) -> Migration:
    version, _, name = entry.name.removesuffix(".sql").partition("_")
    return Migration(version=int(version), name=name, sql=entry.read_text("utf-8"))
