"""Answers of the application, and how its requests are read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from sutazai.core.errors import WrongMethod
from sutazai.dialects.complaints import decoded

T = TypeVar("T")
JSON = (b"content-type", b"application/json")
Handler = Callable[[HttpRequest], Awaitable[Response]]


def json_reply(value: object, *, status: int = 200) -> Response:
    """JSON by msgspec."""
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


async def body_as(http: HttpRequest, decoder: msgspec.json.Decoder[T]) -> T:
    """The body as this shape. Raises `BadRequest`."""
    return decoded(decoder, await http.body())


def json_lines(records: AsyncIterator[Mapping[str, Any]]) -> StreamingResponse:
    """NDJSON, a line a record, as they come."""

    async def lines() -> AsyncIterator[bytes]:
        async for record in records:
            yield msgspec.json.encode(record) + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


class Address(Route):
    """A route whose wrong methods are errors like all others."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.methods and scope["method"] not in self.methods:
            allowed = ", ".join(sorted(self.methods))
            raise WrongMethod(f"{scope['method']} is not answered at {self.path}; {allowed} is.", allowed=allowed)
        await self.app(scope, receive, send)


def resource(path: str, *, also: Sequence[str] = (), **by_method: Handler) -> Address:
    """
    One address that answers each of these methods in its own way; HEAD where it answers GET.

    Args:
        also: methods that are answered before the application (`edge/direct.py`).
    """

    async def answer(http: HttpRequest) -> Response:
        return await by_method["GET" if http.method == "HEAD" else http.method](http)

    return Address(path, answer, methods=[*by_method, *also])
