"""
One connection to a node, and the pool of those that are idle.

A connection carries one request at a time. It is a protocol, not a stream: bytes go from the socket through llhttp to
a `Receiver` in the same call, and what arrived together is handed on together.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol, cast

import httptools

from sutazai.adapters.http.address import Address, tls_context
from sutazai.core.errors import NodeFault, NodeTimeout, NodeUnreachable
from sutazai.dialects.known_head import KnownHead

IDLE_S = 30.0
"""Nodes close idle connections after 5 s (llama.cpp, uvicorn) to never (Go); ours are tried again when stale."""
MAX_IDLE = 1024
MAX_HEADERS = 100
MAX_MISSES = 8
RECEIVE_BYTES = 256 * 1024


class Receiver(Protocol):
    """Whoever sent the request."""

    def on_head(self, status: int, headers: dict[bytes, bytes], length: int | None) -> None:
        """
        The head came.

        Names are in lower case, of repeated ones the last counts; `length` is what counts of `content-length`.
        """

    def on_data(self, data: bytes) -> None:
        """Part of the body."""

    def on_end(self) -> None:
        """The answer is complete; the connection is already someone else's."""

    def on_lost(self, error: NodeFault, *, untouched: bool) -> None:
        """It broke. `untouched`: a kept connection that gave no byte, which says nothing about the node."""


class Connection(asyncio.Protocol):
    """A keep-alive HTTP/1.1 connection to one node."""

    __slots__ = (
        "_at_start",
        "_body",
        "_complete",
        "_first",
        "_headers",
        "_is_paused",
        "_keep",
        "_known",
        "_known_headers",
        "_known_status",
        "_misses",
        "_parser",
        "_pool",
        "_receiver",
        "_status",
        "_told",
        "idle_since",
        "reused",
        "transport",
    )

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._receiver: Receiver | None = None
        self.transport: asyncio.Transport | None = None
        self.reused = False
        self.idle_since = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._is_paused = False
        self._known: KnownHead | None = None
        self._known_status = 0
        self._misses = 0
        """Heads in a row that were not the one of before: some nodes number their answers."""
        self._known_headers: dict[bytes, bytes] = {}
        self._reset()

    def _reset(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._status = 0
        self._told = False
        self._complete = False
        self._keep = False
        self._at_start = True
        self._first = b""

    def send(self, receiver: Receiver, parts: list[bytes]) -> None:
        """Begin a request; `parts` are its bytes."""
        self._receiver = receiver
        transport = self.transport
        if transport is None or transport.is_closing():
            self._fail("closed the connection")
        elif len(parts) == 1:
            transport.write(parts[0])
        else:
            transport.writelines(parts)

    def abort(self) -> None:
        """Drop the connection; the receiver hears nothing more."""
        self._receiver = None
        if self.transport is not None:
            self.transport.abort()

    def pause(self) -> None:
        """Stop reading: back-pressure."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()
            self._is_paused = True

    def resume(self) -> None:
        """Read on."""
        self._is_paused = False
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        # what a client does not read must not pile up in the kernel by the megabyte
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)

    def data_received(self, data: bytes) -> None:
        if self._receiver is None:
            self.abort()  # nothing was asked: a node that speaks now is out of step
            return
        if self._at_start:
            if self._known is not None and self._recognised(data, self._known):
                return
            self._at_start = False
            self._first = data
        else:
            self._first = b""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"answered with something that is not HTTP ({error})")
            self.abort()
            return
        self._hand_on()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        if self._receiver is None:
            return
        if self._told and self._ends_with_the_connection() and exc is None:
            self._finish(keep=False)
        else:
            self._fail("cut the connection" if exc is None else f"reset the connection ({exc})")

    # httptools

    def _recognised(self, data: bytes, known: KnownHead) -> bool:
        """Whether this is a complete answer with the head of an earlier one; then it is handed on."""
        found = known.body_of(data)
        if found is None or found[0] + found[1] != len(data):
            self._misses += 1
            return False
        self._misses = 0
        receiver = self._receiver
        assert receiver is not None  # noqa: S101 - asked above
        receiver.on_head(self._known_status, self._known_headers, found[1])
        if self._receiver is not None and found[1]:
            receiver.on_data(data[found[0] :])
        if self._receiver is not None:
            self._finish(keep=True)
        return True

    def _remember(self) -> None:
        """This answer came in one piece and left the connection usable: its head is known from here on."""
        known = KnownHead.of(self._first) if self._misses < MAX_MISSES else None
        if known is not None and b"content-length" in self._headers:
            self._known = known
            self._known_status = self._status
            self._known_headers = self._headers

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self._headers) < MAX_HEADERS:
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._keep = self._parser.should_keep_alive()  # llhttp forgets it with the end of the message

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._status < 200:  # 100 Continue and the like: the answer is still to come
            self._status = 0
            self._headers = {}
        else:
            self._complete = True

    # parts

    def _hand_on(self) -> None:
        """Give the receiver what the last bytes held; it may cancel at each step."""
        if not self._told and self._status:
            self._told = True
            length = self._headers.get(b"content-length")
            self._receiver.on_head(  # type: ignore[union-attr]
                self._status, self._headers, int(length) if length is not None else None
            )
        if self._body and self._receiver is not None:
            body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            self._body.clear()
            self._receiver.on_data(body)
        if self._complete and self._receiver is not None:
            if self._keep and self._first:
                self._remember()
            self._finish(keep=self._keep)

    def _finish(self, *, keep: bool) -> None:
        receiver = self._receiver
        self._receiver = None
        if self._is_paused:
            self.resume()  # the next request must not find it deaf
        if keep and receiver is not None:
            if not self._at_start:
                self._reset()
            self._pool.keep(self)
        elif self.transport is not None:
            self.transport.close()
        if receiver is not None:
            receiver.on_end()

    def _ends_with_the_connection(self) -> bool:
        return b"content-length" not in self._headers and b"transfer-encoding" not in self._headers

    def _fail(self, what: str) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            error = NodeUnreachable(f"The node {self._pool.node} {what}.", node=self._pool.node)
            receiver.on_lost(error, untouched=self.reused and not self._status)


class ConnectionPool:
    """Idle connections to one address, newest first, and the making of new ones."""

    def __init__(self, node: str, address: Address, *, connect_s: float) -> None:
        self.node = node
        self.address = address
        self.connect_s = connect_s
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._loop = asyncio.get_running_loop()

    def take_idle(self) -> Connection | None:
        """A kept connection that still looks open."""
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                connection.reused = True
                return connection
        return None

    async def connect(self) -> Connection:
        """Open a new connection. Raises `NodeFault` within `connect_s`."""
        address = self.address
        connection = Connection(self)
        try:
            async with asyncio.timeout(self.connect_s):
                await self._loop.create_connection(
                    lambda: connection,
                    address.host,
                    address.port,
                    ssl=tls_context() if address.secure else None,
                )
        except TimeoutError as error:
            message = f"The node {self.node} accepted no connection within {self.connect_s:g} s."
            raise NodeTimeout(message, node=self.node, connecting=True) from error
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            message = f"The node {self.node} could not be reached: {reason}."
            raise NodeUnreachable(message, node=self.node) from error
        self._all.add(connection)
        return connection

    def keep(self, connection: Connection) -> None:
        """Take a connection back after a complete answer."""
        if len(self._idle) >= MAX_IDLE:
            connection.abort()
            return
        now = self._loop.time()
        connection.idle_since = now
        self._idle.append(connection)
        if now - self._idle[0].idle_since > IDLE_S:
            self._idle[0].abort()
            del self._idle[0]

    def forget(self, connection: Connection) -> None:
        """The connection is gone."""
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Drop every connection; calls under way hear that theirs was lost."""
        for connection in list(self._all):
            if connection.transport is not None:
                connection.transport.abort()
