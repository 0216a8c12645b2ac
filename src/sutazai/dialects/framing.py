"""
Lines and events out of bytes that arrive in pieces of any size.

Both keep only what is not complete yet, and that bounded: a node that never ends a line fails instead of
filling the memory.
"""

from __future__ import annotations

from typing import Final

MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
"""The largest answer that is kept in memory to be translated, and the largest line of a stream."""


class Untranslatable(ValueError):
    """A node's answer could not be understood; the message says why, without naming the node."""


class Collected:
    """A body that is needed whole."""

    def __init__(self, limit_bytes: int = MAX_REPLY_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._body = bytearray()

    def add(self, data: bytes) -> None:
        """Raises `Untranslatable` past the limit."""
        if len(self._body) + len(data) > self._limit_bytes:
            raise Untranslatable(f"The answer was larger than {self._limit_bytes} bytes; ask for a stream.")
        self._body += data

    def take(self) -> bytes:
        """All of it; nothing is left."""
        body = bytes(self._body)
        self._body.clear()
        return body


class Lines:
    """Bytes into lines, without their ends; a lone carriage return does not end one."""

    def __init__(self, limit_bytes: int = MAX_REPLY_BYTES) -> None:
        self._begun = Collected(limit_bytes)

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes. Raises `Untranslatable` for one past the limit."""
        first, *others = data.split(b"\n")
        self._begun.add(first)
        if not others:
            return []
        lines = [self._begun.take(), *others[:-1]]
        self._begun.add(others[-1])
        return [line.removesuffix(b"\r") for line in lines]

    def rest(self) -> bytes:
        """The line that was never ended, once the bytes have."""
        return self._begun.take().removesuffix(b"\r")


class Events:
    """Bytes into the data of server-sent events (WHATWG HTML, section 9.2.6)."""

    def __init__(self, limit_bytes: int = MAX_REPLY_BYTES) -> None:
        self._lines = Lines(limit_bytes)
        self._limit_bytes = limit_bytes
        self._data: list[bytes] = []
        self._data_bytes = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that `data` completes. Raises `Untranslatable` past the limit."""
        events: list[bytes] = []
        for line in self._lines.feed(data):
            self._take(line, events)
        return events

    def rest(self) -> list[bytes]:
        """The last event, where the bytes ended without the empty line that should follow it."""
        events: list[bytes] = []
        self._take(self._lines.rest(), events)
        self._take(b"", events)
        return events

    def _take(self, line: bytes, events: list[bytes]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
                self._data, self._data_bytes = [], 0
            return
        name, _, value = line.partition(b":")
        # llama.cpp has sent errors as a field of their own; other names, and comments, carry nothing for us.
        if name in {b"data", b"error"}:
            self._data_bytes += len(value)
            if self._data_bytes > self._limit_bytes:
                raise Untranslatable(f"An event was larger than {self._limit_bytes} bytes.")
            self._data.append(value.removeprefix(b" "))
