"""
HTTP/1.1 as a fake server speaks it: requests in by httptools, steps out.

A connection handles one request after the other. Nothing here waits: timers and the socket's own events
drive it, so a client that hangs up is noticed in the same turn of the event loop.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from email.utils import formatdate
from http.client import responses
from typing import Protocol, cast

import httptools

from sutazai.testing.exchange import Exchange, Owner
from sutazai.testing.received import Received
from sutazai.testing.steps import Head, Steps

PIPELINE_LIMIT = 100
"""Requests read ahead on one connection; one more closes it."""


class Host(Owner, Protocol):
    """The server behind the connections."""

    house_headers: bytes
    """Sent with every head; lines that end in CRLF."""
    keep_alive_headers: bytes
    """Sent with every head that leaves the connection open."""

    def opened(self, connection: Connection) -> int:
        """A client has come; returns the connection's number."""

    def lost(self, connection: Connection) -> None:
        """The connection is gone."""

    def is_inference(self, method: str, path: str) -> bool:
        """Whether such a request asks a model for something."""

    def begin(self, received: Received) -> Steps:
        """A request has been read; what shall be done?"""


class Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._unanswered: deque[Received] = deque()
        self._exchange: Exchange | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self.writable = True
        """False while the client reads too slowly."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        # A cast and no assertion: uvloop's transports are of no class of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._number = self._host.opened(self)

    def data_received(self, data: bytes) -> None:
        """Read, then answer if nothing is being answered."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.close()
            return
        self._answer_next()

    def eof_received(self) -> None:
        """The client closed its half: it is gone, as servers in Go and Python take it."""
        self._drop_requests(aborted=True)

    def connection_lost(self, _: Exception | None) -> None:
        """The connection is gone."""
        self._closed = True
        self._drop_requests(aborted=True)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._host.lost(self)

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self.writable = False

    def resume_writing(self) -> None:
        """The client has caught up."""
        self.writable = True
        self.advance()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._url = b""
        self._headers = {}
        self._body = []
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def on_url(self, url: bytes) -> None:
        """Part of the address."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The body comes next."""
        if self._headers.get("expect", "").lower() == "100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """Part of the body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is complete; it is answered once the parser has returned."""
        method = self._parser.get_method().decode("ascii")
        path, _, query = self._url.decode("latin-1").partition("?")
        self._unanswered.append(
            Received(
                method=method,
                path=path,
                query=query,
                headers=self._headers,
                body=b"".join(self._body),
                at=self._loop.time(),
                connection=self._number,
                is_inference=self._host.is_inference(method, path),
                keep_alive=self._parser.should_keep_alive(),
            )
        )

    def advance(self) -> None:
        """Go on with the answer."""
        if self._exchange is not None:
            self._exchange.advance()

    def write(self, data: bytes) -> None:
        """Send these bytes now."""
        self._transport.write(data)

    def head(self, head: Head, *, stays_open: bool) -> bytes:
        """A head as bytes."""
        lines = [
            b"HTTP/1.1 %d %s\r\n" % (head.status, responses.get(head.status, "Unnamed").encode()),
            b"Date: %s\r\n" % formatdate(usegmt=True).encode(),
            self._host.house_headers,
            b"Content-Type: %s\r\n" % head.content_type.encode() if head.content_type else b"",
            b"Transfer-Encoding: chunked\r\n" if head.length is None else b"Content-Length: %d\r\n" % head.length,
            *(f"{name}: {value}\r\n".encode("latin-1") for name, value in head.extra),
            self._host.keep_alive_headers if stays_open else b"Connection: close\r\n",
            b"\r\n",
        ]
        return b"".join(lines)

    def close_idle(self, after_s: float) -> None:
        """Close after that time, if no request comes in between."""
        if after_s <= 0:
            self.close()
        elif not self._unanswered:
            self._idle_timer = self._loop.call_later(after_s, self.close)

    def close(self) -> None:
        """Close when all is sent."""
        self._closed = True
        self._drop_requests(aborted=False)
        self._transport.close()

    def reset(self) -> None:
        """Close now, with a TCP reset."""
        self._closed = True
        self._drop_requests(aborted=False)
        raw = self._transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def exchange_over(self) -> None:
        """The answer was played to its end."""
        self._exchange = None
        if self._unanswered:
            self._loop.call_soon(self._answer_next)

    def _answer_next(self) -> None:
        if len(self._unanswered) > PIPELINE_LIMIT:
            self.close()
        if self._closed or self._exchange is not None or not self._unanswered:
            return
        received = self._unanswered.popleft()
        self._exchange = Exchange(self._host, self, received, self._host.begin(received))
        self._exchange.advance()

    def _drop_requests(self, *, aborted: bool) -> None:
        self._unanswered.clear()
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            exchange.drop(aborted=aborted)
