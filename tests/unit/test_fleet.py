"""The pool's bookkeeping: leases, health, penalties, and which node has which model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.errors import NodeTimeout, NodeUnreachable
from sutazai.core.node import Health, LoadedModel, ModelInfo, Node, NodeKind, NodeReport, NodeState
from sutazai.core.request import Request
from sutazai.gateway.fleet import Fleet, Lease
from sutazai.policy.health import Outcome
from sutazai.policy.routing import RoutingRules, is_warm, penalty_now
from sutazai.ports.inference import Call, Reply

RULES = RoutingRules(head_start=1, slow_start_s=10.0, failure_penalty_s=10.0)
AWAY = NodeUnreachable("It was refused.", node="a")


class NoClient:
    """A node that is never called."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def start(self, request: Request, reply: Reply) -> Call:
        raise NotImplementedError

    async def probe(self) -> NodeReport:
        raise NotImplementedError

    async def show(self, model: str) -> Mapping[str, object]:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


class Bench:
    """A fleet, its clock, and what it told."""

    def __init__(self) -> None:
        self.now = 100.0
        self.fleet = Fleet(RULES, failures_to_down=3, clock=lambda: self.now)
        self.health: list[tuple[str, Health, str]] = []
        self.rooms = 0
        self.fleet.listen(on_room=self._room, on_health=self._health)

    def add(self, name: str = "a", *, slots: int = 4, models: Sequence[str] = ("m",), **fields: object) -> NodeState:
        """A node that was probed once."""
        state = self.join(name, slots=slots, **fields)
        self.report(state, models)
        return state

    def join(self, name: str, *, slots: int = 4, **fields: object) -> NodeState:
        node = Node(name=name, kind=NodeKind.OLLAMA, url=f"http://{name}", **fields)  # type: ignore[arg-type]
        return self.fleet.add(node, NoClient(node), slots=slots)

    def report(self, state: NodeState, models: Sequence[str] = ("m",), **fields: object) -> None:
        listed = {name: ModelInfo(name=name) for name in models}
        usual: dict[str, object] = {"models": listed, "loaded": None}
        self.fleet.reported(state, NodeReport(**(usual | fields)))  # type: ignore[arg-type]

    def _room(self) -> None:
        self.rooms += 1

    def _health(self, state: NodeState, why: str) -> None:
        self.health.append((state.node.name, state.health, why))


def names(states: Sequence[NodeState]) -> list[str]:
    return sorted(state.node.name for state in states)


@given(st.lists(st.tuples(st.sampled_from(Outcome), st.booleans()), max_size=40))
def test_a_lease_is_counted_until_its_first_end(events: list[tuple[Outcome, bool]]) -> None:
    bench = Bench()
    state = bench.add()
    open_leases: list[Lease] = []
    for outcome, ends in events:
        if ends and open_leases:
            lease = open_leases.pop()
            lease.end(outcome)
            lease.end(outcome)
        else:
            open_leases.append(bench.fleet.lease(state))

        assert state.in_flight == len(open_leases)


def test_a_node_takes_nothing_before_its_first_report() -> None:
    bench = Bench()
    state = bench.join("a")

    assert state.health is Health.UNKNOWN
    assert not bench.fleet.candidates("m")


def test_a_node_that_was_never_seen_needs_no_slow_start_and_one_that_came_back_does() -> None:
    bench = Bench()
    state = bench.add()
    assert state.up_since == -math.inf
    for _ in range(3):
        bench.fleet.failed_probe(state, AWAY)
    bench.now = 200.0
    bench.report(state)

    assert state.up_since == 200.0
    assert bench.health == [("a", Health.UP, ""), ("a", Health.DOWN, "It was refused."), ("a", Health.UP, "")]


def test_three_failures_in_a_row_take_a_node_out_and_a_success_between_them_does_not() -> None:
    bench = Bench()
    state = bench.add()
    for _ in range(5):
        bench.fleet.failed_probe(state, AWAY)
        bench.fleet.failed_probe(state, AWAY)
        bench.fleet.lease(state).end(Outcome.GOOD)

    assert state.health is Health.UP
    assert state.last_error == "It was refused."


def test_requests_count_towards_being_down_as_probes_do() -> None:
    bench = Bench()
    state = bench.add()
    bench.fleet.failed_probe(state, NodeTimeout("It was silent.", node="a"))
    for _ in range(2):
        bench.fleet.lease(state).end(Outcome.GONE, "It was reset.")

    assert state.health is Health.DOWN


@pytest.mark.parametrize("outcome", [Outcome.BUSY, Outcome.SICK])
def test_a_node_that_answers_is_never_taken_out_by_its_answers(outcome: Outcome) -> None:
    bench = Bench()
    state = bench.add()
    for _ in range(50):
        bench.fleet.lease(state).end(outcome)

    assert state.health is Health.UP
    assert state.failures == 0


@pytest.mark.parametrize("outcome", [Outcome.GOOD, Outcome.NEITHER])
def test_good_answers_and_clients_that_leave_cost_a_node_nothing(outcome: Outcome) -> None:
    bench = Bench()
    state = bench.add()
    bench.fleet.lease(state).end(outcome)

    assert (state.penalty, state.failures, state.last_error) == (0.0, 0, "")


@given(st.lists(st.floats(0, 5), max_size=100), st.integers(1, 8))
def test_penalties_add_up_but_never_to_more_than_fills_the_node(pauses_s: list[float], slots: int) -> None:
    """However long it failed, a node that is well again is back within a minute."""
    bench = Bench()
    state = bench.add(slots=slots)
    for pause_s in pauses_s:
        bench.now += pause_s
        bench.fleet.lease(state).end(Outcome.SICK)

    assert 0.0 <= state.penalty <= slots + RULES.head_start + 1
    assert penalty_now(state, bench.now + 30.0, RULES) < 1.0


def test_every_end_of_a_lease_tells_that_there_may_be_room() -> None:
    bench = Bench()
    state = bench.add()
    lease = bench.fleet.lease(state)
    before = bench.rooms
    lease.end(Outcome.NEITHER)

    assert bench.rooms > before


def test_names_with_and_without_latest_mean_the_same() -> None:
    bench = Bench()
    bench.add("a", models=["m:latest", "m:7b"])
    bench.add("b", models=["m"])

    assert names(bench.fleet.candidates("m")) == ["a", "b"]
    assert names(bench.fleet.candidates("m:latest")) == ["a"]
    assert names(bench.fleet.candidates("m:7b")) == ["a"]
    assert not bench.fleet.candidates("m:8b")


def test_a_loaded_model_is_warm_under_both_its_names() -> None:
    bench = Bench()
    state = bench.add(models=["m:latest"])
    bench.report(state, ["m:latest"], loaded={"m:latest": LoadedModel(name="m:latest")})

    assert is_warm(state, "m")
    assert is_warm(state, "m:latest")
    assert not is_warm(state, "m:7b")


def test_models_come_and_go_with_reports() -> None:
    bench = Bench()
    state = bench.add(models=["m"])
    bench.report(state, ["n"])

    assert not bench.fleet.candidates("m")
    assert names(bench.fleet.candidates("n")) == ["a"]


def test_listed_models_are_those_of_nodes_that_are_up() -> None:
    bench = Bench()
    bench.add("a", models=["m"])
    down = bench.add("b", models=["m", "n"])
    for _ in range(3):
        bench.fleet.failed_probe(down, AWAY)

    assert {model: names(states) for model, states in bench.fleet.listed_models().items()} == {"m": ["a"]}
    assert names(bench.fleet.candidates("n")) == ["b"], "a model that is away is not unknown"


def test_a_node_that_leaves_is_offered_no_more_and_may_come_back() -> None:
    bench = Bench()
    state = bench.add()
    lease = bench.fleet.lease(state)
    assert bench.fleet.remove("a") is state
    again = bench.add()
    lease.end(Outcome.GOOD)

    assert state.draining
    assert (state.in_flight, again.in_flight) == (0, 0)
    assert bench.fleet.candidates("m") == [again]
    assert bench.fleet.remove("nobody") is None


def test_slots_that_the_settings_name_count_more_than_what_the_node_says() -> None:
    bench = Bench()
    told, fixed = bench.add("a", slots=1), bench.add("b", slots=2)
    fixed.node = Node(name="b", kind=NodeKind.LLAMACPP, url="http://b", slots=2)
    for state in (told, fixed):
        bench.report(state, slots=8)

    assert (told.slots, fixed.slots) == (8, 2)


def test_a_node_that_says_it_has_no_slots_has_one() -> None:
    bench = Bench()
    state = bench.add()
    bench.report(state, slots=0)

    assert state.slots == 1


def test_requests_of_others_are_what_the_node_works_on_less_our_own() -> None:
    bench = Bench()
    state = bench.add()
    bench.fleet.lease(state)
    bench.report(state, running=3, waiting=2)
    assert state.foreign == 4
    bench.report(state, running=0, waiting=0)

    assert state.foreign == 0


def test_a_node_whose_entry_changed_keeps_its_requests() -> None:
    bench = Bench()
    state = bench.add(models=["m", "n"])
    bench.fleet.lease(state)
    bench.fleet.amend("a", Node(name="a", kind=NodeKind.OLLAMA, url="http://a", slots=2, models=("m",)))

    assert bench.fleet.state("a") is state
    assert (state.slots, state.in_flight, state.health) == (2, 1, Health.UP)
    assert not bench.fleet.candidates("n")
