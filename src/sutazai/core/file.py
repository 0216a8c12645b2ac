"""A file that a client keeps here: what is known of it beside its bytes, which are an object."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

_ID = re.compile(r"file-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """It belongs to one tenant and never changes."""

    id: str
    """`file-` and 32 hexadecimal digits: the time in milliseconds, then 80 random bits. Sorts by age."""
    tenant: str
    name: str
    """As the client calls it; never a path here."""
    purpose: str
    """`batch`, or `batch_output` for what a batch wrote."""
    size_bytes: int
    created_at: datetime


def file_id(now_s: float, random_bits: int) -> str:
    """A new id, from Unix seconds and 80 random bits."""
    return f"file-{int(now_s * 1000):012x}{random_bits:020x}"


def is_file_id(text: str) -> bool:
    """Whether it could be one."""
    return _ID.fullmatch(text) is not None
