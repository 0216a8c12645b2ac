"""
One request and its answer, other than inference, on the same connection as inference.

What is common to those that an ASGI application answers (`edge/asgi.py`) and those that are answered without one
(`edge/direct.py`): the task that does it, the client that leaves, heads, compression, and errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import structlog

from sutazai.core.errors import SutazaiError
from sutazai.edge.errors import answer_to
from sutazai.edge.heads import header_pairs

if TYPE_CHECKING:
    from sutazai.edge.connection import ClientConnection
    from sutazai.edge.incoming import Incoming
    from sutazai.edge.server import Server

log = structlog.get_logger("sutazai.edge")

Headers = Sequence[tuple[bytes, bytes]]
BODYLESS = frozenset({204, 304})
"""Statuses of answers without a body."""
_OURS = "Something went wrong in the gateway itself; its log has the details under this request's id."


class TaskCycle:
    """A `Cycle` that runs as a task; what it does is `_answer`."""

    def __init__(self, server: Server, connection: ClientConnection, incoming: Incoming, body: bytes) -> None:
        self._body = body
        self._server = server
        self._connection = connection
        self._incoming = incoming
        self._chunked = False
        self._started = False
        self._done = False
        self.request_id = server.next_id()

    def begin(self) -> None:
        """Begin the task."""
        self._task = self._server.spawn(self._run(), name=f"answer {self._incoming.path.decode('latin-1')}")

    async def _answer(self) -> None:
        raise NotImplementedError

    # Cycle

    def client_left(self) -> None:
        self._task.cancel()
        self._finish()

    def pause(self) -> None:
        """A whole answer is written at once, however slowly it is read."""

    def resume(self) -> None:
        """As `pause`."""

    # parts

    async def _run(self) -> None:
        try:
            await self._answer()
        except Exception as error:  # the border of a request
            if not isinstance(error, SutazaiError):
                log.exception("request failed", path=self._incoming.path.decode("latin-1"), request_id=self.request_id)
            self._fail(error)
        else:
            self._finish()

    async def _packed(self, status: int, headers: Headers, body: bytes) -> tuple[Headers, bytes]:
        """The complete body in a coding that the client likes, told in the head."""
        compressor, incoming = self._server.compressor, self._incoming
        content_type = next((value for name, value in headers if name == b"content-type"), b"")
        if status in BODYLESS or not compressor.is_worth_it(content_type, len(body)):
            return headers, body
        coding = compressor.coding_for(incoming.headers.get(b"accept-encoding", b""))
        small = await compressor.apply(coding, body) if coding and incoming.method != b"HEAD" else body
        replaced = {b"vary"} if small is body else {b"vary", b"content-length"}
        vary = [value for name, value in headers if name == b"vary"]
        told = [pair for pair in headers if pair[0] not in replaced]
        told.append((b"vary", b", ".join([*vary, b"accept-encoding"])))
        if small is not body:
            told.append((b"content-encoding", coding))
        return told, small

    def _head(self, status: int, headers: Headers, length: int | None) -> bytes:
        """
        The head of the answer.

        Args:
            length: of the body; None where it is told as it comes.
        """
        incoming = self._incoming
        lines = [self._server.heads.prefix(status)]
        has_length = is_cached = False
        for name, value in headers:
            has_length = has_length or name in {b"content-length", b"transfer-encoding"}
            is_cached = is_cached or name == b"cache-control"
            lines.append(b"%b: %b\r\n" % (name, value))
        if not has_length and status not in BODYLESS:
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
        if not is_cached:
            lines.append(b"cache-control: no-store\r\n")
        lines.append(self._server.cors(incoming))
        return b"".join(lines) + b"\r\n"

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
        self._started = True
        head = self._head(answer.status, headers, len(answer.body))
        self._write(head + (b"" if self._incoming.method == b"HEAD" else answer.body))
        self._finish()

    def _finish(self) -> None:
        if not self._done:
            self._done = True
            self._connection.done(len(self._body), keep_alive=self._incoming.keep_alive)
