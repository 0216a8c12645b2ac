"""
One inference request between a client's socket and the gateway: the fast lane.

It is the outermost `Reply`: what the pool answers is written to the socket in the same call, head and body together
where the answer is complete. No task is made for a request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from sutazai.core.errors import (
    BadRequest,
    Cancelled,
    NodeRejected,
    NodeTimeout,
    ShuttingDown,
    SutazaiError,
    UnknownModel,
    WrongMethod,
)
from sutazai.core.request import Dialect, Head, Request, Usage
from sutazai.dialects.errors import keep_alive, stream_error
from sutazai.dialects.reading import read
from sutazai.edge.errors import CLIENT_LEFT, answer_to, status_of
from sutazai.ports.inference import Call

if TYPE_CHECKING:
    from sutazai.edge.connection import ClientConnection
    from sutazai.edge.incoming import Incoming
    from sutazai.edge.server import Server

log = structlog.get_logger("sutazai.edge")

HEAD = (
    b"%bcontent-type: %b\r\n%bcache-control: no-store\r\n"
    b"x-request-id: %b\r\nx-sutazai-node: %b\r\nx-sutazai-reason: %b\r\nx-sutazai-cache: %b\r\n%b\r\n%b"
)
DEADLINE_GRACE_S = 0.5
"""For the stages within, which look four times a second and can say better why a deadline passed."""
STREAM_TYPES = {Dialect.OPENAI: b"text/event-stream; charset=utf-8", Dialect.OLLAMA: b"application/x-ndjson"}


class Exchange:
    """A `Reply` that writes to a client, and the `Cycle` of its connection."""

    # what every request begins with
    head_seen: Head | None = None
    chunks = 0
    _call: Call | None = None
    _chunked = False
    _done = False
    _first_at = 0.0
    _headed = False
    _held: bytes | None = None
    _status = 0

    def __init__(self, server: Server, connection: ClientConnection, incoming: Incoming, request: Request) -> None:
        self._server = server
        self._connection = connection
        self._incoming = incoming
        self.request = request
        self.signed_at = request.arrived_at
        """When the client last got a sign of life."""

    def begin(self) -> None:
        """Hand the request to the gateway."""
        call = self._server.answers.start(self.request, self)
        if not self._done:
            self._call = call
            if self._connection.stalled_since:
                call.pause()

    @property
    def call(self) -> Call | None:
        """The request inside the gateway."""
        return self._call

    # Reply

    def head(self, head: Head) -> None:
        self.head_seen = head
        self._status = head.status
        # the head of a complete answer waits for its body, so that both leave in one packet
        if self.request.stream and not self._headed:
            self._write_head(head.content_type, None)

    def chunk(self, data: bytes) -> None:
        if not self.chunks:
            self._first_at = self._server.clock()
        self.chunks += 1
        if self._headed:
            self._write_part(data)
        elif self._held is None:
            self._held = data
        else:
            # a large answer that does not stream: the node's parts follow each other from here on
            head = self.head_seen
            assert head is not None  # noqa: S101 - a chunk follows a head
            self._write_head(head.content_type, head.length)
            self._write_part(self._held)
            self._write_part(data)

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        self.head_seen = head
        if self._headed:  # a sign of life went out before
            self.chunk(body)
            self.end(usage)
            return
        self._first_at = self._server.clock()
        self.chunks = 1
        self._write_whole(head.status, head.content_type, body)
        self._finish(head.status, usage, "", self._first_at)

    def end(self, usage: Usage | None) -> None:
        transport = self._connection.transport
        if self._headed:
            if self._chunked:
                transport.write(b"0\r\n\r\n")
        else:
            head = self.head_seen
            body = self._held or b""
            content_type = head.content_type if head is not None else b"application/json"
            self._write_whole(self._status, content_type, body)
        self._finish(self._status, usage, "")

    def fail(self, error: SutazaiError) -> None:
        if self._done:
            return
        if not self._headed:
            self._write_error(error)
            return
        status, kind = status_of(error)
        connection = self._connection
        if self.request.stream:
            self._write_part(stream_error(self.request.endpoint.dialect, status, error.message, kind))
            if self._chunked:
                connection.transport.write(b"0\r\n\r\n")
        else:
            connection.transport.abort()  # the only way to say that a body of known length will not be complete
        self._finish(status, None, error.message)

    # Cycle

    def client_left(self) -> None:
        if not self._done:
            if self._call is not None:
                self._call.cancel()
            self._finish(CLIENT_LEFT, None, "The client left.")

    def pause(self) -> None:
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        if self._call is not None:
            self._call.resume()

    # time

    def check(self, now: float, keep_alive_s: float) -> None:
        """End what is past its deadline, give a stream without a token a sign of life; called by the server's sweep."""
        if 0.0 < self.request.deadline_at < now - DEADLINE_GRACE_S:
            self._end_late()
            return
        if not self.request.stream or self.chunks or now - self.signed_at < keep_alive_s:
            return
        self.signed_at = now
        dialect = self.request.endpoint.dialect
        place = self._server.place_of(self.request.id)
        if not self._headed:
            extra = b"" if place is None else place.header_lines
            self._write_head(STREAM_TYPES[dialect], None, extra)
        self._write_part(keep_alive(dialect, place))

    def _end_late(self) -> None:
        """It shares a call with others who have more time, so nobody within ends it."""
        given_s = self.request.deadline_at - self.request.arrived_at
        message = f"The answer was not complete at the deadline of the request, {given_s:.3g} s after it came."
        self._break_off(NodeTimeout(message, node=""))

    def stop(self) -> None:
        """The server cannot wait any longer."""
        self._break_off(ShuttingDown("The gateway stopped before the answer was complete; ask again."))

    def end_by_operator(self) -> None:
        """End the request and tell the client."""
        self._break_off(Cancelled("An operator cancelled the request."))

    def _break_off(self, error: SutazaiError) -> None:
        if self._call is not None:
            self._call.cancel()
        self.fail(error)

    # parts

    def _write_head(self, content_type: bytes, length: int | None, extra: bytes = b"") -> None:
        self._headed = True
        self._status = self._status or 200
        if length is not None:
            framing = b"content-length: %d\r\n" % length
        elif self._incoming.http11:
            self._chunked = True
            framing = b"transfer-encoding: chunked\r\n"
        else:
            self._incoming.keep_alive = False
            framing = b""
        self._connection.transport.write(self._head_bytes(self._status, content_type, framing, extra))

    def _write_whole(self, status: int, content_type: bytes, body: bytes) -> None:
        accepted = self._incoming.headers.get(b"accept-encoding")
        extra = b""
        if accepted is not None:
            extra, body = self._server.compressor.pack(accepted, content_type, body)
        length = b"content-length: %d\r\n" % len(body)
        self._connection.transport.write(self._head_bytes(status, content_type, length, extra, body))

    def _write_part(self, data: bytes) -> None:
        if self._chunked:
            self._connection.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self._connection.transport.write(data)

    def _head_bytes(
        self, status: int, content_type: bytes, framing: bytes, extra: bytes = b"", body: bytes = b""
    ) -> bytes:
        incoming = self._incoming
        server = self._server
        head = self.head_seen
        if not incoming.keep_alive or server.draining:
            extra += b"connection: close\r\n"
        elif not incoming.http11:
            extra += b"connection: keep-alive\r\n"
        if head is not None and (head.extra or head.model):
            extra += head.extra
            if head.model:
                extra += b"x-sutazai-model: %b\r\n" % head.model.encode("ascii", "replace")
        if b"origin" in incoming.headers:
            extra += server.cors(incoming)
        return HEAD % (
            server.heads.prefix(status),
            content_type,
            framing,
            self.request.id.encode(),
            head.node.encode() if head is not None else b"",
            head.reason.encode() if head is not None else b"waiting",
            head.cache if head is not None else b"miss" if self.request.fingerprint else b"bypass",
            extra,
            body,
        )

    def _write_error(self, error: SutazaiError) -> None:
        request = self.request
        answer = answer_to(error, request.endpoint.dialect)
        body = answer.body
        node = getattr(error, "node", "")
        if isinstance(error, NodeRejected) and answer.status == error.status and error.is_verbatim:
            body = error.body  # the node's own words, untouched
        self.head_seen = Head(answer.status, b"application/json", len(body), node, _reason(error))
        retry: bytes = getattr(error, "extra", b"")
        if answer.retry_after_s:
            retry += b"retry-after: %d\r\n" % answer.retry_after_s
        if isinstance(error, WrongMethod):
            retry += b"allow: %b\r\n" % error.allowed.encode()
        head = self._head_bytes(answer.status, b"application/json", b"content-length: %d\r\n" % len(body), retry)
        self._connection.transport.write(head if self._incoming.method == b"HEAD" else head + body)
        self._finish(answer.status, None, _for_the_log(error))

    def _finish(self, status: int, usage: Usage | None, error: str, now: float | None = None) -> None:
        self._done = True
        self._call = None
        server = self._server
        del server.in_flight[self.request.id]
        head = self.head_seen
        server.accounts.note(
            self.request,
            head.node if head is not None else "",
            status,
            now or server.clock(),
            self._first_at,
            self.chunks,
            usage,
            error,
        )
        self._connection.done(len(self.request.body), keep_alive=self._incoming.keep_alive)


def begin(server: Server, connection: ClientConnection, incoming: Incoming, body: bytes) -> None:
    """Read an inference request and start it, or say what is wrong with it."""
    endpoint = incoming.endpoint
    assert endpoint is not None  # noqa: S101 - the connection looked
    request = Request(
        server.next_id(),
        endpoint,
        "",
        False,
        body,
        incoming.caller.tenant,
        incoming.caller.key_id,
        server.clock(),
    )
    exchange = Exchange(server, connection, incoming, request)
    connection.cycle = exchange
    server.in_flight[request.id] = exchange
    try:
        _fill(request, incoming)
        exchange.begin()
    except BadRequest as error:
        exchange.fail(error)
    except Exception:  # the border of a request
        log.exception("request failed", path=endpoint.path, request_id=request.id)
        exchange.fail(SutazaiError("Something went wrong in the gateway itself; its log has the details."))


def _fill(request: Request, incoming: Incoming) -> None:
    """Read the body. Raises `BadRequest`."""
    if incoming.method != b"POST":
        raise WrongMethod(f"Only POST is answered at {request.endpoint.path}.", allowed="POST")
    asked = read(request.endpoint, request.body)
    request.model = asked.model
    request.stream = asked.stream
    request.context_tokens = asked.context_tokens
    request.has_load_options = asked.has_load_options
    request.loads_only = asked.loads_only
    request.is_deterministic = asked.is_deterministic
    caller, wishes = incoming.caller, incoming.wishes
    request.priority = caller.priority
    request.allowance = caller.allowance
    if wishes is not None:
        wishes.apply(request, may_rise=caller.is_admin)


def _for_the_log(error: SutazaiError) -> str:
    """What may be written down: the sentence for a wrong field quotes what the client wrote there."""
    where = getattr(error, "where", None)
    return error.message if where is None or isinstance(error, UnknownModel) else f"{type(error).__name__} at {where}"


def _reason(error: SutazaiError) -> str:
    return type(error).__name__
