"""
Requests on their way to a node and back: attempts, retries, and the time limits of what was sent.

One `Run` for each request is the call that the client side holds and the reply that the node talks to. Who finds every
slot taken waits outside, in `gateway.admitted`; here wait only those that were sent once already and have to go to
another node. They go first.

No timer is set for a request: `sweep`, four times a second, looks at all of them.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from sutazai.core.errors import (
    NodeFault,
    NodeTimeout,
    NoHealthyNode,
    Overloaded,
    SutazaiError,
    UnknownModel,
)
from sutazai.core.node import Health, NodeState
from sutazai.core.request import Head, Request, Usage
from sutazai.gateway.experience import Lease
from sutazai.gateway.fleet import Fleet
from sutazai.policy.health import Outcome, outcome_of
from sutazai.policy.nearest import nearest
from sutazai.policy.retry import RetryBudget, RetryRules, is_retryable, pause_s
from sutazai.ports.inference import Call, Reply

log = structlog.get_logger("sutazai.routed")

SWEEP_S = 0.25
MOST_RETRIES_WAITING = 1024
"""Further ones are not tried again. The retry budget lets so many come together only in a pool that is ill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long things may take, in seconds."""

    first_token_s: float
    idle_s: float
    total_s: float
    max_wait_s: float
    """For a slot, where it must be tried again."""


class Stage(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"
    """For a slot, to be tried again."""
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
    """Sends requests to the nodes of the fleet."""

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
        self._line: dict[Run, None] = {}
        """Those of them that wait to be tried again, in the order in which they began to."""
        self._begun = 0
        self._serving_line = False
        self._room_again = False
        self._on_room: Callable[[], None] = _nothing
        self._on_end: Callable[[Run, Usage | None], None] = _nothing_ended
        fleet.listen(on_room=self.serve)

    def listen(self, *, on_room: Callable[[], None], on_end: Callable[[Run, Usage | None], None]) -> None:
        """Hear of room that no retry took, and of each request that ended, before its slot is given away again."""
        self._on_room = on_room
        self._on_end = on_end

    def try_start(self, request: Request, reply: Reply) -> Call | None:
        """
        Send a request that just arrived; failures go to `reply.fail`.

        Returns:
            None when no node has room for it now and one may have later; nothing was told to the reply then.
        """
        now = request.arrived_at
        state = self.fleet.choose(request, (), now)
        if state is not None:
            run = self.enter(request, reply)
            run.send(state, now)
            return run
        refusal = self.refusal(request.model)
        if refusal is None:
            return None
        run = self.enter(request, reply)
        run.fail(refusal)
        return run

    def enter(self, request: Request, reply: Reply) -> Run:
        """A run that its caller sends at once."""
        run = Run(self, request, reply)
        self.runs[run] = None
        self._begun += 1
        return run

    def adopt(self, *, patience: Patience, retry: RetryRules) -> None:
        """New settings, for requests under way too."""
        self.patience = patience
        self.retry = retry
        self.budget = RetryBudget(retry)
        self.serve()  # nodes may be given more at once now

    @property
    def waiting(self) -> int:
        """Requests that wait to be tried again."""
        return len(self._line)

    def hold(self, run: Run) -> None:
        """No node has room: let the request wait for the next attempt, or fail it where that is of no use."""
        refusal = self.refusal(run.request.model)
        if refusal is None and len(self._line) >= MOST_RETRIES_WAITING:
            refusal = Overloaded("Too many requests wait to be tried again; come back later.", retry_after_s=5)
        if refusal is not None:
            run.fail(refusal)
            return
        run.stage = Stage.WAITING
        run.since = self.fleet.clock()
        self._line[run] = None
        self._room_again = True  # where the line is being served, this one is to be looked at too

    def serve(self) -> None:
        """Hand those who wait, retries first, to whatever has room for them."""
        if self._line:
            self._serve_line()
        self._on_room()

    def _serve_line(self) -> None:
        self._room_again = True
        if self._serving_line:
            return  # an attempt that fails at once frees its slot and calls this again: one more turn below
        self._serving_line = True
        try:
            while self._line and self._room_again:
                self._room_again = False
                for run in list(self._line):
                    if run.stage is Stage.WAITING:
                        self._try(run)
        finally:
            self._serving_line = False

    def _try(self, run: Run) -> None:
        now = self.fleet.clock()
        state = self.fleet.choose(run.request, run.tried, now)
        if state is not None:
            del self._line[run]
            run.send(state, now)
        elif (refusal := self.refusal(run.request.model)) is not None:
            run.fail(refusal)

    def refusal(self, model: str) -> SutazaiError | None:
        """Why it is no use to wait for a node with this model; None where one is up."""
        candidates = self.fleet.candidates(model)
        if not candidates:
            if any(state.health is Health.UP for state in self.fleet.states()):
                return UnknownModel(model, nearest(model, self.fleet.models()))
            candidates = self.fleet.states()  # with nobody up, nobody knows what there is
        if all(state.health is not Health.UP for state in candidates):
            return _all_down(model, candidates)
        return None

    def leave(self, run: Run, usage: Usage | None) -> None:
        """The run ended. For `Run` alone."""
        self.runs.pop(run, None)
        if run.stage is Stage.WAITING:
            del self._line[run]
        if run.attempts:
            self._on_end(run, usage)

    def sweep(self) -> None:
        """Enforce the time limits."""
        now = self.fleet.clock()
        self.budget.note_requests(self._begun, now)
        self._begun = 0
        for run in list(self.runs):
            run.check(now, self.patience)
        self.serve()  # failures fade with time alone

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
    estimated = 0.0
    """What its tenant was charged for its input when it was let in, in weighted tokens. Of the stage that asked to
    hear of its end, as are:"""
    charged = 0.0
    """All that its tenant was charged so far."""
    forgiven = False
    """Some of that was not counted, because nobody waited then."""
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
        state = self._routed.fleet.choose(self.request, self.tried, now)
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
        lease = self._lease = fleet.lease(state, self.request, now)
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

    # Reply

    def head(self, head: Head) -> None:
        lease = self._lease
        if lease is None:
            return
        self.stage = ANSWERING
        head.reason = self._reason(lease.state)
        self._reply.head(head)

    def chunk(self, data: bytes) -> None:
        lease = self._lease
        if lease is None:
            return  # ended from the outside within the node's own `start`
        self.since = self._routed.fleet.clock()
        if not self.chunks:
            lease.answered(self.since)  # not with the head: vLLM sends that before it has begun
        self.chunks += 1
        self._reply.chunk(data)

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        lease = self._lease
        if lease is None:
            return
        head.reason = self._reason(lease.state)
        lease.answered(self._routed.fleet.clock())
        self._finish(usage)
        self._settle(Outcome.GOOD)
        self._reply.whole(head, body, usage)

    def end(self, usage: Usage | None) -> None:
        if self._lease is not None:
            self._finish(usage)
            self._settle(Outcome.GOOD)
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
        elif 0.0 < self.request.deadline_at < now:
            given_s = self.request.deadline_at - self.request.arrived_at
            message = f"The answer was not complete at the deadline of the request, {given_s:.3g} s after it came."
            self._drop(Outcome.NEITHER, NodeTimeout(message, node=self.node))
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
        self._finish(None)
        self._settle(outcome, why)
        if error is not None:
            self._reply.fail(error)

    def _finish(self, usage: Usage | None) -> None:
        """Count the request as ended; then the lease may end, and with it the slot go to somebody else."""
        self._routed.leave(self, usage)
        self.stage = DONE

    def _settle(self, outcome: Outcome, why: str = "") -> None:
        """End the lease, where there is one."""
        lease, self._lease = self._lease, None
        self._call = None
        if lease is not None:
            lease.end(outcome, why)

    def _reason(self, state: NodeState) -> str:
        again = f"; attempt {self.attempts}" if self.attempts > 1 else ""
        return self._routed.fleet.why(state, self.request) + again


def _nothing() -> None:
    return


def _nothing_ended(_run: Run, _usage: Usage | None) -> None:
    return


def _all_down(model: str, candidates: Sequence[NodeState]) -> NoHealthyNode:
    if not candidates:
        return NoHealthyNode("The pool has no node. `sutazai doctor` says how to add one.", retry_after_s=5)
    names = "; ".join(f"{state.node.name}: {state.last_error or 'not probed yet'}" for state in candidates)
    return NoHealthyNode(f"No node that could have {model[:200]!r} is up. {names}", retry_after_s=5)
