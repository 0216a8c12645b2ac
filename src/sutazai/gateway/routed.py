"""
The innermost stage: choose a node, hand the request on, try another while nothing was said to the client.

One `Run` for each request is the call that the client side holds and the reply that the node talks to. A request that
finds every slot taken waits in line, in order of arrival; a slot that frees serves the first in line that it can.

No timer is set for a request: `sweep`, four times a second, looks at all of them.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from sutazai.core.errors import (
    Cancelled,
    NodeFault,
    NodeTimeout,
    NoHealthyNode,
    Overloaded,
    SutazaiError,
    UnknownModel,
)
from sutazai.core.node import Health, NodeState
from sutazai.core.request import Head, Request, Usage
from sutazai.gateway.fleet import Fleet, Lease
from sutazai.policy.health import Outcome, outcome_of
from sutazai.policy.nearest import nearest
from sutazai.policy.retry import RetryBudget, RetryRules, is_retryable, pause_s
from sutazai.policy.routing import is_warm, pick
from sutazai.ports.inference import Call, Reply

log = structlog.get_logger("sutazai.routed")

SWEEP_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long things may take, in seconds."""

    first_token_s: float
    idle_s: float
    total_s: float
    max_wait_s: float
    max_waiting: int
    """A count: requests in line."""


class Stage(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"
    """In line for a slot."""
    PAUSING = "pausing"
    """Between two attempts."""
    SENT = "sent"
    """At a node, nothing heard yet."""
    ANSWERING = "answering"
    DONE = "done"


# an enum's member costs a look-up in its class each time
SENT, ANSWERING, DONE = Stage.SENT, Stage.ANSWERING, Stage.DONE


class Timer(Protocol):
    """Something that will be called later."""

    def cancel(self) -> None:
        """Call it not."""


class Routed:
    """Answers requests from the fleet."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        patience: Patience,
        retry: RetryRules,
        random: Callable[[], float],
        later: Callable[[float, Callable[[], None]], Timer],
        on_fault: Callable[[str, str, SutazaiError], None],
    ) -> None:
        """
        Make the stage.

        Args:
            random: uniform in [0, 1).
            later: the event loop's `call_later`: calls after so many seconds.
            on_fault: told of every failed attempt: node, model, error.
        """
        self.fleet = fleet
        self.patience = patience
        self.retry = retry
        self.random = random
        self.later = later
        self.on_fault = on_fault
        self.budget = RetryBudget(retry)
        self.runs: dict[Run, None] = {}
        """Requests that have not ended, oldest first."""
        self._line: deque[Run] = deque()
        self._begun = 0
        self._serving_line = False
        self._room_again = False
        fleet.listen(on_room=self.serve_line)

    def start(self, request: Request, reply: Reply) -> Call:
        run = Run(self, request, reply)
        self.runs[run] = None
        self._begun += 1
        if self._line and self._is_waited_for(request.model):
            self._wait(run)
        else:
            run.advance(request.arrived_at)
        return run

    def adopt(self, *, patience: Patience, retry: RetryRules) -> None:
        """New settings, for requests under way too."""
        self.patience = patience
        self.retry = retry
        self.budget = RetryBudget(retry)
        self.serve_line()  # nodes may be given more at once now

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    def position(self, run: Run) -> int:
        """Place in line, from 1; 0 for one that is not in line."""
        return self._line.index(run) + 1 if run.stage is Stage.WAITING else 0

    def choose(self, run: Run, now: float) -> NodeState | None:
        """The node for the next attempt; None where none has room."""
        fleet, model = self.fleet, run.request.model
        return pick(fleet.candidates(model), model, now=now, rules=fleet.rules, random=self.random, tried=run.tried)

    def hold(self, run: Run) -> None:
        """No node has room: let the request wait, or fail it where that is of no use."""
        refusal = self._refusal(run.request.model)
        if refusal is None:
            self._wait(run)
        else:
            run.fail(refusal)

    def serve_line(self) -> None:
        """Hand waiting requests, oldest first, to whatever has room for them."""
        if not self._line:
            return
        self._room_again = True
        if self._serving_line:
            return  # an attempt that fails at once frees its slot and calls this again: one more turn below
        self._serving_line = True
        try:
            while self._line and self._room_again:
                self._room_again = False
                self._serve_once()
        finally:
            self._serving_line = False

    def _serve_once(self) -> None:
        full: set[str] = set()
        for run in list(self._line):
            if run.request.model in full or run.stage is not Stage.WAITING or self._try(run):
                continue
            if not run.tried:  # others may still go where this one has been
                full.add(run.request.model)

    def _try(self, run: Run) -> bool:
        """Serve one waiting request; False when nothing has room for its model."""
        now = self.fleet.clock()
        state = self.choose(run, now)
        if state is not None:
            self._line.remove(run)
            run.send(state, now)
            return True
        refusal = self._refusal(run.request.model)
        if refusal is not None:
            run.fail(refusal)
        return refusal is not None

    def _refusal(self, model: str) -> SutazaiError | None:
        """Why it is no use to wait for a node with this model; None where one is up."""
        candidates = self.fleet.candidates(model)
        if not candidates:
            if any(state.health is Health.UP for state in self.fleet.states()):
                return UnknownModel(model, nearest(model, self.fleet.models()))
            candidates = self.fleet.states()  # with nobody up, nobody knows what there is
        if all(state.health is not Health.UP for state in candidates):
            return _all_down(model, candidates)
        return None

    def _wait(self, run: Run) -> None:
        if len(self._line) >= self.patience.max_waiting:
            run.fail(Overloaded(f"{len(self._line)} requests are waiting already; come back later.", retry_after_s=5))
            return
        run.stage = Stage.WAITING
        run.since = self.fleet.clock()
        self._line.append(run)
        self._room_again = True  # where the line is being served, this one is to be looked at too

    def _is_waited_for(self, model: str) -> bool:
        return any(run.request.model == model for run in self._line)

    def leave(self, run: Run) -> None:
        """The run ended. For `Run` alone."""
        self.runs.pop(run, None)
        if run.stage is Stage.WAITING:
            self._line.remove(run)

    def sweep(self) -> None:
        """Enforce the time limits."""
        now = self.fleet.clock()
        self.budget.note_requests(self._begun, now)
        self._begun = 0
        for run in list(self.runs):
            run.check(now, self.patience)
        self.serve_line()  # failures fade with time alone

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                self.sweep()
            except Exception:  # the border of one turn
                log.exception("sweep failed")


class Run:
    """One request on its way: `Call` to the client side, `Reply` to the node."""

    # what every request begins with
    _call: Call | None = None
    _lease: Lease | None = None
    _paused = False
    _pausing: Timer | None = None
    stage = Stage.PAUSING
    chunks = 0
    attempts = 0
    tried: tuple[NodeState, ...] = ()

    def __init__(self, routed: Routed, request: Request, reply: Reply) -> None:
        self._routed = routed
        self._reply = reply
        self.request = request
        self.since = request.arrived_at
        """When the present stage began, or the last sign of life of an answer."""

    @property
    def node(self) -> str:
        """The node that has the request now; empty while none has."""
        return self._lease.state.node.name if self._lease is not None else ""

    def advance(self, now: float) -> None:
        """Choose a node and send; or wait, or fail."""
        state = self._routed.choose(self, now)
        if state is not None:
            self.send(state, now)
        else:
            self._routed.hold(self)

    def send(self, state: NodeState, now: float) -> None:
        """Hand the request to this node."""
        fleet = self._routed.fleet
        self.stage = SENT
        self.since = now
        self.attempts += 1
        lease = self._lease = fleet.lease(state)
        call = fleet.client(state.node.name).start(self.request, self)
        if self._lease is not lease:
            call.cancel()  # it is over already; where the client ended it meanwhile, the node does not know yet
            return
        self._call = call
        if self._paused:
            call.pause()

    def _try_again(self) -> None:
        self._pausing = None
        self.advance(self._routed.fleet.clock())

    # Call

    def cancel(self) -> None:
        """End the request without an answer: the client left."""
        self._drop(Outcome.NEITHER)

    def pause(self) -> None:
        self._paused = True
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        self._paused = False
        self.since = self._routed.fleet.clock()  # the silence was ours, not the node's
        if self._call is not None:
            self._call.resume()

    def end_by_operator(self) -> None:
        """End the request and tell the client."""
        self._drop(Outcome.NEITHER, Cancelled("An operator cancelled the request."))

    # Reply

    def head(self, head: Head) -> None:
        lease = self._lease
        if lease is None:
            return
        self.stage = ANSWERING
        head.reason = self._reason(lease.state)
        self._reply.head(head)

    def chunk(self, data: bytes) -> None:
        if self._lease is None:
            return  # ended from the outside within the node's own `start`
        self.since = self._routed.fleet.clock()
        self.chunks += 1
        self._reply.chunk(data)

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        lease = self._lease
        if lease is None:
            return
        head.reason = self._reason(lease.state)
        self._settle(Outcome.GOOD)
        self._finish()
        self._reply.whole(head, body, usage)

    def end(self, usage: Usage | None) -> None:
        if self._settle(Outcome.GOOD):
            self._finish()
            self._reply.end(usage)

    def fail(self, error: SutazaiError) -> None:
        if self.stage is Stage.DONE:
            return
        routed = self._routed
        lease = self._lease
        if lease is not None and isinstance(error, NodeFault):
            routed.on_fault(lease.state.node.name, self.request.model, error)
            self.tried = (*self.tried, lease.state)
        said_something = self.stage is Stage.ANSWERING
        if (
            lease is not None
            and not said_something
            and is_retryable(error)
            and self.attempts < routed.retry.attempts
            and routed.budget.take(routed.fleet.clock())
        ):
            self.stage = Stage.PAUSING
            self._settle(outcome_of(error), error.message)
            pause = pause_s(self.attempts, routed.retry, routed.random)
            self._pausing = routed.later(pause, self._try_again)
        else:
            self._drop(outcome_of(error), error)

    # parts

    def check(self, now: float, patience: Patience) -> None:
        """Whether a time limit has passed."""
        silent_s = now - self.since
        if now - self.request.arrived_at > patience.total_s:
            message = f"The answer was not complete after {patience.total_s:g} s."
            self._drop(Outcome.NEITHER, NodeTimeout(message, node=self.node))  # a long answer is no fault of the node
        elif self.stage is Stage.WAITING and silent_s > patience.max_wait_s:
            message = f"No slot became free within {patience.max_wait_s:g} s; come back later."
            self._drop(Outcome.NEITHER, Overloaded(message, retry_after_s=5))
        elif self.stage not in {Stage.SENT, Stage.ANSWERING} or self._paused:
            return
        elif not self.chunks and silent_s > patience.first_token_s:
            self._time_out(f"The node {self.node} gave no token within {patience.first_token_s:g} s")
        elif self.chunks and silent_s > patience.idle_s:
            self._time_out(f"The node {self.node} fell silent for {patience.idle_s:g} s")

    def _time_out(self, what: str) -> None:
        error = NodeTimeout(f"{what}.", node=self.node)
        if self._lease is not None:
            self._routed.on_fault(self.node, self.request.model, error)
        self._drop(Outcome.GONE, error)

    def _drop(self, outcome: Outcome, error: SutazaiError | None = None) -> None:
        """End in whatever stage this is; tell the client where there is something to tell."""
        if self.stage is Stage.DONE:
            return
        call, self._call = self._call, None
        if call is not None:
            call.cancel()
        if self._pausing is not None:
            self._pausing.cancel()
        why = error.message if error is not None else ""
        self._finish()
        self._settle(outcome, why)
        if error is not None:
            self._reply.fail(error)

    def _finish(self) -> None:
        self._routed.leave(self)
        self.stage = DONE

    def _settle(self, outcome: Outcome, why: str = "") -> bool:
        """End the lease; False where there is none, so the caller is late."""
        lease, self._lease = self._lease, None
        self._call = None
        if lease is None:
            return False
        lease.end(outcome, why)
        return True

    def _reason(self, state: NodeState) -> str:
        warmth = "warm" if is_warm(state, self.request.model) else "cold"
        again = f"; attempt {self.attempts}" if self.attempts > 1 else ""
        return f"{warmth}, least connections; {state.in_flight} of {state.slots} slots{again}"


def _all_down(model: str, candidates: Sequence[NodeState]) -> NoHealthyNode:
    if not candidates:
        return NoHealthyNode("The pool has no node. `sutazai doctor` says how to add one.", retry_after_s=5)
    names = "; ".join(f"{state.node.name}: {state.last_error or 'not probed yet'}" for state in candidates)
    return NoHealthyNode(f"No node that could have {model[:200]!r} is up. {names}", retry_after_s=5)
