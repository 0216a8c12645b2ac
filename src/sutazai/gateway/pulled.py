"""
An answer that is waited for: the bridge from pushed replies to a coroutine.

For whoever asks from within a task of its own (a turn of a session), where the fast lane's way, calls and no task,
does not fit. What comes faster than it is taken is kept up to a bound; past it the node is read no more.
"""

from __future__ import annotations

import asyncio
from collections import deque

from sutazai.core.errors import SutazaiError
from sutazai.core.request import Head, Request, Usage
from sutazai.ports.inference import Call, Inference

MOST_BUFFERED_BYTES = 256 * 1024


class Pulled:
    """
    A `Reply` that is read by one task.

    The request's own time limits bound every wait, for its end is told whatever happens. Whoever stops reading
    early calls `cancel`.
    """

    def __init__(self) -> None:
        self.usage: Usage | None = None
        """Known at the end."""
        self._head: Head | None = None
        self._parts: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._is_paused = False
        self._is_over = False
        self._error: SutazaiError | None = None
        self._call: Call | None = None
        self._news = asyncio.Event()

    def begin(self, answers: Inference, request: Request) -> None:
        """Ask; the answer may be there at once."""
        call = answers.start(request, self)
        if not self._is_over:
            self._call = call
            self._balance()

    # Reply

    def head(self, head: Head) -> None:
        self._head = head
        self._news.set()

    def chunk(self, data: bytes) -> None:
        self._parts.append(data)
        self._buffered_bytes += len(data)
        self._balance()
        self._news.set()

    def end(self, usage: Usage | None) -> None:
        self.usage = usage
        self._finish()

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        self._head = head
        self._parts.append(body)
        self._buffered_bytes += len(body)
        self.end(usage)

    def fail(self, error: SutazaiError) -> None:
        self._error = error
        self._finish()

    # reader

    async def until_head(self) -> Head:
        """The beginning of the answer. Raises what the request failed with."""
        while self._head is None:
            if self._error is not None:
                raise self._error
            await self._hear()
        return self._head

    async def until_part(self) -> None:
        """Return when `part` would not wait. May be cancelled."""
        while not self._parts and not self._is_over:
            await self._hear()

    async def part(self) -> bytes:
        """The next part of the body, empty at its end. Raises what the answer broke off with. May be cancelled."""
        await self.until_part()
        if not self._parts:
            if self._error is not None:
                raise self._error
            return b""
        data = self._parts.popleft()
        self._buffered_bytes -= len(data)
        self._balance()
        return data

    def cancel(self) -> None:
        """Nobody reads any more: end the request, if it has not ended."""
        if self._call is not None:
            self._call.cancel()
        self._finish()

    # parts

    async def _hear(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _finish(self) -> None:
        self._is_over = True
        self._call = None
        self._news.set()

    def _balance(self) -> None:
        """Pause the node when too much waits, let it go on when half of that was taken."""
        call = self._call
        if call is None:
            return
        if not self._is_paused and self._buffered_bytes > MOST_BUFFERED_BYTES:
            self._is_paused = True
            call.pause()
        elif self._is_paused and self._buffered_bytes < MOST_BUFFERED_BYTES // 2:
            self._is_paused = False
            call.resume()
