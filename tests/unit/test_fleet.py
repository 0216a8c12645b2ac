"""The pool's bookkeeping: leases, health, penalties, loads, breakers, and which node has and knows what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.errors import NodeTimeout, NodeUnreachable
from sutazai.core.node import Health, LoadedModel, ModelInfo, Node, NodeKind, NodeReport, NodeState
from sutazai.core.request import Endpoint, Operation, Request
from sutazai.gateway.experience import Lease
from sutazai.gateway.fleet import Fleet
from sutazai.policy.health import Outcome
from sutazai.policy.routing import Room, RoutingRules, is_warm, penalty_now, takes
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

    def lease(self, state: NodeState, model: str = "m", **fields: object) -> Lease:
        return self.fleet.lease(state, asked(model, **fields), self.now)

    def choose(self, model: str = "m", **fields: object) -> NodeState | None:
        return self.fleet.choose(asked(model, **fields), (), self.now)

    def fail(self, state: NodeState, times: int = 5, outcome: Outcome = Outcome.SICK, model: str = "m") -> None:
        for _ in range(times):
            self.lease(state, model).end(outcome, "It broke.")

    def answer(self, state: NodeState, times: int = 1, after_s: float = 0.1, model: str = "m") -> None:
        """So many requests, one after another, each answered after so long."""
        for _ in range(times):
            lease = self.lease(state, model)
            self.now += after_s
            lease.answered(self.now)
            lease.end(Outcome.GOOD)

    def positions(self) -> list[tuple[str, str, str]]:
        return [(view.node, view.model, view.position.value) for view in self.fleet.breakers()]

    def _room(self) -> None:
        self.rooms += 1

    def _health(self, state: NodeState, why: str) -> None:
        self.health.append((state.node.name, state.health, why))


def asked(model: str = "m", **fields: object) -> Request:
    usual: dict[str, object] = {
        "id": "r",
        "endpoint": Endpoint.OPENAI_CHAT,
        "model": model,
        "stream": True,
        "body": b"{}",
        "tenant": "local",
        "key_id": "",
        "arrived_at": 0.0,
    }
    return Request(**(usual | fields))  # type: ignore[arg-type]


def in_memory(*models: str) -> dict[str, LoadedModel]:
    return {model: LoadedModel(name=model) for model in models}


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
            open_leases.append(bench.lease(state))

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
        bench.lease(state).end(Outcome.GOOD)

    assert state.health is Health.UP
    assert state.last_error == "It was refused."


def test_requests_count_towards_being_down_as_probes_do() -> None:
    bench = Bench()
    state = bench.add()
    bench.fleet.failed_probe(state, NodeTimeout("It was silent.", node="a"))
    for _ in range(2):
        bench.lease(state).end(Outcome.GONE, "It was reset.")

    assert state.health is Health.DOWN


@pytest.mark.parametrize("outcome", [Outcome.BUSY, Outcome.SICK])
def test_a_node_that_answers_is_never_taken_out_by_its_answers(outcome: Outcome) -> None:
    bench = Bench()
    state = bench.add()
    for _ in range(50):
        bench.lease(state).end(outcome)

    assert state.health is Health.UP
    assert state.failures == 0


@pytest.mark.parametrize("outcome", [Outcome.GOOD, Outcome.NEITHER])
def test_good_answers_and_clients_that_leave_cost_a_node_nothing(outcome: Outcome) -> None:
    bench = Bench()
    state = bench.add()
    bench.lease(state).end(outcome)

    assert (state.penalty, state.failures, state.last_error) == (0.0, 0, "")


@given(st.lists(st.floats(0, 5), max_size=100), st.integers(1, 8))
def test_penalties_add_up_but_never_to_more_than_fills_the_node(pauses_s: list[float], slots: int) -> None:
    """However long it failed, a node that is well again is back within a minute."""
    bench = Bench()
    state = bench.add(slots=slots)
    for pause_s in pauses_s:
        bench.now += pause_s
        bench.lease(state).end(Outcome.SICK)

    assert 0.0 <= state.penalty <= slots + RULES.head_start + 1
    assert penalty_now(state, bench.now + 30.0, RULES) < 1.0


def test_every_end_of_a_lease_tells_that_there_may_be_room() -> None:
    bench = Bench()
    state = bench.add()
    lease = bench.lease(state)
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
    lease = bench.lease(state)
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
    bench.lease(state)
    bench.report(state, running=3, waiting=2)
    assert state.foreign == 4
    bench.report(state, running=0, waiting=0)

    assert state.foreign == 0


def test_a_node_whose_entry_changed_keeps_its_requests() -> None:
    bench = Bench()
    state = bench.add(models=["m", "n"])
    bench.lease(state)
    bench.fleet.amend("a", Node(name="a", kind=NodeKind.OLLAMA, url="http://a", slots=2, models=("m",)), slots=2)

    assert bench.fleet.state("a") is state
    assert (state.slots, state.in_flight, state.health) == (2, 1, Health.UP)
    assert not bench.fleet.candidates("n")


def test_a_node_of_which_the_settings_name_no_slots_any_more_has_the_usual_ones() -> None:
    bench = Bench()
    state = bench.add()
    named = replace(state.node, slots=8)
    bench.fleet.amend("a", named, slots=8)
    bench.fleet.amend("a", replace(named, slots=None), slots=1)
    usual = state.slots
    bench.report(state, slots=5)
    bench.fleet.amend("a", replace(named, slots=None, models=("m",)), slots=1)

    assert usual == 1
    assert state.slots == 5, "what the node said itself stays"


# one load at a time


def test_a_node_that_loads_takes_what_is_warm_and_nothing_else() -> None:
    bench = Bench()
    state = bench.add(models=["warm", "cold", "other"])
    bench.report(state, ["warm", "cold", "other"], loaded=in_memory("warm"))
    bench.lease(state, "cold")

    assert state.loading == "cold"
    assert [bench.fleet.room(model) for model in ("warm", "cold", "other")] == [Room.WARM, Room.NONE, Room.NONE]
    assert bench.choose("warm") is state
    assert bench.choose("cold") is bench.choose("other") is None


def test_a_model_counts_as_loaded_once_its_first_request_is_answered() -> None:
    bench = Bench()
    state = bench.add()
    bench.report(state, ["m:latest", "n"], loaded={})
    lease = bench.lease(state, "m:latest")
    before = bench.rooms
    lease.answered(bench.now)

    assert state.loading == ""
    assert bench.rooms > before, "those who wait for the load are to be told"
    assert [bench.fleet.room(model) for model in ("m", "m:latest", "n")] == [Room.WARM, Room.WARM, Room.COLD]
    assert bench.fleet.experience.cold_leases == 1
    bench.report(state, ["m:latest", "n"], loaded={})
    assert bench.fleet.room("m") is Room.COLD, "the probe knows better"


@pytest.mark.parametrize("outcome", Outcome)
def test_a_load_that_came_to_nothing_makes_way_for_the_next(outcome: Outcome) -> None:
    bench = Bench()
    state = bench.add(models=["m", "n"])
    bench.report(state, ["m", "n"], loaded={})
    bench.lease(state, "m").end(outcome)

    assert state.loading == ""
    assert not is_warm(state, "m")
    assert bench.choose("n") is state


def test_requests_wait_for_the_node_that_loads_their_model_while_it_has_slots_for_them() -> None:
    bench = Bench()
    one, other = bench.add("one", slots=2), bench.add("other", slots=2)
    for state in (one, other):
        bench.report(state, loaded={})
    bench.lease(one)
    waits = bench.choose()
    bench.lease(one)

    assert waits is None
    assert bench.choose() is other, "one node will be full: the model is to spread"


def test_a_probe_that_sees_the_model_in_memory_lets_others_use_it() -> None:
    bench = Bench()
    state = bench.add(models=["m", "n"])
    bench.report(state, ["m", "n"], loaded={})
    bench.lease(state, "m")
    bench.report(state, ["m", "n"], loaded=in_memory("m"))

    assert (bench.fleet.room("m"), bench.fleet.room("n")) == (Room.WARM, Room.NONE)


@st.composite
def pools(draw: st.DrawFn) -> Bench:
    """A pool after anything may have happened to its nodes."""
    bench = Bench()
    bench.fleet.rules = RoutingRules(head_start=draw(st.integers(0, 2)), slow_start_s=10.0, failure_penalty_s=10.0)
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True, min_size=1)):
        state = bench.add(name, slots=draw(st.integers(1, 3)), models=["m", "n"], is_adaptive=draw(st.booleans()))
        loaded = draw(st.sampled_from([None, in_memory(), in_memory("m"), in_memory("n")]))
        bench.report(state, ["m", "n"], loaded=loaded)
        events = st.tuples(
            st.sampled_from([*Outcome, None]), st.sampled_from("mn"), st.sampled_from([0.0, 0.5, 5.0, 40.0])
        )
        for outcome, model, pause_s in draw(st.lists(events, max_size=12)):
            lease = bench.lease(state, model)
            bench.now += pause_s
            if outcome is Outcome.GOOD:
                lease.answered(bench.now)
            if outcome is not None:
                lease.end(outcome)
    return bench


@given(pools())
def test_there_is_room_exactly_when_a_node_is_chosen(bench: Bench) -> None:
    for model in ("m", "n"):
        room, chosen = bench.fleet.room(model), bench.choose(model)

        assert (room is Room.NONE) == (chosen is None)
        if chosen is not None:
            assert takes(chosen, model, bench.fleet.rules)
            # Those that fail are in one class with cold ones, and of equals either may be chosen.
            fails = [penalty_now(state, bench.now, bench.fleet.rules) >= 1.0 for state in bench.fleet.states()]
            assert room is not Room.WARM or is_warm(chosen, model) or any(fails)


@given(pools())
def test_an_idle_pool_with_a_node_that_is_up_always_asks_somebody(bench: Bench) -> None:
    """Whatever failed before, breakers never leave all of them alone."""
    for state in bench.fleet.states():
        state.in_flight, state.loading = 0, ""

    is_up = any(state.health is Health.UP for state in bench.fleet.states())
    assert (bench.choose() is not None) == is_up


# models that are left alone


def test_a_model_that_fails_on_a_node_is_left_alone_there_and_nowhere_else() -> None:
    bench = Bench()
    bad, good = bench.add("bad", models=["m", "n"]), bench.add("good", models=["m", "n"])
    bench.fail(bad)
    for _ in range(3):
        bench.lease(good, "m")
        bench.lease(good, "n")

    assert bench.positions() == [("bad", "m", "open")]
    assert bench.choose("m") is None
    assert bench.choose("n") is bad, "its failures were the model's"
    assert bench.fleet.breakers()[0].error_ratio == 1.0
    assert bench.fleet.breakers()[0].opens_until == bench.now + 5.0


def test_one_request_is_let_through_to_see_and_a_good_one_closes_the_breaker() -> None:
    bench = Bench()
    bad, good = bench.add("bad", slots=8), bench.add("good", slots=1)
    bench.fail(bad)
    bench.lease(good)
    bench.lease(good)
    bench.now += 5.0
    trial = bench.lease(bad)
    reason = bench.fleet.why(bad, asked())
    while_trying = bench.choose()
    trial.answered(bench.now)

    assert reason.startswith("warm, on trial, ")
    assert while_trying is None
    assert bench.choose() is bad
    assert bench.fleet.breakers() == []


@pytest.mark.parametrize("outcome", [Outcome.BUSY, Outcome.SICK, Outcome.GONE])
def test_a_trial_that_fails_doubles_the_time(outcome: Outcome) -> None:
    bench = Bench()
    bad, _ = bench.add("bad"), bench.add("good")
    bench.fail(bad)
    bench.now += 5.0
    bench.lease(bad).end(outcome)

    assert [view.opens_until for view in bench.fleet.breakers()] == [bench.now + 10.0]


def test_a_trial_whose_client_left_says_nothing_and_the_next_request_is_one() -> None:
    bench = Bench()
    bad, _ = bench.add("bad"), bench.add("good")
    bench.fail(bad)
    bench.now += 5.0
    bench.lease(bad).end(Outcome.NEITHER)

    assert bench.positions() == [("bad", "m", "half-open")]
    assert bench.lease(bad).trial is not None


def test_where_every_node_fails_half_of_them_are_still_asked() -> None:
    bench = Bench()
    nodes = [bench.add(name) for name in "abcd"]
    for state in nodes:
        bench.fail(state)

    asked_now = set()
    for _ in range(2):
        chosen = bench.choose()
        assert chosen is not None
        asked_now.add(chosen.node.name)
        bench.lease(chosen)
    assert len(asked_now) == 2
    assert all(position == "open" for _, _, position in bench.positions())


def test_the_last_node_that_is_up_is_asked_however_much_it_fails() -> None:
    bench = Bench()
    bad, down = bench.add("bad"), bench.add("down")
    bench.fail(bad, 20)
    for _ in range(3):
        bench.fleet.failed_probe(down, AWAY)

    assert bench.choose() is bad


def test_a_node_that_begins_to_answer_too_late_is_left_alone() -> None:
    bench = Bench()
    slow, fast = bench.add("slow"), bench.add("fast")
    for state, after_s in [(slow, 31.0), (fast, 0.1)] * 5:
        lease = bench.lease(state)
        lease.answered(bench.now + after_s)
        lease.end(Outcome.GOOD)

    assert bench.positions() == [("slow", "m", "open")]
    assert bench.fleet.breakers()[0].slow_ratio == 1.0
    assert bench.choose() is fast


def test_where_all_are_slow_none_is_left_alone() -> None:
    """It is the pool that is slow, and half of it would be slower still."""
    bench = Bench()
    nodes = [bench.add(name, slots=1) for name in "ab"]
    for state in nodes * 5:
        lease = bench.lease(state)
        lease.answered(bench.now + 31.0)
        lease.end(Outcome.GOOD)

    assert [position for _, _, position in bench.positions()] == ["open", "open"]
    for _ in range(4):
        chosen = bench.choose()
        assert chosen is not None
        bench.lease(chosen)


def test_clients_that_gave_up_count_against_a_node_only_when_it_was_late() -> None:
    bench = Bench()
    silent, soon, _ = bench.add("silent"), bench.add("soon"), bench.add("good")
    for state, after_s in [(silent, 40.0), (soon, 3.0)]:
        leases = [bench.lease(state) for _ in range(5)]
        bench.now += after_s
        for lease in leases:
            lease.end(Outcome.NEITHER)

    assert bench.positions() == [("silent", "m", "open")]


def test_the_time_that_a_load_takes_is_not_held_against_a_node() -> None:
    bench = Bench()
    state = bench.add(models=[f"m{number}" for number in range(6)])
    for number in range(6):
        bench.report(state, [f"m{number}" for number in range(6)], loaded={})
        lease = bench.lease(state, f"m{number}")
        bench.now += 100.0
        lease.answered(bench.now)
        lease.end(Outcome.GOOD)

    assert bench.fleet.breakers() == []
    assert state.paces == {}


def test_clients_that_leave_during_a_load_say_nothing_of_the_node() -> None:
    bench = Bench()
    state = bench.add()
    for _ in range(6):
        bench.report(state, loaded={})
        lease = bench.lease(state)
        bench.now += 100.0
        lease.end(Outcome.NEITHER)

    assert bench.fleet.breakers() == []


def test_clients_that_leave_do_not_hide_failures() -> None:
    bench = Bench()
    state = bench.add()
    bench.fail(state, 4)
    bench.fail(state, 50, Outcome.NEITHER)
    bench.fail(state, 1)

    assert bench.positions() == [("a", "m", "open")]


def test_mistakes_of_clients_are_not_held_against_a_node() -> None:
    bench = Bench()
    state, _ = bench.add("a"), bench.add("b")
    bench.fail(state, 50, Outcome.GOOD)

    assert bench.fleet.breakers() == []


def test_a_breaker_is_forgotten_when_its_window_is_clean_again() -> None:
    bench = Bench()
    state = bench.add()
    bench.fail(state, 1)
    kept = bench.positions()
    bench.now += 11.0
    bench.answer(state)

    assert kept == [("a", "m", "closed")]
    assert bench.positions() == []


def test_a_breaker_of_a_model_that_left_leaves_with_it() -> None:
    bench = Bench()
    state = bench.add(models=["m", "n"])
    bench.fail(state, model="m")
    bench.fail(state, model="n")
    bench.report(state, ["n"])
    after_report = bench.positions()
    bench.fleet.remove("a")

    assert after_report == [("a", "n", "open")]
    assert bench.positions() == []


def test_a_node_that_fails_much_more_than_the_others_is_left_alone_sooner() -> None:
    bench = Bench()
    bad, good = bench.add("bad"), bench.add("good")
    for _ in range(4):
        bench.fail(bad, 1)
        bench.answer(bad, 2, 0.0)
        bench.answer(good, 2, 0.0)

    assert bench.positions() == [("bad", "m", "open")]
    assert bench.fleet.experience.breakers.ejected == 1


def test_a_node_that_became_far_slower_than_the_others_is_left_alone() -> None:
    bench = Bench()
    sick, good = bench.add("sick"), bench.add("good")
    for state in (sick, good):
        bench.answer(state, 40, 0.2)
    bench.answer(sick, 4, 20.0)

    assert bench.positions() == [("sick", "m", "open")]
    assert bench.fleet.experience.breakers.ejected == 1
    bench.now += 5.0
    bench.answer(sick, 1, 20.0)
    assert bench.fleet.breakers()[0].opens_until == bench.now + 10.0
    bench.now += 10.0
    bench.answer(sick, 1, 0.2)
    assert bench.positions() == []


def test_a_node_that_was_always_slow_is_not_left_alone_for_it() -> None:
    bench = Bench()
    slow, fast = bench.add("slow"), bench.add("fast")
    for _ in range(60):
        bench.answer(slow, 1, 8.0)
        bench.answer(fast, 1, 0.2)

    assert bench.positions() == []


def test_one_long_answer_is_no_sign_of_sickness() -> None:
    bench = Bench()
    state, other = bench.add("a"), bench.add("b")
    for each in (state, other):
        bench.answer(each, 40, 0.2)
    bench.answer(state, 1, 29.0)

    assert bench.positions() == []


# who knows what


def test_a_conversation_follows_the_node_that_had_it_last() -> None:
    bench = Bench()
    for name in "abc":
        bench.add(name)
    first = asked(conversation=b"c1", id="1")
    home = bench.fleet.choose(first, (), bench.now)
    assert home is not None
    bench.fleet.lease(home, first, bench.now).end(Outcome.GOOD)
    full = [bench.lease(home) for _ in range(5)]
    second = asked(conversation=b"c1", id="2")
    elsewhere = bench.fleet.choose(second, (), bench.now)
    assert elsewhere is not None
    bench.fleet.lease(elsewhere, second, bench.now).end(Outcome.GOOD)
    for lease in full:
        lease.end(Outcome.GOOD)
    third = asked(conversation=b"c1", id="3")
    last = bench.fleet.choose(third, (), bench.now)
    assert last is not None
    bench.fleet.lease(last, third, bench.now)

    assert elsewhere is not home
    assert last is elsewhere
    assert bench.fleet.why(last, third) == "warm, has the conversation, least connections; 1 of 4 slots"


def test_gateways_that_never_talked_send_a_conversation_to_the_same_node() -> None:
    benches = [Bench() for _ in range(2)]
    for bench, names_ in zip(benches, ["abcd", "dbca"], strict=True):
        for name in names_:
            bench.add(name)
    chosen = [
        [state.node.name for number in range(50) if (state := bench.choose(conversation=b"%d" % number)) is not None]
        for bench in benches
    ]

    assert chosen[0] == chosen[1]
    assert set(chosen[0]) == set("abcd")


def test_a_conversation_is_not_worth_more_than_its_weight_in_load() -> None:
    bench = Bench()
    for name in "ab":
        bench.add(name, slots=10)
    home = bench.choose(conversation=b"c1")
    assert home is not None
    bench.lease(home)
    with_little_load = bench.choose(conversation=b"c1")
    for _ in range(2):
        bench.lease(home)

    assert with_little_load is home
    assert bench.choose(conversation=b"c1") is not home


def test_a_request_that_begins_like_another_goes_where_that_one_was() -> None:
    bench = Bench()
    for name in "abcd":
        bench.add(name, slots=8)
    system = b"You are a parrot. " * 100
    first = asked(id="1", body=system + b"Who is there?" * 20)
    given_to = bench.fleet.choose(first, (), bench.now)
    assert given_to is not None
    bench.fleet.lease(given_to, first, bench.now).end(Outcome.GOOD)
    alike = [asked(id=str(number), body=system + b"%d" % number * 300) for number in range(10)]
    foreign = [asked(id=str(number), body=first.body, tenant=f"other-{number}") for number in range(30)]

    assert all(bench.fleet.choose(request, (), bench.now) is given_to for request in alike)
    assert len({id(bench.fleet.choose(request, (), bench.now)) for request in foreign}) > 1, "tenants are separate"
    bench.fleet.choose(alike[0], (), bench.now)
    bench.fleet.lease(given_to, alike[0], bench.now)
    assert bench.fleet.why(given_to, alike[0]) == "warm, knows the beginning, least connections; 1 of 8 slots"


def test_beginnings_of_embeddings_are_not_looked_at() -> None:
    bench = Bench()
    for name in "ab":
        bench.add(name)
    request = asked(endpoint=Endpoint.OPENAI_EMBEDDING, body=b"x" * 4096)
    assert request.endpoint.operation is Operation.EMBEDDING
    chosen = set()
    for _ in range(40):
        state = bench.fleet.choose(request, (), bench.now)
        assert state is not None
        bench.fleet.lease(state, request, bench.now).end(Outcome.GOOD)
        chosen.add(state.node.name)

    assert chosen == {"a", "b"}


def test_a_reason_is_kept_no_longer_than_its_lease() -> None:
    bench = Bench()
    for name in "ab":
        bench.add(name)
    request = asked(conversation=b"c1")
    state = bench.fleet.choose(request, (), bench.now)
    assert state is not None
    lease = bench.fleet.lease(state, request, bench.now)
    during = bench.fleet.why(state, request)
    lease.end(Outcome.GOOD)

    assert during == "warm, home of the conversation, least connections; 1 of 4 slots"
    assert not bench.fleet.experience.because


def test_a_node_that_is_to_be_avoided_is_not_chosen() -> None:
    bench = Bench()
    one = bench.add("one")
    alone = bench.choose(avoid="one")
    other = bench.add("other")

    assert alone is None
    assert bench.choose(avoid="one") is other
    assert bench.choose(avoid="other") is one


# slots that are found out


def test_an_adaptive_node_begins_with_four_slots_and_gets_no_head_start() -> None:
    bench = Bench()
    state = bench.add(slots=64, is_adaptive=True)
    bench.report(state, slots=100)
    for _ in range(4):
        bench.lease(state)

    assert state.slots == 4
    assert bench.choose() is None
    assert bench.fleet.room("m") is Room.NONE


def test_an_adaptive_node_that_answers_at_once_gets_more_and_one_that_refuses_gets_less() -> None:
    bench = Bench()
    state = bench.add(is_adaptive=True)
    for _ in range(100):
        leases = [bench.lease(state) for _ in range(state.slots)]
        bench.now += 0.1
        for lease in leases:
            lease.answered(bench.now)
            lease.end(Outcome.GOOD)
    grown = state.slots
    bench.fail(state, 1, Outcome.BUSY)

    assert grown > 20
    assert state.slots <= 0.75 * grown


def test_a_node_that_is_adaptive_no_more_has_the_slots_that_the_settings_name() -> None:
    bench = Bench()
    state = bench.add(is_adaptive=True)
    plain = Node(name="a", kind=NodeKind.OLLAMA, url="http://a", slots=7)
    bench.fleet.amend("a", plain, slots=7)
    fixed = state.slots
    bench.fleet.amend("a", replace(plain, slots=None, is_adaptive=True), slots=1)

    assert (fixed, state.slots) == (7, 4)
