"""
The middle lane: addresses that are asked so often that a framework in between would be most of their cost.

A handler gets the request as the connection parsed it, with its caller, and the whole body; it gives a whole answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from sutazai.edge.cycle import Headers, TaskCycle

if TYPE_CHECKING:
    from sutazai.edge.connection import ClientConnection
    from sutazai.edge.incoming import Incoming
    from sutazai.edge.server import Server


class Reply(msgspec.Struct, frozen=True):
    """A whole answer."""

    status: int
    headers: Headers
    body: bytes


Handler: TypeAlias = Callable[["Incoming", bytes], Awaitable[Reply]]
"""Raises errors of ours, which become answers."""


class DirectCycle(TaskCycle):
    """The `Cycle` of a request that a handler answers."""

    def __init__(
        self, server: Server, connection: ClientConnection, incoming: Incoming, body: bytes, handler: Handler
    ) -> None:
        super().__init__(server, connection, incoming, body)
        self._handler = handler

    async def _answer(self) -> None:
        reply = await self._handler(self._incoming, self._body)
        headers, body = await self._packed(reply.status, reply.headers, reply.body)
        self._write(self._head(reply.status, headers, len(body)) + body)
