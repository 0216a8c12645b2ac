"""A mark tells how far a store had come when something was written. Whoever shows it is told nothing older."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sutazai.core.errors import BadRequest

WRITTEN = "x-sutazai-written"
"""The header that carries it."""
_FORM = re.compile(r"([0-9a-f]{1,8})-([0-9a-f]{1,16})")
MAX_POSITION = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Mark:
    """Clients carry it from one gateway to another and need not understand it."""

    source: int = 0
    """Which store: a mark of another one says nothing."""
    position: int = 0
    """Grows with everything that is written there."""

    def __str__(self) -> str:
        return f"{self.source:x}-{self.position:x}"


BEGINNING = Mark()
"""Before anything was written: the mark of those who bring none."""


def mark_of(text: str) -> Mark:
    """The mark in a text. Raises `BadRequest` for what is none."""
    parts = _FORM.fullmatch(text)
    if parts is None or int(parts[2], 16) > MAX_POSITION:
        raise BadRequest(
            f"The header `{WRITTEN}` was no mark. Send what the answer to your write had under this name, or "
            "leave it out."
        )
    return Mark(int(parts[1], 16), int(parts[2], 16))
