"""What a fake server keeps of each request that it has read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(slots=True, kw_only=True, eq=False)
class Received:
    """One request, and what became of it."""

    method: str
    path: str
    """Without the query."""
    query: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    at: float
    """Monotonic seconds of the event loop, when its last byte was read."""
    connection: int
    """Which connection it came on, counted from 1 since the node began."""
    is_inference: bool
    """It asks a model for something, so it takes a slot and follows the script."""
    keep_alive: bool
    """The client would use the connection again."""
    status: int = 0
    """Of the answer; 0 before its head was sent."""
    tokens_sent: int = 0
    finished: bool = False
    """The whole answer was sent."""
    aborted: bool = False
    """The client went away before that."""

    @property
    def json(self) -> Any:
        """The body, decoded. Raises `msgspec.DecodeError`."""
        return msgspec.json.decode(self.body)
