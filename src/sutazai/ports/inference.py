"""
The one interface that carries a request: a node, a stage, the whole gateway.

It pushes: `start` hands a request on and returns at once; the answer arrives as calls on the `Reply`. No task, no
future and no queue is made for a request (an asyncio task and its wake-ups cost as much as all of routing), and the
same stages run in a simulator without an event loop. See `docs/adr/0002-replies-are-pushed.md`.

The contract, for both sides:

- `Reply` gets `head`, any number of `chunk`, and exactly one of `end` or `fail`; or `whole` alone; or `fail` alone.
  Nothing after.
- Calls arrive on the event loop's thread. `start` may answer before it returns.
- `Call.cancel` ends the request from the outside: the node's connection is dropped at once, and the reply hears
  nothing more.
- `Call.pause` and `Call.resume` are back-pressure: between them the node's socket is not read. Chunks already read
  may still come.
"""

from __future__ import annotations

from typing import Protocol

from sutazai.core.errors import SutazaiError
from sutazai.core.request import Head, Request, Usage


class Reply(Protocol):
    """Where an answer goes."""

    def head(self, head: Head) -> None:
        """The answer begins."""

    def chunk(self, data: bytes) -> None:
        """Part of the body, in the client's dialect."""

    def end(self, usage: Usage | None) -> None:
        """The answer is complete; `usage` is None where the node did not tell."""

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        """The complete answer at once, in place of `head`, `chunk` and `end`."""

    def fail(self, error: SutazaiError) -> None:
        """The answer broke off, or never began."""


class Call(Protocol):
    """A request under way."""

    def cancel(self) -> None:
        """End it now. Safe to call at any time, any number of times."""

    def pause(self) -> None:
        """Read no more from the node for now."""

    def resume(self) -> None:
        """Read on."""


class NoCall:
    """A `Call` that ended within `start`."""

    def cancel(self) -> None:
        return

    def pause(self) -> None:
        return

    def resume(self) -> None:
        return


class Inference(Protocol):
    """Whatever answers a request."""

    def start(self, request: Request, reply: Reply) -> Call:
        """Begin to answer; never raises, failures go to `reply.fail`."""
