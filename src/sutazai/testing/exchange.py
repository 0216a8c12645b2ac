"""One request on a connection: the steps of its answer, played until one has to wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import chain
from typing import Protocol

from sutazai.testing.capacity import Ticket
from sutazai.testing.received import Received
from sutazai.testing.steps import (
    CloseIdle,
    Cut,
    End,
    Head,
    Part,
    Raw,
    Step,
    Steps,
    TakeSlot,
    TrickledHead,
    Wait,
    document,
)


class Owner(Protocol):
    """The server, as an exchange needs it."""

    frozen: bool

    def take(self, wish: TakeSlot, on_slot: Callable[[], None]) -> Ticket | None:
        """Claim a slot. None where too many wait already."""

    def leave(self, ticket: Ticket) -> None:
        """Give the slot back, or stop waiting for one."""

    def moved(self) -> None:
        """A request got its slot, or sent something."""

    def over(self, received: Received) -> None:
        """The request has ended, well or not."""

    def failed(self, error: Exception) -> None:
        """The script raised an error."""


class Channel(Protocol):
    """The connection, as an exchange needs it."""

    writable: bool

    def head(self, head: Head, *, stays_open: bool) -> bytes:
        """A head as bytes."""

    def write(self, data: bytes) -> None:
        """Send these bytes now."""

    def close_idle(self, after_s: float) -> None:
        """Close after that time, if no request comes in between."""

    def close(self) -> None:
        """Close when all is sent."""

    def reset(self) -> None:
        """Close now, with a TCP reset."""

    def exchange_over(self) -> None:
        """The answer was played to its end."""


class Exchange:
    """One request and the steps of its answer."""

    def __init__(self, owner: Owner, channel: Channel, received: Received, steps: Steps) -> None:
        self._owner = owner
        self._channel = channel
        self._received = received
        self._steps = steps
        self._ticket: Ticket | None = None
        self._timer: asyncio.Handle | None = None
        self._silent = False
        self._ended = False
        self._chunked = False
        self._closes = False
        self._head = b""
        """Kept back to leave together with what follows it."""

    def advance(self) -> None:
        """Play steps until one has to wait."""
        if self._is_waiting():
            return
        try:
            # Not a `for`: a step may put other steps in place of the rest.
            while (step := next(self._steps, None)) is not None:
                if not self._play(step):
                    self._flush()
                    return
        except Exception as error:
            # The border of a request: functions of a script may raise anything.
            self._owner.failed(error)
            self._channel.reset()
            return
        self._flush()
        if self._closes:
            self._channel.close()
        else:
            self._channel.exchange_over()

    def drop(self, *, aborted: bool) -> None:
        """Give up: nothing more is sent."""
        if self._timer is not None:
            self._timer.cancel()
        self._steps = iter(())
        if not self._ended:
            self._received.aborted = aborted
            self._end()

    def _is_waiting(self) -> bool:
        return (
            self._timer is not None
            or self._silent
            or (self._ticket is not None and not self._ticket.holds_slot and not self._ended)
            or self._owner.frozen
            or not self._channel.writable
        )

    def _play(self, step: Step) -> bool:
        """Do it. False: stop here for now."""
        match step:
            case Part():
                self._send_part(step)
                return self._channel.writable
            case Head():
                self._send_head(step)
            case Wait():
                self._wait(step.seconds)
                return False
            case TakeSlot():
                return self._take_slot(step)
            case End():
                self._flush(b"0\r\n\r\n" if self._chunked else b"")
                self._received.finished = True
                self._end()
            case Raw():
                self._flush(step.data)
            case TrickledHead():
                self._trickle(step)
            case CloseIdle():
                self._channel.close_idle(step.after_s)
            case Cut():
                return self._cut(step)
        return True

    def _send_head(self, head: Head) -> None:
        self._flush()
        self._chunked = head.length is None
        self._closes = head.closes or not self._received.keep_alive
        self._received.status = head.status
        self._head = self._channel.head(head, stays_open=not self._closes)

    def _send_part(self, part: Part) -> None:
        if self._received.method != "HEAD":
            self._flush(b"%x\r\n%s\r\n" % (len(part.data), part.data) if self._chunked else part.data)
        self._received.tokens_sent += part.is_token
        self._owner.moved()

    def _flush(self, data: bytes = b"") -> None:
        if self._head or data:
            self._channel.write(self._head + data)
            self._head = b""

    def _trickle(self, step: TrickledHead) -> None:
        self._send_head(step.head)
        rendered, self._head = self._head, b""
        self._steps = chain(_trickled(rendered, step.byte_s), self._steps)

    def _wait(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, self._wake) if seconds > 0 else loop.call_soon(self._wake)

    def _wake(self) -> None:
        self._timer = None
        self.advance()

    def _take_slot(self, wish: TakeSlot) -> bool:
        ticket = self._owner.take(wish, self._on_slot)
        if ticket is None:
            busy = {"error": "server busy, please try again.  maximum pending requests exceeded"}
            self._steps = document(503, busy)
            return True
        self._ticket = ticket
        self._owner.moved()
        return ticket.holds_slot

    def _on_slot(self) -> None:
        # In a turn of its own: answers without delay would else nest as deep as the line is long.
        if self._ticket is not None:
            self._wait(0)
            self._owner.moved()

    def _cut(self, cut: Cut) -> bool:
        self._flush()
        match cut:
            case Cut.RESET:
                self._channel.reset()
            case Cut.CLOSE:
                self._channel.close()
            case Cut.SILENCE:
                self._silent = True
        return False

    def _end(self) -> None:
        self._ended = True
        if self._ticket is not None:
            self._owner.leave(self._ticket)
        self._owner.over(self._received)


def _trickled(data: bytes, byte_s: float) -> Steps:
    for index in range(len(data)):
        yield Raw(data[index : index + 1])
        yield Wait(byte_s)
