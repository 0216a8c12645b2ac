"""The SQL files that make the tables, in their order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

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


def _parse(entry: Traversable) -> Migration:
    version, _, name = entry.name.removesuffix(".sql").partition("_")
    return Migration(version=int(version), name=name, sql=entry.read_text("utf-8"))
