"""
Requests beside the hot path: probes, model keeping, the command line.

The same connections as inference uses, in the shape of coroutines. The caller owns the time limit of `fetch`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from sutazai.adapters.http.connection import Connection, ConnectionPool
from sutazai.core.errors import NodeFault, NodeRejected, NodeTimeout
from sutazai.dialects.errors import error_message

MAX_BODY_BYTES = 32 * 1024 * 1024
QUEUED_PARTS = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes


class HttpClient:
    """Requests to one address."""

    def __init__(self, pool: ConnectionPool, *, bearer: str | None = None) -> None:
        self._pool = pool
        self._bearer = bearer

    @property
    def node(self) -> str:
        """Whom errors name."""
        return self._pool.node

    def opening(self, method: str, path: str, *, close: bool = False) -> bytes:
        """Request line and constant headers, without the blank line that ends them."""
        address = self._pool.address
        lines = [
            f"{method} {address.base_path}{path} HTTP/1.1",
            f"host: {address.host_header}",
            "content-type: application/json",
            "accept-encoding: identity",
        ]
        if self._bearer:
            lines.append(f"authorization: Bearer {self._bearer}")
        if close:
            lines.append("connection: close")
        return "\r\n".join([*lines, ""]).encode("latin-1")

    async def fetch(self, method: str, path: str, body: bytes = b"", headers: Sequence[bytes] = ()) -> Answer:
        """
        One request, one answer, whatever its status.

        Args:
            headers: further lines of the head, without their ends.

        Raises `NodeFault`. Cancelling drops the connection.
        """
        async with _Exchange(self._pool) as exchange:
            await exchange.begin(self._request(method, path, body, headers))
            parts: list[bytes] = []
            size = 0
            async for part in exchange.parts():
                size += len(part)
                if size > MAX_BODY_BYTES:
                    raise NodeRejected("It sent more than 32 MiB.", node=self.node, status=exchange.status)
                parts.append(part)
            return Answer(exchange.status, exchange.headers, b"".join(parts))

    async def fetch_json(self, method: str, path: str, value: object = None) -> object:
        """As `fetch`, with JSON both ways. Raises `NodeRejected` where the status is not 2xx."""
        body = b"" if value is None else json.dumps(value).encode()
        answer = await self.fetch(method, path, body)
        if not 200 <= answer.status < 300:
            raise NodeRejected(error_message(answer.body), node=self.node, status=answer.status, body=answer.body)
        try:
            return json.loads(answer.body) if answer.body else None
        except ValueError as error:
            message = f"The node {self.node} answered {path} with something that is not JSON."
            raise NodeRejected(message, node=self.node, status=answer.status) from error

    async def lines(
        self, method: str, path: str, value: object, *, idle_s: float, headers: Sequence[bytes] = ()
    ) -> AsyncIterator[bytes]:
        """
        The lines of a streamed answer as they come, without their ends.

        Args:
            value: the body; None where there is none.
            headers: further lines of the head, without their ends.

        Raises `NodeTimeout` after `idle_s` of silence and `NodeRejected` where the status is not 2xx. Closing the
        iterator drops the connection.
        """
        async with _Exchange(self._pool) as exchange:
            body = b"" if value is None else json.dumps(value).encode()
            await exchange.begin(self._request(method, path, body, headers))
            rest = b""
            async for part in exchange.parts(idle_s=idle_s):
                *complete, rest = (rest + part).split(b"\n")
                if exchange.status >= 300:
                    rest = b"\n".join([*complete, rest])[:MAX_BODY_BYTES]
                    continue
                for line in complete:
                    yield line.rstrip(b"\r")
            if exchange.status >= 300:
                raise NodeRejected(error_message(rest), node=self.node, status=exchange.status, body=rest)
            if rest:
                yield rest

    def _request(self, method: str, path: str, body: bytes, headers: Sequence[bytes] = ()) -> list[bytes]:
        more = b"".join(b"%b\r\n" % line for line in headers)
        head = self.opening(method, path) + more + b"content-length: %d\r\n\r\n" % len(body)
        return [head, body] if body else [head]


class _Exchange:
    """A `Receiver` that a coroutine reads from; leaving it drops a connection that is not finished."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._connection: Connection | None = None
        self._parts: asyncio.Queue[bytes | NodeFault | None] = asyncio.Queue()
        self._request: list[bytes] = []
        self._stale = asyncio.Event()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}

    async def __aenter__(self) -> _Exchange:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.abort()

    async def begin(self, request: list[bytes]) -> None:
        """Send the request."""
        self._request = request
        connection = self._pool.take_idle() or await self._pool.connect()
        self._connection = connection
        connection.send(self, request)

    async def parts(self, *, idle_s: float | None = None) -> AsyncIterator[bytes]:
        """The body as it comes."""
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    part = await self._parts.get()
            except TimeoutError as error:
                message = f"The node {self._pool.node} fell silent for {idle_s:g} s."
                raise NodeTimeout(message, node=self._pool.node) from error
            if part is None:
                return
            if isinstance(part, NodeFault):
                if not self._stale.is_set():
                    raise part
                self._stale.clear()
                self._connection = await self._pool.connect()
                self._connection.send(self, self._request)
                continue
            if self._connection is not None and self._parts.qsize() < QUEUED_PARTS // 2:
                self._connection.resume()
            yield part

    def on_head(self, status: int, headers: dict[bytes, bytes], length: int | None) -> None:
        self.status = status
        self.headers = headers

    def on_data(self, data: bytes) -> None:
        self._parts.put_nowait(data)
        if self._connection is not None and self._parts.qsize() > QUEUED_PARTS:
            self._connection.pause()

    def on_end(self) -> None:
        self._connection = None
        self._parts.put_nowait(None)

    def on_lost(self, error: NodeFault, *, untouched: bool) -> None:
        self._connection = None
        if untouched:
            self._stale.set()
        self._parts.put_nowait(error)
