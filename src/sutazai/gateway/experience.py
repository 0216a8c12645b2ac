"""
What the pool has learned of its nodes from the requests they were given.

A `Lease` is one request at one node; its first answer and its end are told here. From them come the breakers, the
slots of nodes whose settings do not name them, which model a node is loading, and who knows which conversation.
Most requests say nothing new: those cost a few comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sutazai.core.node import Health, LoadedModel, NodeState, Pace
from sutazai.core.request import Request
from sutazai.gateway.affinity import Affinity
from sutazai.policy.breaker import FASTEST_OUTLIER_S, Breaker, Breakers, Position, is_far_slower, left_alone
from sutazai.policy.concurrency import ConcurrencyLimit
from sutazai.policy.health import Outcome
from sutazai.policy.routing import RoutingRules

if TYPE_CHECKING:
    from sutazai.gateway.fleet import Fleet

UP = Health.UP
GOOD, NEITHER = Outcome.GOOD, Outcome.NEITHER
LATEST = ":latest"
RECENT, USUAL = 0.1, 0.005
"""What one time to the first answer adds to the two means of it."""
MOST_AT_ONCE = 10.0
"""No time counts for more than so many times the mean."""
FEWEST_PACES = 20
"""Answers that a node must have given before it can be called slower than usual."""


class BreakerView(NamedTuple):
    """How one breaker stands, for people."""

    node: str
    model: str
    position: Position
    error_ratio: float
    """Of the window, or where it is open, of what opened it."""
    slow_ratio: float
    opens_until: float
    """Monotonic seconds; 0.0 while it is closed."""


class Lease:
    """One slot of one node, held from the choice of the node to the end of the attempt."""

    # what nearly every lease ends with
    is_plain = True
    """Nothing but its slot is to be given back."""
    has_reason = False
    """More than load spoke for the node."""
    is_silent = True
    """Nothing was heard of it yet."""
    is_slow = False
    is_cold = False
    """The node does not have the model in memory."""
    loads = False
    """It is the one for which the node loads the model."""
    trial: Breaker | None = None
    """The breaker that it was let through to try."""
    _open = True

    def __init__(self, fleet: Fleet, state: NodeState, request: Request, now: float) -> None:
        self._fleet = fleet
        self.state = state
        self.request = request
        self.began_at = now
        state.in_flight += 1

    def answered(self, now: float) -> None:
        """The node began to answer. Only the first call counts."""
        if not self.is_silent:
            return
        self.is_silent = False
        took_s = now - self.began_at
        pace = self.state.paces.get(self.request.model)
        if not self.is_plain or took_s >= self._fleet.notable_s:
            self._fleet.answered(self, pace, took_s, now)
            if pace is not None:
                took_s = min(took_s, MOST_AT_ONCE * pace.recent_s + 0.1)  # a single long answer says little
        if self.is_cold:
            return
        if pace is None:
            self.state.paces[self.request.model] = Pace(took_s, took_s)
        else:
            pace.count += 1
            pace.recent_s += RECENT * (took_s - pace.recent_s)
            pace.usual_s += USUAL * (took_s - pace.usual_s)

    def end(self, outcome: Outcome, why: str = "") -> None:
        """Give the slot back and say how it went. Only the first call counts."""
        if self._open:
            self._open = False
            self.state.in_flight -= 1
            self._fleet.settled(self, outcome, why)


class Experience:
    """What is known beyond the states of the nodes, and what changes it."""

    def __init__(self, candidates: Callable[[str], Sequence[NodeState]]) -> None:
        """Begin without any; `candidates` gives the nodes that have a model."""
        self._candidates = candidates
        self.breakers = Breakers()
        self.affinity = Affinity()
        self.cold_leases = 0
        """Requests that were given to a node which had to load their model."""
        self._limits: dict[str, ConcurrencyLimit] = {}
        """Of adaptive nodes, by name."""
        self.because: dict[str, str] = {}
        """By the id of a request that is at a node now: what spoke for that one, where it was not its load alone."""

    def spared(
        self, candidates: Sequence[NodeState], model: str, now: float, rules: RoutingRules
    ) -> Sequence[NodeState]:
        """The candidates that are not left alone."""
        breakers = self.breakers.by_model.get(model)
        if breakers is None:
            return candidates
        up = [state.node.name for state in candidates if state.health is UP and not state.draining]
        alone = left_alone(breakers, up, now, rules.breaker)
        return [state for state in candidates if state.node.name not in alone] if alone else candidates

    def set_slots(self, state: NodeState, slots: int) -> None:
        """These are its slots; of an adaptive node they are found out instead, from now on if not yet."""
        name = state.node.name
        if not state.node.is_adaptive:
            self._limits.pop(name, None)
            state.slots = slots
        elif name not in self._limits:
            limit = self._limits[name] = ConcurrencyLimit()
            state.slots = limit.slots

    def forget(self, state: NodeState, now: float, rules: RoutingRules) -> None:
        """The node left."""
        self._limits.pop(state.node.name, None)
        self.breakers.tidy(now, rules.breaker, node=state.node.name, models=())

    # what leases tell

    def begun(self, lease: Lease, now: float) -> None:
        """A request was given to its node."""
        state, request = lease.state, lease.request
        if self.affinity.request is request:
            self._note_because(lease, self.affinity.given(request, state.node.name))
        if state.loaded is not None and request.model not in state.loaded:
            self._begin_load(lease)
        if self.breakers.by_model:
            lease.trial = self.breakers.begin_trial(request.model, state.node.name, now)
            if lease.trial is not None:
                lease.is_plain = False
                self._note_because(lease, "on trial, ")
        if state.node.is_adaptive:
            lease.is_plain = False
            if state.in_flight >= state.slots and (limit := self._limit_of(state)) is not None:
                limit.was_reached = True

    def answered(self, lease: Lease, pace: Pace | None, took_s: float, now: float, rules: RoutingRules) -> None:
        """A lease that is not plain, or late, began to be answered."""
        state = lease.state
        if lease.is_cold:
            self._end_load(lease)
        else:
            lease.is_slow = took_s > rules.breaker.slow_s
            lease.is_plain = lease.is_plain and not lease.is_slow
            if (limit := self._limit_of(state)) is not None:
                limit.answered(took_s)
                state.slots = limit.slots
            if pace is not None and pace.count >= FEWEST_PACES and took_s >= FASTEST_OUTLIER_S:
                self._look_for_slow_outlier(lease, pace, took_s, now, rules)
        if lease.trial is not None:
            self._end_trial(lease, lease.trial, now, rules, failed=lease.is_slow)

    def ended(self, lease: Lease, outcome: Outcome, now: float, rules: RoutingRules) -> None:
        """A lease ended that was not plain, or badly, or while there are breakers."""
        state, model = lease.state, lease.request.model
        failed = outcome is not GOOD and outcome is not NEITHER
        if lease.loads and lease.is_silent:
            state.loading = ""
        if lease.is_silent and not lease.is_cold:
            lease.is_slow = now - lease.began_at > rules.breaker.slow_s  # clients that gave up before say nothing
        if outcome in {Outcome.BUSY, Outcome.GONE} and (limit := self._limit_of(state)) is not None:
            limit.refused(now)
            state.slots = limit.slots
        if lease.trial is not None:
            is_open = outcome is NEITHER and not lease.is_slow
            self._end_trial(lease, lease.trial, now, rules, failed=failed or lease.is_slow, says_nothing=is_open)
        elif not state.draining and (failed or outcome is GOOD or lease.is_slow):
            self._count(model, state, outcome, now, rules, failed=failed, slow=lease.is_slow)

    # parts

    def _count(
        self,
        model: str,
        state: NodeState,
        outcome: Outcome,
        now: float,
        rules: RoutingRules,
        *,
        failed: bool,
        slow: bool,
    ) -> None:
        name = state.node.name
        if self.breakers.note(model, name, now, rules.breaker, failed=failed, slow=slow):
            if outcome is Outcome.SICK:
                state.penalty = 0.0  # the breaker took over, and other models need not suffer
        elif failed:
            others = [other.node.name for other in self._others(model, state)]
            if self.breakers.fails_far_more(model, name, others, now, rules.breaker):
                self.breakers.open(self.breakers.made(model, name), now, rules.breaker, is_outlier=True)

    def _end_trial(
        self,
        lease: Lease,
        trial: Breaker,
        now: float,
        rules: RoutingRules,
        *,
        failed: bool,
        says_nothing: bool = False,
    ) -> None:
        lease.trial = None
        if failed:
            self.breakers.open(trial, now, rules.breaker)
        elif says_nothing:
            trial.on_trial = False
        else:
            self.breakers.close(trial, lease.request.model, lease.state.node.name)

    def _look_for_slow_outlier(self, lease: Lease, pace: Pace, took_s: float, now: float, rules: RoutingRules) -> None:
        model, state = lease.request.model, lease.state
        others = (other.paces.get(model) for other in self._others(model, state))
        others_s = [other.recent_s for other in others if other is not None and other.count >= FEWEST_PACES]
        if lease.trial is not None:
            lease.is_slow = lease.is_slow or is_far_slower(took_s, pace.usual_s, others_s)
            pace.recent_s = took_s
        elif not state.draining and is_far_slower(pace.recent_s, pace.usual_s, others_s):
            breaker = self.breakers.made(model, state.node.name)
            if breaker.position(now) is Position.CLOSED:
                self.breakers.open(breaker, now, rules.breaker, is_outlier=True)

    def _others(self, model: str, than: NodeState) -> Sequence[NodeState]:
        """Other nodes that could have had a request for the model."""
        return [
            state
            for state in self._candidates(model)
            if state is not than and state.health is UP and not state.draining
        ]

    def _begin_load(self, lease: Lease) -> None:
        lease.is_cold = True
        lease.is_plain = False
        self.cold_leases += 1
        if not lease.state.loading:
            lease.loads = True
            lease.state.loading = lease.request.model

    def _end_load(self, lease: Lease) -> None:
        """The model is in memory, whatever else had to leave for it: the next probe tells."""
        state, model = lease.state, lease.request.model
        if lease.loads:
            state.loading = ""
        if state.loaded is not None:
            loaded = LoadedModel(name=model)
            state.loaded = {model.removesuffix(LATEST): loaded, model: loaded, **state.loaded}

    def _limit_of(self, state: NodeState) -> ConcurrencyLimit | None:
        """What was found out of an adaptive node."""
        return self._limits.get(state.node.name) if state.node.is_adaptive and not state.draining else None

    def _note_because(self, lease: Lease, because: str) -> None:
        if because:
            self.because[lease.request.id] = because
            lease.has_reason = True
