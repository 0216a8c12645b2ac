"""
A request as it came, and what one may look like.

That is decided by its head, before anything is read of its body. The rules are stricter than the RFC where being
lenient has let requests be smuggled past proxies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sutazai.core.errors import BadRequest, SutazaiError
from sutazai.core.request import Dialect, Endpoint
from sutazai.edge.auth import ANONYMOUS, Caller
from sutazai.edge.wishes import Wishes

if TYPE_CHECKING:
    from sutazai.edge.direct import Handler

ENDPOINTS = {endpoint.path.encode(): endpoint for endpoint in Endpoint}
PLAIN = bytes(byte for byte in range(0x21, 0x7F) if byte != ord("#"))
"""What may stand in an address as it is."""
REPEATABLE = frozenset(
    {
        b"cookie",
        b"accept",
        b"accept-encoding",
        b"accept-language",
        b"via",
        b"x-forwarded-for",
        b"forwarded",
        b"cache-control",
        b"connection",
        b"pragma",
        b"te",
        b"x-forwarded-proto",
        b"x-forwarded-host",
    }
)
"""Headers that may come more than once; they are joined by commas. Any other repetition is refused."""


NO_HEADERS: dict[bytes, bytes] = {}
"""Of a request that was refused before its headers were complete."""


class Incoming:
    """A request as it was parsed."""

    __slots__ = (
        "caller",
        "direct",
        "endpoint",
        "error",
        "headers",
        "http11",
        "keep_alive",
        "method",
        "path",
        "query",
        "target",
        "wishes",
    )

    def __init__(self) -> None:
        self.method = b""
        self.target = b""
        self.path = b""
        self.query = b""
        self.headers = NO_HEADERS
        self.http11 = True
        self.keep_alive = True
        self.endpoint: Endpoint | None = None
        self.direct: Handler | None = None
        """What answers it, where that is not inference and needs no application."""
        self.caller: Caller = ANONYMOUS
        self.wishes: Wishes | None = None
        self.error: tuple[SutazaiError, int | None] | None = None
        """What is wrong with it, and the status where the error's own is not meant."""

    @property
    def dialect(self) -> Dialect:
        """In which form this client expects errors."""
        return Dialect.OLLAMA if self.target.startswith(b"/api/") else Dialect.OPENAI


def fault_of(incoming: Incoming, version: str) -> tuple[SutazaiError, int | None] | None:
    """What makes a request dangerous or unanswerable, by its head alone."""
    headers = incoming.headers
    if version not in {"1.1", "1.0"}:
        return BadRequest(f"HTTP/{version} is not spoken here; send HTTP/1.1."), 505
    if incoming.target[:1] != b"/":
        return BadRequest("The address must be a path that begins with `/`."), None
    if incoming.target.translate(None, PLAIN):
        return BadRequest("The address held characters that must be percent-encoded."), None
    if incoming.http11 and b"host" not in headers:
        return BadRequest("The header `Host` was missing."), None
    coding = headers.get(b"transfer-encoding")
    if coding is not None:
        if not incoming.http11 or b"content-length" in headers:
            return BadRequest("`Transfer-Encoding` came with HTTP/1.0 or with `Content-Length`."), None
        if coding.lower() != b"chunked":
            return BadRequest("The only `Transfer-Encoding` understood is `chunked`."), 501
    expect = headers.get(b"expect")
    if expect is not None and expect.lower() != b"100-continue":
        return BadRequest("The only `Expect` understood is `100-continue`."), 417
    encoding = headers.get(b"content-encoding")
    if encoding is not None and encoding.lower() != b"identity":
        return BadRequest("A body with `Content-Encoding` is not understood; send it plain."), 415
    if b"upgrade" in headers and b"upgrade" in headers.get(b"connection", b"").lower():
        return BadRequest("The connection cannot be upgraded; send plain HTTP/1.1."), None
    return None
