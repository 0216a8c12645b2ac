"""
Counts requests that no client's connection counts: turns of sessions, and whatever else asks from within.

What comes through the fast lane is counted by its exchange, which knows when the client had the last byte.
"""

from __future__ import annotations

from collections.abc import Callable

from sutazai.core.errors import SutazaiError
from sutazai.core.request import Head, Request, Usage
from sutazai.gateway.accounts import Accounts
from sutazai.ports.inference import Call, Inference, Reply

CLIENT_LEFT = 499


class Accounted:
    """An `Inference` that notes what each request came to."""

    def __init__(
        self,
        inner: Inference,
        accounts: Accounts,
        *,
        status_of: Callable[[SutazaiError], int],
        clock: Callable[[], float],
    ) -> None:
        """
        Make the stage.

        Args:
            status_of: what a client is told of an error.
            clock: monotonic seconds.
        """
        self._inner = inner
        self.accounts = accounts
        self.status_of = status_of
        self.clock = clock

    def start(self, request: Request, reply: Reply) -> Call:
        entry = _Entry(self, request, reply)
        call = self._inner.start(request, entry)
        entry.call = call
        return entry


class _Entry:
    """One request: the reply that listens, and the call that may be cancelled."""

    def __init__(self, accounted: Accounted, request: Request, reply: Reply) -> None:
        self._accounted = accounted
        self._request = request
        self._reply = reply
        self._head: Head | None = None
        self._chunks = 0
        self._first_at = 0.0
        self._noted = False
        self.call: Call | None = None

    # Reply

    def head(self, head: Head) -> None:
        self._head = head
        self._reply.head(head)

    def chunk(self, data: bytes) -> None:
        if not self._chunks:
            self._first_at = self._accounted.clock()
        self._chunks += 1
        self._reply.chunk(data)

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        self._head = head
        self._first_at = self._accounted.clock()
        self._chunks = 1
        self._note(head.status, usage, "")
        self._reply.whole(head, body, usage)

    def end(self, usage: Usage | None) -> None:
        self._note(self._head.status if self._head is not None else 200, usage, "")
        self._reply.end(usage)

    def fail(self, error: SutazaiError) -> None:
        self._note(self._accounted.status_of(error), None, type(error).__name__)
        self._reply.fail(error)

    # Call

    def cancel(self) -> None:
        if self.call is not None:
            self.call.cancel()
        self._note(CLIENT_LEFT, None, "The client left.")

    def pause(self) -> None:
        if self.call is not None:
            self.call.pause()

    def resume(self) -> None:
        if self.call is not None:
            self.call.resume()

    def _note(self, status: int, usage: Usage | None, error: str) -> None:
        if self._noted:
            return
        self._noted = True
        node = self._head.node if self._head is not None else ""
        now = self._accounted.clock()
        self._accounted.accounts.note(self._request, node, status, now, self._first_at, self._chunks, usage, error)
