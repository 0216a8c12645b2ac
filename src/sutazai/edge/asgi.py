"""
The slow lane: one request through an ASGI application.

The body is complete before the application starts (it is bounded), so `receive` gives it once and then waits for the
client to leave. `send` waits while the client reads too slowly.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from urllib.parse import unquote

from sutazai.edge.cycle import TaskCycle

if TYPE_CHECKING:
    from starlette.types import Message, Scope

    from sutazai.edge.connection import ClientConnection
    from sutazai.edge.incoming import Incoming
    from sutazai.edge.server import Server


class AsgiCycle(TaskCycle):
    """The `Cycle` of a request that the application answers."""

    def __init__(self, server: Server, connection: ClientConnection, incoming: Incoming, body: bytes) -> None:
        super().__init__(server, connection, incoming, body)
        self._gone = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._body_given = False
        self._start: Message = {}

    # Cycle

    def client_left(self) -> None:
        self._gone.set()
        self._writable.set()
        super().client_left()

    def pause(self) -> None:
        self._writable.clear()

    def resume(self) -> None:
        self._writable.set()

    # ASGI

    async def _answer(self) -> None:
        await self._server.app(self._scope(), self._receive, self._send)

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
            status: int = self._start["status"]
            headers = self._start.get("headers", [])
            if last:
                headers, body = await self._packed(status, headers, body)
            self._started = True
            head = self._head(status, headers, len(body) if last else None)
            self._write(head + (b"" if self._incoming.method == b"HEAD" else self._part(body)))
        elif body:
            self._write(self._part(body))
        if last:
            if self._chunked:
                self._write(b"0\r\n\r\n")
            self._finish()

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

    def _part(self, body: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(body), body) if self._chunked and body else body
