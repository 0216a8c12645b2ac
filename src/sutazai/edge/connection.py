"""
One client connection: HTTP/1.1, parsed by llhttp, bounded in everything.

Requests of a connection are answered in order; those that arrive early wait. Inference goes to an `Exchange`, which
writes to the socket itself; some addresses have a handler and a `DirectCycle`; everything else goes to the ASGI
application through an `AsgiCycle`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from copy import copy
from typing import TYPE_CHECKING, Protocol, cast

import httptools
import structlog

from sutazai.core.errors import BadRequest, Overloaded, SutazaiError, TooLarge, Unauthorized
from sutazai.core.identity import Scope
from sutazai.dialects.known_head import KnownHead
from sutazai.edge import exchange as fast_lane
from sutazai.edge.errors import answer_to
from sutazai.edge.incoming import ENDPOINTS, REPEATABLE, Incoming, fault_of
from sutazai.edge.wishes import wishes_in
from sutazai.settings.model import Server as Limits

if TYPE_CHECKING:
    from sutazai.edge.server import Server

log = structlog.get_logger("sutazai.edge")

MAX_TARGET_BYTES = 8192
MAX_HEADERS = 100
MAX_PIPELINED = 16
INFERENCE = Scope.INFERENCE


class Cycle(Protocol):
    """An answer under way on a connection."""

    def client_left(self) -> None:
        """Nobody is there to read the answer."""

    def pause(self) -> None:
        """The client reads too slowly."""

    def resume(self) -> None:
        """It reads again."""


class ClientConnection(asyncio.Protocol):
    """The server's side of one TCP connection."""

    __slots__ = (
        "_awaited",
        "_body",
        "_body_size",
        "_chunk",
        "_first",
        "_headers",
        "_in_body",
        "_in_message",
        "_incoming",
        "_known",
        "_known_by",
        "_known_incoming",
        "_loop",
        "_parser",
        "_queue",
        "_refused",
        "_size",
        "cycle",
        "limits",
        "server",
        "since",
        "stalled_since",
        "transport",
    )

    def __init__(self, server: Server) -> None:
        self.server = server
        self.limits: Limits = server.limits
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._loop = server.loop
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[tuple[Incoming, bytes]] = deque()
        """Requests that were read and wait for those before them, with their bodies."""
        self.cycle: Cycle | None = None
        self.since = self._loop.time()
        """When the present phase began: idle, reading a head, reading a body."""
        self.stalled_since = 0.0
        """Since when the client reads nothing of an answer; 0.0 while it does."""
        self._chunk = 0
        """Bytes of the last read; 0 where a request ended in it, for then they are not all of the present head."""
        self._first = b""
        """The read with which the present message began."""
        self._known: KnownHead | None = None
        """The last head that was parsed and found good, what it came to, and under which keys."""
        self._known_incoming = Incoming()
        self._known_by = 0
        self._awaited = 0
        """Bytes of the body that are missing after a known head."""
        self._in_message = False
        self._in_body = False
        self._refused = False
        """A request was wrong in a way that makes what follows on this connection meaningless."""
        self._begin()

    def _begin(self) -> None:
        self._incoming = Incoming()
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._body_size = 0
        self._size = 0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.closed(self)
        self._release_body()
        waiting, self._queue = self._queue, deque()
        for _, body in waiting:
            self.server.buffered_bytes -= len(body)
        if self.cycle is not None:
            self.cycle.client_left()

    def eof_received(self) -> bool:
        return False  # a client that sends no more will not read either: it left

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._awaited:
            self._take_body(data)
            return
        self._chunk = len(data)
        if not self._in_message and not self._queue and self.cycle is None:
            if self._known is not None and self._recognised(data, self._known):
                return
            self.since = self._loop.time()
            self._in_message = True
            self._first = data
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(BadRequest("The connection cannot be upgraded; send plain HTTP/1.1."))
        except httptools.HttpParserCallbackError as error:
            log.exception("connection failed", exc_info=error)
            self.transport.abort()
        except httptools.HttpParserError as error:
            if not self._refused:
                self._refuse(BadRequest(f"The request was not valid HTTP/1.1: {_cause(error)}."))
        else:
            if self._in_message and not self._in_body:
                self._size += self._chunk
                if self._size > self.limits.max_head_bytes and not self._refused:
                    self._refuse(self._head_too_large(), 431)
        self._answer_next()

    def _recognised(self, data: bytes, known: KnownHead) -> bool:
        """Whether this is a request with the head of the one before; then it is answered, or its body awaited."""
        found = known.body_of(data)
        server = self.server
        if found is None or self._known_by != server.gatekeeper.generation:
            return False
        start, length = found
        missing = length - (len(data) - start)
        if missing < 0 or length > self.limits.max_body_bytes or length == 0:
            return False
        if server.buffered_bytes + length > self.limits.max_buffered_bytes:
            return False
        server.buffered_bytes += len(data) - start
        if missing:
            self._in_body = True
            self._awaited = missing
            self._body = [data[start:]]
            self._body_size = len(data) - start
            self._incoming = self._known_incoming
            self.since = self._loop.time()
        else:
            self._begin_answer(self._known_incoming, data[start:])
        return True

    def _take_body(self, data: bytes) -> None:
        """More of the body that follows a known head."""
        size = min(len(data), self._awaited)
        self._awaited -= size
        self._body.append(data if size == len(data) else data[:size])
        self._body_size += size
        self.server.buffered_bytes += size
        if self._awaited:
            return
        self._in_body = False
        body, self._body, self._body_size = b"".join(self._body), [], 0
        self._queue.append((self._known_incoming, body))
        if size < len(data):
            self.data_received(data[size:])
        else:
            self._answer_next()

    def pause_writing(self) -> None:
        self.stalled_since = self._loop.time()
        if self.cycle is not None:
            self.cycle.pause()

    def resume_writing(self) -> None:
        self.stalled_since = 0.0
        if self.cycle is not None:
            self.cycle.resume()

    # httptools

    def on_message_begin(self) -> None:
        self._in_message = True
        self._in_body = False
        self.since = self._loop.time()
        self._begin()

    def on_url(self, url: bytes) -> None:
        self._incoming.target += url
        if len(self._incoming.target) > MAX_TARGET_BYTES:
            self._refuse(BadRequest(f"The address was longer than {MAX_TARGET_BYTES} bytes."), 414)

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        headers = self._headers
        if name in headers or self._in_body:
            self._unusual(name, value)
        else:
            headers[name] = value

    def on_headers_complete(self) -> None:
        self._in_body = True
        if self._refused:
            return
        incoming = self._incoming
        headers = incoming.headers = self._headers
        parser = self._parser
        incoming.method = parser.get_method()
        version = parser.get_http_version()
        incoming.http11 = version == "1.1"
        incoming.keep_alive = parser.should_keep_alive()
        path, _, incoming.query = incoming.target.partition(b"?")
        incoming.path = path
        incoming.endpoint = ENDPOINTS.get(path)
        if incoming.endpoint is None:
            incoming.direct = self.server.handler_of(incoming.method, path)
        limit = self.limits.max_head_bytes
        if (not self._chunk or self._size + self._chunk > limit) and self._head_bytes() > limit:
            self._refuse(self._head_too_large(), 431)
            return
        if len(headers) > MAX_HEADERS:
            self._refuse(BadRequest(f"The request had more than {MAX_HEADERS} headers."), 431)
            return
        fault = fault_of(incoming, version)
        if fault is not None:
            self._refuse(*fault)
            return
        length = headers.get(b"content-length")
        if length is not None and int(length) > self.limits.max_body_bytes:
            self._refuse(self._body_too_large())
            return
        try:
            if incoming.method == b"OPTIONS":
                self.server.gatekeeper.check_page(headers)
            elif incoming.endpoint is not None or not self.server.is_open_to_all(path):
                incoming.caller = self.server.gatekeeper.admit(headers)
                if incoming.endpoint is not None:
                    incoming.caller = self.server.gatekeeper.asks_for(incoming.caller, headers)
                    incoming.caller.needs(INFERENCE)
                incoming.wishes = wishes_in(headers)
        except SutazaiError as error:
            incoming.error = (error, None)
            if isinstance(error, Unauthorized) and (length not in {None, b"0"} or b"transfer-encoding" in headers):
                self._refuse(error)  # its body is not read, so the connection has to end
                return
        if b"expect" in headers and incoming.http11 and self.cycle is None and not self._queue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        if self._refused:
            return
        size = len(body)
        self._body.append(body)
        self._body_size += size
        server = self.server
        server.buffered_bytes += size
        if self._body_size > self.limits.max_body_bytes:
            self._refuse(self._body_too_large())
        elif server.buffered_bytes > self.limits.max_buffered_bytes:
            self._refuse(Overloaded("Too many large requests are being read; come back later.", retry_after_s=2))

    def on_message_complete(self) -> None:
        self._in_message = False
        self._in_body = False
        self._chunk = 0
        self.since = self._loop.time()
        if self._refused:
            return
        incoming = self._incoming
        parts = self._body
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        if body:
            self._body = []
            self._body_size = 0
        if self._first:
            is_common = incoming.endpoint is not None or incoming.direct is not None
            if is_common and incoming.error is None and incoming.http11:
                self._known = KnownHead.of(self._first) if b"expect" not in incoming.headers else None
                self._known_incoming = incoming
                self._known_by = self.server.gatekeeper.generation
            self._first = b""
        self._queue.append((incoming, body))
        if len(self._queue) == MAX_PIPELINED:
            self.transport.pause_reading()

    # answering

    def _answer_next(self) -> None:
        """Answer the next request in line, unless one is being answered."""
        if not self._queue or self.cycle is not None or self.transport.is_closing():
            return
        incoming, body = self._queue.popleft()
        if len(self._queue) == MAX_PIPELINED - 1 and not self._refused:
            self.transport.resume_reading()
        self._begin_answer(incoming, body)

    def _begin_answer(self, incoming: Incoming, body: bytes) -> None:
        try:
            self._answer(incoming, body)
        except Exception:  # the border of a request
            log.exception("request failed", path=incoming.path.decode("latin-1")[:200])
            self.transport.abort()

    def _answer(self, incoming: Incoming, body: bytes) -> None:
        if incoming.error is not None:
            self._send_error(incoming, len(body))
        elif incoming.method == b"OPTIONS" and b"access-control-request-method" in incoming.headers:
            self._answer_preflight(incoming, len(body))
        elif incoming.endpoint is not None:
            fast_lane.begin(self.server, self, incoming, body)
        else:
            self.server.begin_task(self, incoming, body)

    def done(self, body_bytes: int, *, keep_alive: bool) -> None:
        """The answer to a request with a body of that size is written; called by its cycle."""
        self.cycle = None
        self.server.buffered_bytes -= body_bytes
        if not keep_alive or self.server.draining:
            self._close()
            return
        self.since = self._loop.time()
        if self._queue:
            self._loop.call_soon(self._answer_next)  # not at once: the line may be deeper than the stack

    def _answer_preflight(self, incoming: Incoming, body_bytes: int) -> None:
        """A browser asks whether a page may call."""
        self.transport.write(
            b"%baccess-control-allow-methods: GET, POST, PUT, DELETE\r\n"
            b"access-control-allow-headers: authorization, content-type, x-api-key, x-stainless-arch, "
            b"x-stainless-lang, x-stainless-os, x-stainless-package-version, x-stainless-retry-count, "
            b"x-stainless-runtime, x-stainless-runtime-version, x-stainless-timeout\r\n"
            b"access-control-max-age: 600\r\n%b\r\n" % (self.server.heads.prefix(204), self.server.cors(incoming))
        )
        self.done(body_bytes, keep_alive=incoming.keep_alive)

    def _send_error(self, incoming: Incoming, body_bytes: int) -> None:
        error, status = incoming.error or (BadRequest("The request was refused."), None)
        answer = answer_to(error, incoming.dialect, status)
        status = answer.status
        keep_alive = incoming.keep_alive and not self._refused and not self.server.draining
        extra = b"retry-after: %d\r\n" % answer.retry_after_s if answer.retry_after_s else b""
        extra += self.server.cors(incoming)
        if status == 401:
            extra += b'www-authenticate: Bearer realm="sutazai"\r\n'
        if not keep_alive:
            extra += b"connection: close\r\n"
        elif not incoming.http11:
            extra += b"connection: keep-alive\r\n"
        self.transport.write(
            b"%bcontent-type: application/json\r\ncontent-length: %d\r\ncache-control: no-store\r\n"
            b"x-request-id: %b\r\nx-sutazai-node: \r\nx-sutazai-reason: refused\r\n%b\r\n%b"
            % (
                self.server.heads.prefix(status),
                len(answer.body),
                self.server.next_id().encode(),
                extra,
                b"" if incoming.method == b"HEAD" else answer.body,
            )
        )
        self.server.refused(incoming, status, error)
        self.done(body_bytes, keep_alive=keep_alive)

    def _refuse(self, error: SutazaiError, status: int | None = None) -> None:
        """Answer with an error, after those before it, and read nothing more."""
        self._refused = True
        self._awaited = 0
        self._release_body()
        incoming = copy(self._incoming)  # of a known head the original serves again
        incoming.error = (error, status)
        incoming.keep_alive = False
        if not self.transport.is_closing():
            self.transport.pause_reading()
        self._queue.append((incoming, b""))

    def _release_body(self) -> None:
        self.server.buffered_bytes -= self._body_size
        self._body = []
        self._body_size = 0

    def _close(self) -> None:
        if self.transport.is_closing():
            return
        if self._refused:
            # what the client still sends would make the kernel answer with a reset, which can overtake the error
            self.transport.resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self._loop.call_later(1.0, self.transport.close)
        else:
            self.transport.close()

    # time

    def check(self, now: float) -> None:
        """Whether a time limit has passed; called by the server's sweep."""
        limits = self.limits
        waited_s = now - self.since
        if self.stalled_since and now - self.stalled_since > limits.write_timeout_s:
            self.transport.abort()
        elif self._refused:
            return
        elif self._in_body:
            if waited_s > limits.body_timeout_s:
                self._refuse(BadRequest(f"The body was not complete after {limits.body_timeout_s:g} s."), 408)
                self._answer_next()
        elif self._in_message:
            if waited_s > limits.head_timeout_s:
                self._refuse(BadRequest(f"The headers were not complete after {limits.head_timeout_s:g} s."), 408)
                self._answer_next()
        elif self.cycle is None and waited_s > limits.keep_alive_s:
            self.transport.close()

    def close_if_idle(self) -> None:
        """The server is stopping."""
        if self.cycle is None and not self._in_message and not self._in_body and not self._queue:
            self.transport.close()

    def _unusual(self, name: bytes, value: bytes) -> None:
        """A header that came again; or a trailer, which is dropped: what it could say was decided before the body."""
        if self._in_body:
            return
        if name in REPEATABLE:
            self._headers[name] += b", " + value
        else:
            self._refuse(BadRequest(f"The header {name.decode('latin-1')!r} came more than once."))

    def _head_bytes(self) -> int:
        return len(self._incoming.target) + sum(len(name) + len(value) + 4 for name, value in self._headers.items())

    def _head_too_large(self) -> SutazaiError:
        return BadRequest(f"The headers were larger than {self.limits.max_head_bytes} bytes.")

    def _body_too_large(self) -> SutazaiError:
        return TooLarge(
            f"The body was larger than {self.limits.max_body_bytes} bytes, the limit of `server.max_body_bytes`."
        )


def _cause(error: httptools.HttpParserError) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__
