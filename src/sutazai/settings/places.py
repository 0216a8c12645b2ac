"""
Where a setting was written, so that a mistake can be found: a file with a line, or a name of the environment.

The TOML parser of the standard library keeps no positions. They are read here a second time, line by line.
That is good enough to point at: a wrong line costs a glance, and nothing else depends on it.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

Spot = tuple[str | int, ...]
"""The way to a value: `("nodes", 2, "slots")`."""

_KEY = r"""(?:[A-Za-z0-9_-]+|"[^"\\]*"|'[^']*')"""
_DOTTED = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_LINE = re.compile(rf"\s*(?:(?P<brackets>\[\[?)\s*(?P<table>{_DOTTED})\s*\]|(?P<key>{_DOTTED})\s*=)")
_LONGEST_LINE = 400
"""Longer lines hold data, not keys worth a closer look."""


def dotted(spot: Spot) -> str:
    """The spot as TOML writes it: `nodes[2].slots`, `models."llama3.2:1b".context_buckets`."""
    text = ""
    for part in spot:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            bare = re.fullmatch(r"[A-Za-z0-9_-]{1,60}", part)
            text += ("." if text else "") + (part if bare else json.dumps(part[:60], ensure_ascii=False))
    return text


def lines_of(text: str) -> Mapping[Spot, int]:
    """The line, counted from 1, on which each table and key of a TOML text begins. Never raises."""
    lines: dict[Spot, int] = {}
    repeats: dict[Spot, int] = {}
    table: Spot = ()
    for number, line in enumerate(text.split("\n"), start=1):
        found = _LINE.match(line) if len(line) <= _LONGEST_LINE else None
        if not found:
            continue
        if found["key"]:
            lines.setdefault(table + _keys(found["key"]), number)
            continue
        table = _in_repeated_tables(_keys(found["table"]), repeats)
        if found["brackets"] == "[[":
            array = table[:-1] if isinstance(table[-1], int) else table
            repeats[array] = repeats.get(array, 0) + 1
            table = (*array, repeats[array] - 1)
            lines.setdefault(array, number)
        lines.setdefault(table, number)
    return lines


def _keys(text: str) -> Spot:
    return tuple(key.strip("\"'") for key in re.findall(_KEY, text))


def _in_repeated_tables(keys: Spot, repeats: Mapping[Spot, int]) -> Spot:
    """What `[nodes.extra]` means after a `[[nodes]]`: the newest of them."""
    spot: Spot = ()
    for key in keys:
        spot = (*spot, key)
        if spot in repeats:
            spot = (*spot, repeats[spot] - 1)
    return spot


class Places:
    """Names spots: `sutazai.toml: nodes[2].slots (line 14)`, `environment: SUTAZAI_SERVER_PORT`."""

    def __init__(self, file: str, lines: Mapping[Spot, int], names: Mapping[Spot, str]) -> None:
        self._file = file
        self._lines = lines
        self._names = names
        """Spots that the environment gave, with the name that gave them."""

    def name(self, spot: Spot) -> str:
        """Where the value was written. A spot without a line of its own has that of its table."""
        parents = [spot[:end] for end in range(len(spot), 0, -1)]
        for parent in parents:
            if parent in self._names:
                return f"environment: {self._names[parent]}{dotted(spot[len(parent) :])}"
        line = next((self._lines[parent] for parent in parents if parent in self._lines), None)
        return f"{self._file}: {dotted(spot)}" + (f" (line {line})" if line else "")
