"""Reads `statements*.sql`: SQL is kept as SQL, under names, where it can be read and run by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files

MARK = re.compile(r"^-- (name|part): (.*)\n", re.MULTILINE)
PART_HERE = re.compile(r"^-- part (.*)$", re.MULTILINE)
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
    _, *blocks = MARK.split(text)
    named = list(zip(blocks[::3], blocks[1::3], map(str.strip, blocks[2::3]), strict=True))
    parts = {name: body for kind, name, body in named if kind == "part"}
    return {name: PART_HERE.sub(lambda line: parts[line[1]], body) for kind, name, body in named if kind == "name"}


def load() -> Mapping[str, str]:
    """The statements of this package."""
    found: dict[str, str] = {}
    for name in FILES:
        found.update(parse(files(__package__).joinpath(name).read_text("utf-8")))
    return found
