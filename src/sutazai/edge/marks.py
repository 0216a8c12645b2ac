"""
`x-sutazai-written`: the answer to a write carries a mark, and whoever sends it back is told nothing older.

Within one gateway that holds without the header.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sutazai.core.mark import BEGINNING, WRITTEN, Mark, mark_of
from sutazai.edge.auth import Caller
from sutazai.edge.replies import Address
from sutazai.ports.marks import Marks

READS = frozenset({"GET", "HEAD"})


def mark_in(http: HttpRequest) -> Mark:
    """What the client says it was told of before."""
    mark: Mark = http.scope["state"]["seen"]
    return mark


def check_mark(headers: Mapping[bytes, bytes]) -> None:
    """Raises `BadRequest` where the header of a write is no mark; what it says does not matter to one."""
    if (given := headers.get(WRITTEN.encode())) is not None:
        mark_of(given.decode("latin-1"))


async def written(marks: Marks, tenant: str) -> Sequence[tuple[bytes, bytes]]:
    """What the answer to a write of a tenant's says; the write is noted before."""
    marks.note(tenant)
    mark = await marks.newest(tenant)
    return () if mark is None else [_line(mark)]


def marked(marks: Marks, addresses: Iterable[Address]) -> Sequence[Address]:
    """
    The same addresses, which read marks of requests, and raise `BadRequest` for what is none.

    What they write for a tenant is noted before it hears of it, and the answer gets a mark.
    """
    found = list(addresses)
    for address in found:
        address.app = _Marked(address.app, marks)
    return found


class _Marked:
    """An application around that of an address."""

    def __init__(self, app: ASGIApp, marks: Marks) -> None:
        self._app = app
        self._marks = marks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get(WRITTEN)
        scope["state"]["seen"] = BEGINNING if given is None else mark_of(given)
        if scope["method"] in READS:
            await self._app(scope, receive, send)
            return
        caller: Caller = scope["state"]["caller"]
        start: Message | None = None

        async def marking(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            is_end = not message.get("more_body", False)
            if is_end:
                self._marks.note(caller.tenant)
            if start is not None:
                # a stream begins before anything is written, so only a whole answer has a mark
                mark = await self._marks.newest(caller.tenant) if is_end and start["status"] < 400 else None
                await send(start if mark is None else with_mark(start, mark))
                start = None
            await send(message)

        await self._app(scope, receive, marking)


def with_mark(start: Message, mark: Mark) -> Message:
    """The beginning of an answer with its mark."""
    return {**start, "headers": [*start.get("headers", ()), _line(mark)]}


def _line(mark: Mark) -> tuple[bytes, bytes]:
    return WRITTEN.encode(), str(mark).encode()
