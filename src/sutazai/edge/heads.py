"""Heads of answers, mostly made in advance."""

from __future__ import annotations

import http
import time
from email.utils import formatdate

PHRASES = {status.value: status.phrase for status in http.HTTPStatus} | {499: "Client Closed Request"}


def header_pairs(lines: bytes) -> list[tuple[bytes, bytes]]:
    """Header lines, each with its line end, as names and values."""
    found = (line.partition(b": ") for line in lines.splitlines())
    return [(name, value) for name, _, value in found]


class Heads:
    """Status line and constant headers, rebuilt when the second changes."""

    __slots__ = ("_prefixes", "_second")

    def __init__(self) -> None:
        self._prefixes: dict[int, bytes] = {}
        self._second = 0

    def prefix(self, status: int) -> bytes:
        """Status line, `date`, `server`."""
        prefix = self._prefixes.get(status)
        if prefix is None:
            line = f"HTTP/1.1 {status} {PHRASES.get(status, 'Unknown')}\r\n"
            prefix = self._prefixes[status] = f"{line}date: {formatdate(usegmt=True)}\r\nserver: sutazai\r\n".encode()
        return prefix

    def tick(self) -> None:
        """Called every quarter of a second: the date moved on."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._prefixes.clear()
