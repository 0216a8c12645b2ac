"""
The pool as it is now: nodes, their states, and leases on their slots.

All of it lives in memory and on one thread, so a decision and the counter it changes are one step. Nothing here does
I/O: `membership` brings reports, `routed` takes leases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from sutazai.core.errors import SutazaiError
from sutazai.core.node import Health, LoadedModel, Node, NodeReport, NodeState
from sutazai.policy.health import Outcome, health_after
from sutazai.policy.routing import RoutingRules, penalty_now
from sutazai.ports.nodes import NodeClient

LATEST = ":latest"


class Lease:
    """One slot of one node, held from the choice of the node to the end of the attempt."""

    __slots__ = ("_fleet", "_open", "state")

    def __init__(self, fleet: Fleet, state: NodeState) -> None:
        self._fleet = fleet
        self._open = True
        self.state = state
        state.in_flight += 1

    def end(self, outcome: Outcome, why: str = "") -> None:
        """Give the slot back and say how it went. Only the first call counts."""
        if self._open:
            self._open = False
            self.state.in_flight -= 1
            self._fleet.settled(self.state, outcome, why)


class Fleet:
    """Every node of the pool, by name."""

    def __init__(
        self, rules: RoutingRules, *, failures_to_down: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rules = rules
        self.failures_to_down = failures_to_down
        self.clock = clock
        self._states: dict[str, NodeState] = {}
        self._clients: dict[str, NodeClient] = {}
        self._by_model: dict[str, list[NodeState]] = {}
        self._on_room: Callable[[], None] = _nothing
        self._on_health: Callable[[NodeState, str], None] = _nothing_changed

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
        return state

    def amend(self, name: str, node: Node) -> None:
        """The settings say something else of a node that stays; models offered anew come with its next report."""
        state = self._states[name]
        state.node = node
        state.slots = node.slots or state.slots
        state.models = {name: info for name, info in state.models.items() if _is_offered(name, node)}
        self._index()
        self._on_room()

    def remove(self, name: str) -> NodeState | None:
        """Offer the node no more; what it works on goes on."""
        state = self._states.pop(name, None)
        self._clients.pop(name, None)
        if state is not None:
            state.draining = True
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
        if report.slots is not None and state.node.slots is None:
            state.slots = max(1, report.slots)
        state.probed_at = self.clock()
        self._succeed(state)
        if reindex:
            self._index()
        self._on_room()

    def failed_probe(self, state: NodeState, error: SutazaiError) -> None:
        """A probe failed."""
        state.probed_at = self.clock()
        self._fail(state, error.message)

    # requests

    def lease(self, state: NodeState) -> Lease:
        """Take a slot of the node; the caller ends the lease on every path."""
        return Lease(self, state)

    def settled(self, state: NodeState, outcome: Outcome, why: str) -> None:
        """A lease ended so. For `Lease` alone."""
        if outcome is Outcome.GOOD:
            state.failures = 0
        elif outcome is not Outcome.NEITHER:
            now = self.clock()
            # more ghosts than fill a node would only keep it out for longer once it is well again
            most = state.slots + self.rules.head_start + 1.0
            state.penalty = min(penalty_now(state, now, self.rules) + 1.0, most)
            state.penalty_at = now
            state.last_error = why
            if outcome is Outcome.GONE:
                self._fail(state, why)
        self._on_room()

    def candidates(self, model: str) -> Sequence[NodeState]:
        """Nodes that have the model, healthy or not; empty when the pool does not know it."""
        return self._by_model.get(model, ())

    # views

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

    # parts

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


def _is_offered(model: str, node: Node) -> bool:
    return not node.models or model in node.models or model.removesuffix(LATEST) in node.models


def _with_short_names(loaded: Mapping[str, LoadedModel]) -> Mapping[str, LoadedModel]:
    """Routing asks by the name of the request, which may lack `:latest`."""
    return {**{name.removesuffix(LATEST): model for name, model in loaded.items()}, **loaded}


def _nothing() -> None:
    return


def _nothing_changed(_state: NodeState, _why: str) -> None:
    return
