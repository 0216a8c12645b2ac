"""
One inference request to one node over HTTP.

The answer to a request that does not stream is held back until it is complete (or large), so that a node that dies
half way can still be replaced by another. A stream is handed on as it comes.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from sutazai.adapters.http.connection import Connection, ConnectionPool
from sutazai.core.errors import NodeFault, NodeRejected, NodeUnreachable
from sutazai.core.request import Head, Usage
from sutazai.dialects.errors import error_message
from sutazai.ports.inference import Reply

HOLD_BYTES = 256 * 1024
"""An answer that does not stream is passed on before its end once it is larger than this."""
MAX_ERROR_BYTES = 64 * 1024


JOINED_BYTES = 16 * 1024
"""Up to here copying a body behind its head costs less than writing the two at once."""


class Reading(Protocol):
    """What is made of the bytes of a node: nothing but counting tokens, or a translation."""

    content_type: bytes | None
    """None keeps what the node said."""
    is_verbatim: bool
    """The node speaks the client's dialect, so what it says of a bad request can be passed on as it is."""

    def feed(self, data: bytes) -> bytes:
        """What to hand on for these bytes."""

    def finish(self) -> bytes:
        """What is left at the end of a good answer."""

    def result(self) -> Usage | None:
        """Tokens counted so far."""


class HttpCall:
    """A request under way at one node: sends, receives, and tells the reply."""

    # what every call begins with
    _connection: Connection | None = None
    _task: asyncio.Task[None] | None = None
    _head: Head | None = None
    _held_bytes = 0
    _status = 0
    _retry_after_s = 0.0
    _paused = False

    def __init__(
        self, pool: ConnectionPool, parts: list[bytes], reply: Reply, reading: Reading, *, stream: bool
    ) -> None:
        """Begin; `parts` are the request's bytes."""
        self._pool = pool
        self._parts = parts
        self._reply: Reply | None = reply
        self._reading = reading
        self._stream = stream
        self._held: list[bytes] = []
        connection = pool.take_idle()
        if connection is None:
            self._connect()
        else:
            self._connection = connection
            connection.send(self, parts)

    def _connect(self) -> None:
        self._connection = None
        self._task = asyncio.get_running_loop().create_task(self._send_anew(), name=f"connect {self._pool.node}")

    async def _send_anew(self) -> None:
        try:
            connection = await self._pool.connect()
        except NodeFault as error:
            self._fail(error)
            return
        self._connection = connection
        connection.send(self, self._parts)
        if self._paused:
            connection.pause()

    # Call

    def cancel(self) -> None:
        """Drop the node's connection at once."""
        self._reply = None
        if self._task is not None:
            self._task.cancel()
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    def pause(self) -> None:
        self._paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        self._paused = False
        if self._connection is not None:
            self._connection.resume()

    # Receiver

    def on_head(self, status: int, headers: dict[bytes, bytes], length: int | None) -> None:
        self._status = status
        if status >= 300:
            self._retry_after_s = _seconds(headers.get(b"retry-after", b""))
            return
        content_type = self._reading.content_type
        if content_type is None:
            content_type = headers.get(b"content-type", b"application/json")
        else:
            length = None
        head = Head(status, content_type, length, self._pool.node, "")
        if self._stream:
            self._reply.head(head)  # type: ignore[union-attr]
        else:
            self._head = head

    def on_data(self, data: bytes) -> None:
        if self._status >= 300:
            if self._held_bytes < MAX_ERROR_BYTES:
                self._hold(data)
            return
        try:
            out = self._reading.feed(data)
        except ValueError as error:
            self._give_up(str(error))
            return
        if not out:
            return
        if self._head is None:
            self._reply.chunk(out)  # type: ignore[union-attr]
        else:
            self._hold(out)
            if self._held_bytes > HOLD_BYTES:
                self._let_go()

    def on_end(self) -> None:
        if self._paused:
            self.resume()  # the connection is to be used again
        self._connection = None
        if self._status >= 300:
            self._fail(self._rejection())
            return
        try:
            rest = self._reading.finish()
        except ValueError as error:
            self._give_up(str(error))
            return
        reply, self._reply = self._reply, None
        if reply is None:
            return
        head, held = self._head, self._held
        if head is not None:
            if rest:
                held.append(rest)
            reply.whole(head, held[0] if len(held) == 1 else b"".join(held), self._reading.result())
            return
        if rest:
            reply.chunk(rest)
        reply.end(self._reading.result())

    def on_lost(self, error: NodeFault, *, untouched: bool) -> None:
        self._connection = None
        if untouched and self._reply is not None:
            self._connect()
        else:
            self._fail(error)

    # parts

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)

    def _let_go(self) -> None:
        """Hand on what was held back, and hold no more."""
        head, self._head = self._head, None
        if self._reply is not None and head is not None:
            self._reply.head(head)
        for data in self._held:
            if self._reply is not None:
                self._reply.chunk(data)
        self._held.clear()

    def _rejection(self) -> NodeFault:
        body = b"".join(self._held)
        message = error_message(body) if self._status >= 400 else "It sent a redirect, which is not followed."
        return NodeRejected(
            message,
            node=self._pool.node,
            status=self._status,
            body=body,
            is_verbatim=self._reading.is_verbatim and body[:1] == b"{",
            retry_after_s=self._retry_after_s,
        )

    def _give_up(self, why: str) -> None:
        if self._connection is not None:
            self._connection.abort()
        self._fail(
            NodeUnreachable(
                f"The node {self._pool.node} gave an answer that made no sense: {why}", node=self._pool.node
            )
        )

    def _fail(self, error: NodeFault) -> None:
        self._connection = None
        reply, self._reply = self._reply, None
        if reply is not None:
            reply.fail(error)


def as_parts(head: bytes, body: bytes) -> list[bytes]:
    """A request as it is written."""
    return [head + body] if len(body) <= JOINED_BYTES else [head, body]


def _seconds(retry_after: bytes) -> float:
    """The value of `Retry-After` where it is a small number of seconds; dates are not worth the trouble."""
    return float(retry_after) if retry_after.isdigit() and len(retry_after) < 5 else 0.0
