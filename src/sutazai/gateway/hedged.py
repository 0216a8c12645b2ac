"""
The stage that asks a second node what the first is slow to answer: embeddings, which cost little.

The first answer counts and the other call is cancelled. The second is not a retry: it goes only to a node that has
room now, at most for one request in twenty, and never for one that still waits in line itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from sutazai.core.errors import SutazaiError
from sutazai.core.request import Head, Operation, Request, Usage
from sutazai.policy.hedging import HedgeBudget, HedgeRules, RecentTimes
from sutazai.ports.inference import Call, Inference, Reply


class Timer(Protocol):
    """Something that will be called later."""

    def cancel(self) -> None:
        """Call it not."""


class Hedged:
    """Lets slow embeddings be answered by whoever is faster."""

    def __init__(
        self,
        inner: Inference,
        spare: Callable[[Request, Reply], Call | None],
        rules: HedgeRules,
        *,
        node_of: Callable[[str], str],
        later: Callable[[float, Callable[[], None]], Timer],
        clock: Callable[[], float],
    ) -> None:
        """
        Make the stage.

        Args:
            spare: begins to answer only if a node has room now; None, without a word to the reply, if none has.
            node_of: the node that has the request of this id now; empty while none has.
            later: the event loop's `call_later`: calls after so many seconds.
            clock: monotonic seconds.
        """
        self.inner = inner
        self.spare = spare
        self.rules = rules
        self.node_of = node_of
        self.later = later
        self.clock = clock
        self.budget = HedgeBudget()
        self._times: dict[str, RecentTimes] = {}
        self.hedged = 0
        """Requests that were asked twice."""
        self.won = 0
        """Of these, answered by the second node."""
        self.denied = 0
        """Requests that were slow enough, but came when one in twenty had been asked twice already."""

    def start(self, request: Request, reply: Reply) -> Call:
        rules = self.rules
        if not rules.embeddings or request.endpoint.operation is not Operation.EMBEDDING or request.loads_only:
            return self.inner.start(request, reply)
        self.budget.note_request()
        race = Race(self, request, reply)
        race.begin(self.usual_s(request.model))
        return race

    def adopt(self, rules: HedgeRules) -> None:
        """New settings, for requests that begin from now on."""
        self.rules = rules

    def usual_s(self, model: str) -> float | None:
        """How long most answers of the model take to begin; None while too few are known."""
        times = self._times.get(model)
        return times.quantile(self.rules.after_quantile) if times is not None else None

    def note(self, model: str, time_s: float) -> None:
        """An answer began. For `Race` alone."""
        times = self._times.get(model)
        if times is None:
            times = self._times[model] = RecentTimes()
        times.note(time_s)


class Race:
    """One request, asked once or twice: the `Call` of its client."""

    # what every one begins with
    _error: SutazaiError | None = None
    _over = False
    _paused = False
    _second: Side | None = None
    _timer: Timer | None = None
    _winner: Side | None = None

    def __init__(self, stage: Hedged, request: Request, reply: Reply) -> None:
        self.reply = reply
        self._stage = stage
        self._request = request
        self._began_at = stage.clock()
        self._first = Side(self)

    def begin(self, usual_s: float | None) -> None:
        """Ask, and ask again if no answer began after the usual time."""
        self._first.run(self._stage.inner.start(self._request, self._first))
        if usual_s is not None and not self._over and self._winner is None:
            self._timer = self._stage.later(usual_s, self._ask_again)

    def _ask_again(self) -> None:
        self._timer = None
        stage, request = self._stage, self._request
        node = stage.node_of(request.id)
        if not node:
            return  # it waits in line: another like it would only make the line longer
        if not stage.budget.has_room:
            stage.denied += 1
            return
        side = self._second = Side(self)
        again = replace(request, id=f"{request.id}.h1", avoid=node, arrived_at=stage.clock())
        call = stage.spare(again, side)
        if call is None:
            self._second = None
            return
        stage.budget.take()
        stage.hedged += 1
        side.run(call)

    # Call

    def cancel(self) -> None:
        if not self._over:
            self._close()

    def pause(self) -> None:
        self._paused = True
        for side in self._sides():
            side.pause()

    def resume(self) -> None:
        self._paused = False
        for side in self._sides():
            side.resume()

    # what a side tells

    @property
    def is_paused(self) -> bool:
        """Whether the client reads nothing now."""
        return self._paused

    def is_won_by(self, side: Side) -> bool:
        """Whether what this side says counts. The first to say anything but an error has won."""
        if self._over:
            return False
        if self._winner is None:
            self._winner = side
            self._began()
        # the slot of the loser may have gone to a request whose answer made this client leave
        return self._winner is side and not self._over

    def ended(self) -> None:
        """The winner's answer is complete."""
        self._over = True

    def lost(self, side: Side, error: SutazaiError) -> None:
        """A side failed: the end, unless the other may still answer. Of two errors that of the first node is told."""
        if self._over or (self._winner is not None and self._winner is not side):
            return
        if side is self._first:
            self._error = error
        if any(other is not side and not other.is_over for other in self._sides()):
            return
        self._close()
        self.reply.fail(error if self._winner is side else self._error or error)

    # parts

    def _began(self) -> None:
        stage = self._stage
        stage.note(self._request.model, stage.clock() - self._began_at)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._winner is self._second:
            stage.won += 1
        for side in self._sides():
            if side is not self._winner:
                side.cancel()

    def _close(self) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for side in self._sides():
            side.cancel()

    def _sides(self) -> tuple[Side, ...]:
        return (self._first,) if self._second is None else (self._first, self._second)


class Side:
    """One of the two calls: a `Reply` that is heard as long as it may win."""

    # what every one begins with
    _call: Call | None = None
    is_over = False

    def __init__(self, race: Race) -> None:
        self._race = race

    def run(self, call: Call) -> None:
        """It was started, and perhaps is over already."""
        if self.is_over:
            call.cancel()
            return
        self._call = call
        if self._race.is_paused:
            call.pause()

    def cancel(self) -> None:
        """End it; nothing it says counts any more."""
        self.is_over = True
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def pause(self) -> None:
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        if self._call is not None:
            self._call.resume()

    # Reply

    def head(self, head: Head) -> None:
        if self._race.is_won_by(self):
            self._race.reply.head(head)

    def chunk(self, data: bytes) -> None:
        if self._race.is_won_by(self):
            self._race.reply.chunk(data)

    def end(self, usage: Usage | None) -> None:
        if self._race.is_won_by(self):
            self._finish()
            self._race.reply.end(usage)

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        if self._race.is_won_by(self):
            self._finish()
            self._race.reply.whole(head, body, usage)

    def fail(self, error: SutazaiError) -> None:
        if not self.is_over:
            self.is_over = True
            self._call = None
            self._race.lost(self, error)

    def _finish(self) -> None:
        self.is_over = True
        self._call = None
        self._race.ended()
