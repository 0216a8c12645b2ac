"""
The stage that asks once for all who ask the same at the same time.

The first equal request begins a `Flight`; others join it while it goes on and get what was said so far, then each
part as it comes. Each is a `Listener`: it may leave, or read slowly, without the others noticing. The flight ends with
its answer or when the last listener has left.
"""

from __future__ import annotations

from collections import deque

from sutazai.core.errors import FellBehind, SutazaiError
from sutazai.core.request import Head, Request, Usage
from sutazai.policy.cacheability import directives_in
from sutazai.ports.inference import Call, Inference, Reply

JOINABLE_BYTES = 4 * 1024 * 1024
"""An answer that has grown larger is kept for nobody who might still come."""
BEHIND_BYTES = 1024 * 1024
"""What is kept for one listener that does not read while others do."""


class Coalesced:
    """An `Inference` in which equal requests share one upstream call."""

    def __init__(self, inner: Inference) -> None:
        self._inner = inner
        self._flights: dict[bytes, Flight] = {}
        self.coalesced = 0
        """Requests that joined another."""

    @property
    def flights(self) -> int:
        """Answers under way that may be joined."""
        return len(self._flights)

    def start(self, request: Request, reply: Reply) -> Call:
        fingerprint = request.fingerprint
        if not fingerprint or (request.cache_control and not directives_in(request.cache_control).may_be_shared):
            return self._inner.start(request, reply)
        flight = self._flights.get(fingerprint)
        if flight is not None and flight.suits(request):
            self.coalesced += 1
            return flight.join(reply)
        flight = self._flights[fingerprint] = Flight(self, request)
        return flight.begin(self._inner, reply)

    def close_to_others(self, flight: Flight) -> None:
        """Nobody joins this one any more. For `Flight` alone."""
        fingerprint = flight.request.fingerprint
        if self._flights.get(fingerprint) is flight:
            del self._flights[fingerprint]


class Flight:
    """One upstream call, and all who listen to it."""

    _call: Call | None = None
    _head: Head | None = None
    is_paused = False
    """Nobody reads, so the node is not read either."""
    _is_over = False
    _is_joinable = True
    _size_bytes = 0

    def __init__(self, coalesced: Coalesced, request: Request) -> None:
        self._coalesced = coalesced
        self.request = request
        self._listeners: list[Listener] = []
        """Those still there, oldest first."""
        self._parts: list[bytes] = []
        """What was said so far, for those who join."""

    def suits(self, request: Request) -> bool:
        """Whether it will come as soon and last as long as this request, with its own urgency, could expect."""
        mine = self.request
        lasts = not mine.deadline_at or 0.0 < request.deadline_at <= mine.deadline_at
        return lasts and mine.priority <= request.priority

    def begin(self, inner: Inference, reply: Reply) -> Listener:
        """Ask, for this first listener."""
        listener = Listener(self, reply)
        self._listeners.append(listener)
        call = inner.start(self.request, self)
        if self._is_over:
            call.cancel()  # everybody left before there was anything to cancel
        else:
            self._call = call
            if self.is_paused:
                call.pause()
        return listener

    def join(self, reply: Reply) -> Listener:
        """Let one more listen, from the beginning."""
        listener = Listener(self, reply)
        self._listeners.append(listener)
        if self._head is not None:
            if len(self._parts) > 1:  # one write for whoever joins, instead of one for each token
                self._parts = [b"".join(self._parts)]
            listener.catch_up(_for_others(self._head), self._parts)
        self.balance()
        return listener

    def leave(self, listener: Listener) -> None:
        """One listens no more; the last one ends the call."""
        self._listeners.remove(listener)
        if self._is_over:
            return
        if self._listeners:
            self.balance()
            return
        self._finish()
        if self._call is not None:
            self._call.cancel()

    def balance(self) -> None:
        """Read on while anybody reads, and no more while nobody does."""
        is_paused = all(listener.is_paused for listener in self._listeners)
        if self._is_over or is_paused is self.is_paused:
            return
        self.is_paused = is_paused
        if self._call is not None:
            (self._call.pause if is_paused else self._call.resume)()

    # Reply

    def head(self, head: Head) -> None:
        if self._is_over:
            return
        # stages further out write their own lines into the one they get
        self._head = _for_others(head)
        for listener, own in self._with_heads(head):
            listener.head(own)

    def chunk(self, data: bytes) -> None:
        if self._is_over:
            return
        if self._is_joinable:
            self._note(data)
        for listener in tuple(self._listeners):
            listener.chunk(data)

    def end(self, usage: Usage | None) -> None:
        for number, listener in enumerate(self._all_at_the_end()):
            listener.end(Usage() if number else usage)  # the tokens were taken once

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        for number, (listener, own) in enumerate(self._with_heads(head, self._all_at_the_end())):
            listener.whole(own, body, Usage() if number else usage)

    def fail(self, error: SutazaiError) -> None:
        for listener in self._all_at_the_end():
            listener.fail(error)

    # parts

    def _note(self, data: bytes) -> None:
        self._parts.append(data)
        self._size_bytes += len(data)
        if self._size_bytes > JOINABLE_BYTES:
            self._is_joinable = False
            self._parts = []
            self._coalesced.close_to_others(self)

    def _with_heads(self, head: Head, listeners: tuple[Listener, ...] | None = None) -> list[tuple[Listener, Head]]:
        """Each listener with a head of its own: the oldest is the one who asked, the others joined."""
        present = tuple(self._listeners) if listeners is None else listeners
        return [(listener, _for_others(head) if number else head) for number, listener in enumerate(present)]

    def _all_at_the_end(self) -> tuple[Listener, ...]:
        if self._is_over:
            return ()
        self._finish()
        return tuple(self._listeners)

    def _finish(self) -> None:
        self._is_over = True
        self._parts = []
        self._coalesced.close_to_others(self)


class Listener:
    """One of those who share an answer: the call that its client holds."""

    is_paused = False
    _is_done = False
    _behind: deque[bytes] | None = None
    """What came while it did not read, oldest first; None where nothing did."""
    _behind_bytes = 0
    _ending: SutazaiError | Usage | None = None
    _has_ending = False

    def __init__(self, flight: Flight, reply: Reply) -> None:
        self._flight = flight
        self._reply = reply

    # Call

    def cancel(self) -> None:
        if not self._is_done:
            self._done()

    def pause(self) -> None:
        self.is_paused = True
        self._flight.balance()

    def resume(self) -> None:
        self.is_paused = False
        self._flush()
        self._flight.balance()

    # for the flight

    def catch_up(self, head: Head, parts: list[bytes]) -> None:
        """Hear what the others have heard."""
        self._behind = deque(parts)
        self._reply.head(head)
        self._flush()

    def head(self, head: Head) -> None:
        """The answer begins."""
        if not self._is_done:
            self._reply.head(head)

    def chunk(self, data: bytes) -> None:
        """One part; kept where the client does not read."""
        if self._is_done:
            return
        if not self.is_paused and not self._behind:
            self._reply.chunk(data)
            return
        if self._behind is None:
            self._behind = deque()
        self._behind.append(data)
        self._behind_bytes += len(data)
        if self._behind_bytes > BEHIND_BYTES and not self._flight.is_paused:
            self._fall_behind()  # else nobody is ahead: it is the little that had been read from the node already

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        """All of it at once."""
        if not self._is_done:
            self._done()
            self._reply.whole(head, body, usage)

    def end(self, usage: Usage | None) -> None:
        """The answer is complete; told once all parts were."""
        self._end_with(usage)

    def fail(self, error: SutazaiError) -> None:
        """The answer broke off; told once all parts were."""
        self._end_with(error)

    # parts

    def _end_with(self, ending: SutazaiError | Usage | None) -> None:
        if not self._is_done:
            self._ending, self._has_ending = ending, True
            if not self._behind:
                self._tell_end()

    def _flush(self) -> None:
        behind = self._behind
        while behind and not self.is_paused and not self._is_done:
            data = behind.popleft()
            self._behind_bytes = max(0, self._behind_bytes - len(data))  # what a late joiner missed was not counted
            self._reply.chunk(data)
        if self._has_ending and not behind and not self._is_done:
            self._tell_end()

    def _tell_end(self) -> None:
        self._done()
        ending = self._ending
        if isinstance(ending, SutazaiError):
            self._reply.fail(ending)
        else:
            self._reply.end(ending)

    def _fall_behind(self) -> None:
        self._done()
        self._reply.fail(
            FellBehind(
                f"More than {BEHIND_BYTES} bytes of an answer shared with others were not read in time; ask again, "
                "or read faster."
            )
        )

    def _done(self) -> None:
        self._is_done = True
        self._behind = None
        self._flight.leave(self)


def _for_others(head: Head) -> Head:
    """The head for those who joined: its further lines tell of the way of the first."""
    return Head(head.status, head.content_type, head.length, head.node, head.reason, b"coalesced")
