"""Reads `statements*.sql`: SQL is kept as SQL, under names, where it can be read and run by hand."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

MARK = "-- name: "
FILES = (
    "statements.sql",
    "statements_sessions.sql",
    "statements_tasks.sql",
    "statements_webhooks.sql",
    "statements_schedules.sql",
    "statements_files.sql",
    "statements_upkeep.sql",
    "statements_shards.sql",
)


def parse(text: str) -> Mapping[str, str]:
    """Statements by name. What stands before the first name is a comment to the file."""
    found = {}
    for block in text.split(f"\n{MARK}")[1:]:
        name, _, statement = block.partition("\n")
        found[name.strip()] = statement.strip()
    return found


def load() -> Mapping[str, str]:
    """The statements of this package."""
    found: dict[str, str] = {}
    for name in FILES:
        found.update(parse(files(__package__).joinpath(name).read_text("utf-8")))
    return found
