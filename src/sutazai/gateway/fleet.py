"""
The pool as it is now: nodes, their states, and leases on their slots.

All of it lives in memory and on one thread, so a decision and the counter it changes are one step. Nothing here does
I/O: `membership` brings reports, `routed` takes leases.

What fails is answered in three ways, from the quickest to the surest. A failed request is load at its node for a while
(a ghost, `policy.routing`): that needs no statistics. A model that keeps failing on a node, or is slow there, is left
alone there by its breaker (`policy.breaker`), and other models are not. A node that does not answer at all,
`failures_to_down` times in a row, is down until a probe succeeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from random import random as uniform

from sutazai.core.errors import SutazaiError
from sutazai.core.node import Health, LoadedModel, Node, NodeReport, NodeState, Pace
from sutazai.core.request import Request
from sutazai.gateway.affinity import FIRST_BLOCK
from sutazai.gateway.experience import LATEST, BreakerView, Experience, Lease
from sutazai.policy.breaker import FASTEST_OUTLIER_S, Position
from sutazai.policy.health import Outcome, health_after
from sutazai.policy.routing import Room, RoutingRules, is_warm, penalty_now, pick
from sutazai.ports.nodes import NodeClient

UP = Health.UP
GOOD, NEITHER = Outcome.GOOD, Outcome.NEITHER


class Fleet:
    """Every node of the pool, by name."""

    def __init__(
        self,
        rules: RoutingRules,
        *,
        failures_to_down: int,
        random: Callable[[], float] = uniform,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        An empty pool.

        Args:
            random: uniform in [0, 1).
        """
        self.rules = rules
        self.random = random
        self.failures_to_down = failures_to_down
        self.clock = clock
        self._states: dict[str, NodeState] = {}
        self._clients: dict[str, NodeClient] = {}
        self._by_model: dict[str, list[NodeState]] = {}
        self.experience = Experience(self.candidates)
        self._watched = self.experience.breakers.by_model
        """Empty while all is well."""
        self._affinity = self.experience.affinity
        self._on_room: Callable[[], None] = _nothing
        self._on_health: Callable[[NodeState, str], None] = _nothing_changed

    @property
    def rules(self) -> RoutingRules:
        """What the settings say about routing."""
        return self._rules

    @rules.setter
    def rules(self, rules: RoutingRules) -> None:
        self._rules = rules
        self.notable_s = min(rules.breaker.slow_s, FASTEST_OUTLIER_S)
        """Answers that began sooner say nothing against their node."""

    def listen(
        self,
        *,
        on_room: Callable[[], None] | None = None,
        on_health: Callable[[NodeState, str], None] | None = None,
    ) -> None:
        """Hear that a slot may have become free, and that a node came or went."""
        self._on_room = on_room or self._on_room
        self._on_health = on_health or self._on_health

    # membership

    def add(self, node: Node, client: NodeClient, *, slots: int) -> NodeState:
        """Take a node in; it serves nothing before its first good report."""
        state = NodeState(node=node, slots=slots)
        self._states[node.name] = state
        self._clients[node.name] = client
        self.experience.set_slots(state, slots)
        return state

    def amend(self, name: str, node: Node, *, slots: int) -> None:
        """
        The settings say something else of a node that stays; models offered anew come with its next report.

        Args:
            slots: what it has from now on where the settings had said so before, or had left it to be found out.
        """
        state = self._states[name]
        was_said = state.node.slots is not None or state.node.is_adaptive
        state.node = node
        self.experience.set_slots(state, node.slots or (slots if was_said else state.slots))
        state.models = {name: info for name, info in state.models.items() if _is_offered(name, node)}
        self._index()
        self._on_room()

    def remove(self, name: str) -> NodeState | None:
        """Offer the node no more; what it works on goes on."""
        state = self._states.pop(name, None)
        self._clients.pop(name, None)
        if state is not None:
            state.draining = True
            self.experience.forget(state, self.clock(), self._rules)
            self._index()
            self._on_room()  # who waits for a model that left with it need wait no longer
        return state

    def reported(self, state: NodeState, report: NodeReport) -> None:
        """A probe succeeded."""
        own = state.in_flight
        offered = {name: info for name, info in report.models.items() if _is_offered(name, state.node)}
        reindex = offered.keys() != state.models.keys()
        state.models = offered
        state.loaded = report.loaded if report.loaded is None else _with_short_names(report.loaded)
        state.running, state.waiting, state.version = report.running, report.waiting, report.version
        state.foreign = max(0, (report.running or 0) + (report.waiting or 0) - own)
        if report.slots is not None and state.node.slots is None and not state.node.is_adaptive:
            state.slots = max(1, report.slots)
        state.probed_at = self.clock()
        self._succeed(state)
        if reindex:
            self._index()
            having = self._names_of(state)
            state.paces = {model: pace for model, pace in state.paces.items() if model in having}
        if self._watched:
            having = self._names_of(state)
            self.experience.breakers.tidy(state.probed_at, self._rules.breaker, node=state.node.name, models=having)
        self._on_room()

    def failed_probe(self, state: NodeState, error: SutazaiError) -> None:
        """A probe failed."""
        state.probed_at = self.clock()
        self._fail(state, error.message)

    # requests

    def choose(self, request: Request, tried: Sequence[NodeState], now: float) -> NodeState | None:
        """The node for the next attempt; None where none has room, or a better one is worth waiting for."""
        model = request.model
        candidates: Sequence[NodeState] = self._by_model.get(model, ())
        if len(candidates) == 1 and not tried and not request.avoid:
            # what `pick` says of a single node that is well and has a slot: pools of one are common
            (state,) = candidates
            if (
                state.in_flight < state.slots
                and state.health is UP
                and not state.draining
                and not state.penalty
                and (state.loaded is None or model in state.loaded)
            ):
                return state
        if self._watched:
            candidates = self.experience.spared(candidates, model, now, self._rules)
        if request.avoid:
            candidates = [state for state in candidates if state.node.name != request.avoid]
        favour = None
        if len(candidates) > 1 and (request.conversation or len(request.body) >= FIRST_BLOCK):
            favour = self._affinity.favour(request, candidates, self._rules)
        return pick(candidates, model, now=now, rules=self._rules, random=self.random, tried=tried, favour=favour)

    def room(self, model: str) -> Room:
        """What `choose` would find now for a request that was nowhere yet."""
        now = self.clock()
        candidates: Sequence[NodeState] = self._by_model.get(model, ())
        if self._watched:
            candidates = self.experience.spared(candidates, model, now, self._rules)
        found = pick(candidates, model, now=now, rules=self._rules, random=_last_of_equals)
        if found is None:
            return Room.NONE
        return Room.WARM if is_warm(found, model) else Room.COLD

    def why(self, state: NodeState, request: Request) -> str:
        """Why this node was chosen, for `x-sutazai-reason`; while its lease is open."""
        warmth = "warm" if is_warm(state, request.model) else "cold"
        because = self.experience.because
        decided = because.get(request.id, "") if because else ""
        return f"{warmth}, {decided}least connections; {state.in_flight} of {state.slots} slots"

    def lease(self, state: NodeState, request: Request, now: float) -> Lease:
        """Take a slot of the node; the caller ends the lease on every path."""
        lease = Lease(self, state, request, now)
        if state.loaded is not None or self._affinity.request is request or self._watched or state.node.is_adaptive:
            self.experience.begun(lease, now)
        return lease

    def answered(self, lease: Lease, pace: Pace | None, took_s: float, now: float) -> None:
        """A lease that is not plain, or late, began to be answered. For `Lease` alone."""
        self.experience.answered(lease, pace, took_s, now, self._rules)
        if not lease.is_plain:
            self._on_room()

    def settled(self, lease: Lease, outcome: Outcome, why: str) -> None:
        """A lease ended so. For `Lease` alone."""
        state = lease.state
        if outcome is GOOD:
            state.failures = 0
        elif outcome is not NEITHER:
            now = self.clock()
            # more ghosts than fill a node would only keep it out for longer once it is well again
            most = state.slots + self._rules.head_start + 1.0
            state.penalty = min(penalty_now(state, now, self._rules) + 1.0, most)
            state.penalty_at = now
            state.last_error = why
            if outcome is Outcome.GONE:
                self._fail(state, why)
        if lease.has_reason:
            self.experience.because.pop(lease.request.id, None)
        if outcome is not GOOD or not lease.is_plain or self._watched:
            self.experience.ended(lease, outcome, self.clock(), self._rules)
        self._on_room()

    def candidates(self, model: str) -> Sequence[NodeState]:
        """Nodes that have the model, healthy or not; empty when the pool does not know it."""
        return self._by_model.get(model, ())

    # views

    @property
    def is_up(self) -> bool:
        """Whether any node is."""
        return any(state.health is UP for state in self._states.values())

    def states(self) -> Sequence[NodeState]:
        """All nodes, by name."""
        return [self._states[name] for name in sorted(self._states)]

    def state(self, name: str) -> NodeState | None:
        """One node."""
        return self._states.get(name)

    def client(self, name: str) -> NodeClient:
        """The client of a node that is in the fleet."""
        return self._clients[name]

    def clients(self) -> Iterable[NodeClient]:
        """The clients of all nodes."""
        return self._clients.values()

    def models(self) -> Mapping[str, Sequence[NodeState]]:
        """Every model by the names it can be asked for, with the nodes that list it."""
        return self._by_model

    def listed_models(self) -> Mapping[str, Sequence[NodeState]]:
        """Every model by the name its nodes list it under, with those nodes that are up."""
        found: dict[str, list[NodeState]] = {}
        for state in self.states():
            if state.health is Health.UP:
                for name in state.models:
                    found.setdefault(name, []).append(state)
        return found

    def breakers(self) -> Sequence[BreakerView]:
        """Every breaker there is, by node and model."""
        now, rules = self.clock(), self._rules.breaker
        views: list[BreakerView] = []
        for model, by_node in self._watched.items():
            for node, breaker in by_node.items():
                position = breaker.position(now)
                counts = breaker.counts(now, rules) if position is Position.CLOSED else breaker.opened_with
                views.append(
                    BreakerView(node, model, position, counts.error_ratio, counts.slow_ratio, breaker.opens_until)
                )
        return sorted(views, key=lambda view: (view.node, view.model))

    # parts

    def _names_of(self, state: NodeState) -> Collection[str]:
        """Its models, by all names that they can be asked for."""
        return {*state.models, *(name.removesuffix(LATEST) for name in state.models)}

    def _succeed(self, state: NodeState) -> None:
        before = state.health
        state.failures = 0
        state.health = health_after(before, 0, self.failures_to_down)
        if before is not Health.UP:
            # the first time a node is seen nothing is known against it: no slow start
            state.up_since = float("-inf") if before is Health.UNKNOWN else self.clock()
            self._on_health(state, "")

    def _fail(self, state: NodeState, why: str) -> None:
        before = state.health
        state.failures += 1
        state.last_error = why
        state.health = health_after(before, state.failures, self.failures_to_down)
        if state.health is not before:
            self._on_health(state, why)
            self._on_room()

    def _index(self) -> None:
        """Build the table of models anew: lists, so that a request does one look-up."""
        table: dict[str, list[NodeState]] = {}
        for state in self._states.values():
            for name in state.models:
                table.setdefault(name, []).append(state)
        for name in [name for name in table if name.endswith(LATEST)]:
            # Ollama means `llama3:latest` by `llama3`
            short = table.setdefault(name.removesuffix(LATEST), [])
            short.extend(state for state in table[name] if state not in short)
        self._by_model = table


def other_name(model: str) -> str:
    """The other name of a model: Ollama means `llama3:latest` by `llama3`."""
    return model.removesuffix(LATEST) if model.endswith(LATEST) else model + LATEST


def _is_offered(model: str, node: Node) -> bool:
    return not node.models or model in node.models or model.removesuffix(LATEST) in node.models


def _with_short_names(loaded: Mapping[str, LoadedModel]) -> Mapping[str, LoadedModel]:
    """Routing asks by the name of the request, which may lack `:latest`."""
    return {**{name.removesuffix(LATEST): model for name, model in loaded.items()}, **loaded}


def _nothing() -> None:
    return


def _nothing_changed(_state: NodeState, _why: str) -> None:
    return


def _last_of_equals() -> float:
    return 0.0
