"""
The slow lane: one request through an ASGI application, on the same connection as inference.

The body is complete before the application starts (it is bounded), so `receive` gives it once and then waits for the
client to leave. `send` waits while the client reads too slowly.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import structlog

from sutazai.core.errors import SutazaiError
from sutazai.edge.errors import answer_to
from sutazai.edge.heads import header_pairs

if TYPE_CHECKING:
    from starlette.types import Message, Scope

    from sutazai.edge.connection import ClientConnection
    from sutazai.edge.incoming import Incoming
    from sutazai.edge.server import Server

log = structlog.get_logger("sutazai.edge")

UNPACKED = frozenset({204, 304})
"""Statuses of answers without a body."""


class AsgiCycle:
    """The `Cycle` of a request that the application answers."""

    def __init__(self, server: Server, connection: ClientConnection, incoming: Incoming, body: bytes) -> None:
        self._body = body
        self._server = server
        self._connection = connection
        self._incoming = incoming
        self._gone = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._body_given = False
        self._chunked = False
        self._started = False
        self._done = False
        self._start: Message = {}
        self.request_id = server.next_id()

    def begin(self) -> None:
        """Run the application as a task."""
        name = f"answer {self._incoming.path.decode('latin-1')}"
        self._task = self._server.spawn(self._run(), name=name)

    # Cycle

    def client_left(self) -> None:
        self._gone.set()
        self._writable.set()
        self._task.cancel()
        self._finish()

    def pause(self) -> None:
        self._writable.clear()

    def resume(self) -> None:
        self._writable.set()

    # ASGI

    async def _run(self) -> None:
        try:
            await self._server.app(self._scope(), self._receive, self._send)
        except Exception as error:  # the border of a request
            if not isinstance(error, SutazaiError):
                log.exception("request failed", path=self._incoming.path.decode("latin-1"), request_id=self.request_id)
            self._fail(error)
        else:
            self._finish()

    async def _receive(self) -> Message:
        if not self._body_given:
            self._body_given = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self._writable.wait()
        if self._done:
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        body: bytes = message.get("body", b"")
        last = not message.get("more_body", False)
        if not self._started:
            if last:
                body = await self._packed(body)
            self._started = True
            head = self._head(len(body) if last else None)
            self._write(head + (b"" if self._incoming.method == b"HEAD" else self._part(body)))
        elif body:
            self._write(self._part(body))
        if last:
            if self._chunked:
                self._write(b"0\r\n\r\n")
            self._finish()

    # parts

    async def _packed(self, body: bytes) -> bytes:
        """The complete body in a coding that the client likes, told in the head."""
        headers: list[tuple[bytes, bytes]] = self._start.get("headers", [])
        compressor, incoming = self._server.compressor, self._incoming
        content_type = next((value for name, value in headers if name == b"content-type"), b"")
        if self._start["status"] in UNPACKED or not compressor.is_worth_it(content_type, len(body)):
            return body
        coding = compressor.coding_for(incoming.headers.get(b"accept-encoding", b""))
        small = await compressor.apply(coding, body) if coding and incoming.method != b"HEAD" else body
        replaced = {b"vary"} if small is body else {b"vary", b"content-length"}
        vary = [value for name, value in headers if name == b"vary"]
        headers = [pair for pair in headers if pair[0] not in replaced]
        headers.append((b"vary", b", ".join([*vary, b"accept-encoding"])))
        if small is not body:
            headers.append((b"content-encoding", coding))
        self._start = {**self._start, "headers": headers}
        return small

    def _scope(self) -> Scope:
        incoming = self._incoming
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1" if incoming.http11 else "1.0",
            "method": incoming.method.decode("latin-1"),
            "scheme": "http",
            "path": unquote(incoming.path.decode("latin-1")),
            "raw_path": incoming.path,
            "query_string": incoming.query,
            "root_path": "",
            "headers": list(incoming.headers.items()),
            "client": None,
            "server": None,
            "state": {"caller": incoming.caller, "request_id": self.request_id, "wishes": incoming.wishes},
        }

    def _head(self, length: int | None) -> bytes:
        incoming = self._incoming
        status: int = self._start["status"]
        lines = [self._server.heads.prefix(status)]
        lengths = False
        for name, value in self._start.get("headers", []):
            lengths = lengths or name in {b"content-length", b"transfer-encoding"}
            lines.append(b"%b: %b\r\n" % (name, value))
        if not lengths and status not in {204, 304}:
            if length is not None:
                lines.append(b"content-length: %d\r\n" % length)
            elif incoming.http11:
                self._chunked = incoming.method != b"HEAD"
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                incoming.keep_alive = False
        if not incoming.keep_alive or self._server.draining:
            lines.append(b"connection: close\r\n")
        elif not incoming.http11:
            lines.append(b"connection: keep-alive\r\n")
        lines.append(b"x-request-id: %b\r\n" % self.request_id.encode())
        if not any(name == b"cache-control" for name, _ in self._start.get("headers", [])):
            lines.append(b"cache-control: no-store\r\n")
        lines.append(self._server.cors(incoming))
        return b"".join(lines) + b"\r\n"

    def _part(self, body: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(body), body) if self._chunked and body else body

    def _write(self, data: bytes) -> None:
        if data and not self._connection.transport.is_closing():
            self._connection.transport.write(data)

    def _fail(self, error: Exception) -> None:
        if self._started:
            self._connection.transport.abort()
            self._finish()
            return
        known = error if isinstance(error, SutazaiError) else SutazaiError(_OURS)
        answer = answer_to(known, self._incoming.dialect)
        headers: list[tuple[bytes, Any]] = [(b"content-type", b"application/json")]
        headers += header_pairs(getattr(known, "extra", b""))
        if answer.retry_after_s:
            headers.append((b"retry-after", b"%d" % answer.retry_after_s))
        if allowed := getattr(known, "allowed", None):
            headers.append((b"allow", allowed.encode()))
        self._start = {"status": answer.status, "headers": headers}
        self._started = True
        self._write(self._head(len(answer.body)) + (b"" if self._incoming.method == b"HEAD" else answer.body))
        self._finish()

    def _finish(self) -> None:
        if not self._done:
            self._done = True
            self._connection.done(len(self._body), keep_alive=self._incoming.keep_alive)


_OURS = "Something went wrong in the gateway itself; its log has the details under this request's id."
