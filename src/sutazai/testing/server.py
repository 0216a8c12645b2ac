"""
What stands between the connections of a fake node and its APIs: routes, keys, bookkeeping.

`node.FakeNode` is the face of it; tests do not need this module.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeAlias

from sutazai.core.node import NodeKind
from sutazai.testing.capacity import Ticket
from sutazai.testing.machine import Api, Inference, Machine, Other
from sutazai.testing.received import Received
from sutazai.testing.script import Answer, Fault, Outcome
from sutazai.testing.steps import Steps, TakeSlot, document, whole
from sutazai.testing.wire import Connection

HOUSE_HEADERS = {
    NodeKind.OLLAMA: b"",
    NodeKind.OPENAI: b"Server: uvicorn\r\n",
    NodeKind.LLAMACPP: b"Server: llama.cpp\r\n",
}
KEEP_ALIVE_HEADERS = {NodeKind.LLAMACPP: b"Keep-Alive: timeout=5, max=100\r\n"}
OPEN_TO_ALL = {
    NodeKind.OLLAMA: {"/"},
    NodeKind.OPENAI: {"/health", "/metrics", "/version"},
    NodeKind.LLAMACPP: {"/health", "/v1/models"},
}
"""Addresses that ask for no key."""

Choice: TypeAlias = Callable[[Received], Outcome]
"""What the script says of a request."""


class Server:
    """Requests in, steps out, and a record of all that happens."""

    def __init__(self, machine: Machine, apis: Sequence[Api], choose: Choice, *, api_key: str | None) -> None:
        self.machine = machine
        self.requests: list[Received] = []
        self.mistakes: list[Exception] = []
        """What functions of the script raised."""
        self.connections: set[Connection] = set()
        self.connections_made = 0
        self.in_flight = 0
        self.peak_in_flight = 0
        self.frozen = False
        self.house_headers = HOUSE_HEADERS[machine.kind]
        self.keep_alive_headers = KEEP_ALIVE_HEADERS.get(machine.kind, b"")
        self._choose = choose
        self._api_key = api_key
        self._news = asyncio.Event()
        self._inference: dict[str, Inference] = {}
        self._other: dict[tuple[str, str], Other] = {}
        for api in apis:
            self._inference |= api.inference()
            self._other |= api.other()

    async def until(self, holds: Callable[[], bool], within_s: float) -> None:
        """Wait until something holds. Raises `TimeoutError`, telling what the node was doing."""
        try:
            async with asyncio.timeout(within_s):
                while not holds():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError as error:
            raise TimeoutError(f"Waited {within_s:g} s in vain; the node has {self}.") from error

    def __str__(self) -> str:
        inferences = sum(received.is_inference for received in self.requests)
        return (
            f"{len(self.requests)} requests ({inferences} inference, {self.in_flight} of them in flight, "
            f"{self.machine.tally.active} active) on {len(self.connections)} connections"
        )

    def opened(self, connection: Connection) -> int:
        """A client has come; returns the connection's number."""
        self.connections.add(connection)
        self.connections_made += 1
        self._news.set()
        return self.connections_made

    def lost(self, connection: Connection) -> None:
        """The connection is gone."""
        self.connections.discard(connection)
        self._news.set()

    def is_inference(self, method: str, path: str) -> bool:
        """Whether such a request asks a model for something."""
        return method == "POST" and path in self._inference

    def begin(self, received: Received) -> Steps:
        """A request has been read; what shall be done?"""
        self.requests.append(received)
        if received.is_inference:
            self.in_flight += 1
            self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        self._news.set()
        return self._answered(received)

    def over(self, received: Received) -> None:
        """The request has ended, well or not."""
        self.in_flight -= received.is_inference
        self._news.set()

    def take(self, wish: TakeSlot, on_slot: Callable[[], None]) -> Ticket | None:
        """Claim a slot. None where too many wait already."""
        return self.machine.capacity.take(wish, on_slot)

    def moved(self) -> None:
        """A request got its slot, or sent something."""
        self._news.set()

    def leave(self, ticket: Ticket) -> None:
        """Give the slot back, or stop waiting for one."""
        self.machine.capacity.leave(ticket)

    def failed(self, error: Exception) -> None:
        """The script raised an error; it is kept for the end of the test."""
        self.mistakes.append(error)

    def _answered(self, received: Received) -> Steps:
        """The steps; chosen when the first is asked for, so that a frozen node keeps its script."""
        if not self._may_pass(received):
            yield from _without_key(self.machine.kind)
            return
        outcome = self._choose(received)
        answer = outcome if isinstance(outcome, Answer) else outcome.answer
        if received.is_inference:
            steps = self._inference[received.path](received, answer)
        else:
            steps = self._other.get((received.method, received.path), self._unknown)(received)
        yield from outcome.bend(steps) if isinstance(outcome, Fault) else steps

    def _may_pass(self, received: Received) -> bool:
        return (
            self._api_key is None
            or received.path in OPEN_TO_ALL[self.machine.kind]
            or received.headers.get("authorization") == f"Bearer {self._api_key}"
        )

    def _unknown(self, _: Received) -> Steps:
        if self.machine.kind is NodeKind.OLLAMA:
            return whole(404, "text/plain", b"404 page not found")
        if self.machine.kind is NodeKind.OPENAI:
            return document(404, {"detail": "Not Found"})
        error = {"message": "File Not Found", "type": "not_found_error", "code": 404}
        return document(404, {"error": error}, closes=True)


def _without_key(kind: NodeKind) -> Steps:
    """What comes without the key. Ollama has none of its own: that is a proxy before it."""
    if kind is NodeKind.LLAMACPP:
        error = {"message": "Invalid API Key", "type": "authentication_error", "code": 401}
        return document(401, {"error": error}, closes=True)
    return document(401, {"error": "Unauthorized"})
