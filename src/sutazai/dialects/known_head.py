"""
Heads that were parsed before.

A client, and a node, says much the same head again on each request of a connection. Once llhttp has parsed one and
found nothing wrong, the same bytes need no parsing: only the value of `Content-Length` may differ, and it must be
digits. Whatever is not recognised goes to llhttp, so this can be wrong only where it says yes.
"""

from __future__ import annotations

MAX_HEAD_BYTES = 4096
MAX_DIGITS = 9
_FIELD = b"\r\ncontent-length:"
_END = b"\r\n\r\n"


class KnownHead:
    """The bytes of one head, around the value of its `Content-Length`."""

    __slots__ = ("_prefix", "_suffix")

    def __init__(self, prefix: bytes, suffix: bytes) -> None:
        self._prefix = prefix
        self._suffix = suffix

    @classmethod
    def of(cls, data: bytes) -> KnownHead | None:
        """What to remember of a message that llhttp took without complaint; None where it is not worth it."""
        end = data.find(_END, 0, MAX_HEAD_BYTES)
        head = data[: end + len(_END)].lower()
        at = head.find(_FIELD)
        if end < 0 or at < 0 or head.find(_FIELD, at + 1) >= 0 or b"\r\ntransfer-encoding:" in head:
            return None
        start = at + len(_FIELD)
        while head[start : start + 1] == b" ":
            start += 1
        stop = head.find(b"\r", start)
        if not head[start:stop].isdigit():
            return None
        return cls(data[:start], data[stop : len(head)])

    def body_of(self, data: bytes) -> tuple[int, int] | None:
        """Where the body begins in `data`, and how many bytes it has; None where the head is another."""
        prefix = self._prefix
        if not data.startswith(prefix):
            return None
        start = len(prefix)
        stop = data.find(b"\r", start, start + MAX_DIGITS + 1)
        digits = data[start:stop]
        if stop < 0 or not digits.isdigit() or not data.startswith(self._suffix, stop):
            return None
        return stop + len(self._suffix), int(digits)
