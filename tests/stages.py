"""What tests of single stages share: a node that does as it is told, and clients that notice what is out of turn."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from sutazai.core.errors import SutazaiError
from sutazai.core.request import Endpoint, Head, Request, Usage
from sutazai.ports.inference import Call, Reply

JSON, SSE = b"application/json", b"text/event-stream"
_numbers = itertools.count(1)


def a_request(body: bytes = b"{}", *, fingerprint: bytes = b"", stream: bool = True, tenant: str = "acme") -> Request:
    """A chat of a tenant, with an id of its own."""
    request = Request(f"r{next(_numbers)}", Endpoint.OPENAI_CHAT, "llama3", stream, body, tenant, "key", 0.0)
    request.is_deterministic = bool(fingerprint)
    request.fingerprint = fingerprint
    return request


@dataclass(slots=True, eq=False)
class Asked:
    """One request at the node, as the node sees it."""

    request: Request
    reply: Reply
    cancelled: bool = False
    paused: bool = False
    over: bool = False

    # Call

    def cancel(self) -> None:
        self.cancelled = not self.over
        self.over = True

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    # what the node may do

    def head(self, status: int = 200, content_type: bytes = SSE, node: str = "a") -> None:
        """Begin to answer."""
        self.reply.head(Head(status, content_type, None, node, "because"))

    def chunk(self, data: bytes) -> None:
        """Say something."""
        self.reply.chunk(data)

    def end(self, usage: Usage | None = None) -> None:
        """Be done."""
        self.over = True
        self.reply.end(usage)

    def whole(self, body: bytes, *, status: int = 200, usage: Usage | None = None, node: str = "a") -> None:
        """Say all at once."""
        self.over = True
        self.reply.whole(Head(status, JSON, len(body), node, "because"), body, usage)

    def fail(self, error: SutazaiError) -> None:
        """Break off."""
        self.over = True
        self.reply.fail(error)

    def stream(self, *parts: bytes, usage: Usage | None = None) -> None:
        """A whole stream."""
        self.head()
        for part in parts:
            self.chunk(part)
        self.end(usage)


@dataclass(slots=True)
class Node:
    """The innermost stage."""

    asked: list[Asked] = field(default_factory=list)

    @property
    def last(self) -> Asked:
        """The latest request."""
        return self.asked[-1]

    def start(self, request: Request, reply: Reply) -> Call:
        asked = Asked(request, reply)
        self.asked.append(asked)
        return asked


@dataclass(slots=True, eq=False)
class Client:
    """The reply of one request; it complains about whatever comes out of turn."""

    heads: list[Head] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    ends: list[Usage | SutazaiError | None] = field(default_factory=list)
    left: bool = False
    call: Call | None = None

    @property
    def body(self) -> bytes:
        """All that came."""
        return b"".join(self.parts)

    @property
    def cache(self) -> bytes:
        """Where it was told the answer is from."""
        return self.heads[0].cache if self.heads else b""

    @property
    def error(self) -> SutazaiError | None:
        """How it broke off."""
        return next((end for end in self.ends if isinstance(end, SutazaiError)), None)

    def leave(self) -> None:
        """The client goes away."""
        self.left = not self.ends
        if self.call is not None:
            self.call.cancel()

    def head(self, head: Head) -> None:
        assert not self.heads
        self._goes_on()
        self.heads.append(head)

    def chunk(self, data: bytes) -> None:
        assert self.heads
        self._goes_on()
        self.parts.append(data)

    def end(self, usage: Usage | None) -> None:
        assert self.heads
        self._goes_on()
        self.ends.append(usage)

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        assert not self.heads
        self._goes_on()
        self.heads.append(head)
        self.parts.append(body)
        self.ends.append(usage)

    def fail(self, error: SutazaiError) -> None:
        self._goes_on()
        self.ends.append(error)

    def _goes_on(self) -> None:
        assert not self.left, "It was told something after it had left."
        assert not self.ends, "It was told something after the end."
