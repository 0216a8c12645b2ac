"""Waiting, between the client and routing: turns, places, deadlines, and honest refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sutazai.core.errors import NodeUnreachable, NoHealthyNode, Overloaded, TooManyWaiting
from sutazai.core.node import LoadedModel, ModelInfo, NodeReport
from sutazai.core.request import Priority
from sutazai.gateway.routed import Run
from sutazai.policy.admission import AdmissionRules
from sutazai.policy.routing import Room, RoutingRules
from sutazai.testing.memory_pool import ACTS, ADMISSION, PATIENCE, RETRY, RULES, MemoryPool, NodeCall, Told

ROOMY = replace(ADMISSION, max_waiting=1000, max_waiting_bytes=10**6)
NO_HEAD_START = replace(RULES, head_start=0)


def one_slot(admission: AdmissionRules = ROOMY, weights: Mapping[str, float] | None = None) -> MemoryPool:
    return MemoryPool({"a": 1}, admission=admission, rules=NO_HEAD_START, weights=weights)


def finish(pool: MemoryPool, node: str = "a", *, seconds: float = 1.0) -> NodeCall:
    """The oldest request at the node took so long, and is answered."""
    call = pool.nodes[node].open_calls[0]
    pool.pass_time(seconds)
    call.act("whole")
    return call


def busy_for(pool: MemoryPool, seconds: int) -> None:
    """One request after the other, a second each, while others wait."""
    for _ in range(seconds):
        pool.ask(tenant="earlier")
    for _ in range(seconds):
        finish(pool)
    pool.pass_time(0.001)


def names(calls: list[NodeCall]) -> str:
    return "".join(call.request.tenant for call in calls)


# turns


def test_requests_wait_and_are_served_in_the_order_they_came() -> None:
    pool = MemoryPool({"a": 1})
    clients = [pool.ask() for _ in range(6)]
    assert [pool.position(client) for client in clients] == [0, 0, 1, 2, 3, 4]
    for _ in clients:
        pool.nodes["a"].open_calls[0].act("whole")

    assert [call.request.id for call in pool.nodes["a"].calls] == [client.request.id for client in clients]
    assert all(client.ends for client in clients)


def test_a_newcomer_does_not_overtake_those_who_wait() -> None:
    pool = MemoryPool({"a": 1})
    first = [pool.ask() for _ in range(3)]
    pool.nodes["a"].open_calls[0].act("whole")
    pool.ask()
    pool.nodes["a"].open_calls[0].act("whole")

    assert [call.request.id for call in pool.nodes["a"].calls][:3] == [client.request.id for client in first]


def test_a_line_that_is_full_turns_clients_away_at_once() -> None:
    pool = MemoryPool({"a": 1})
    clients = [pool.ask() for _ in range(2 + ADMISSION.max_waiting + 1)]

    assert isinstance(clients[-1].error, Overloaded)
    assert clients[-1].error.retry_after_s > 0
    assert pool.admitted.waiting == ADMISSION.max_waiting


def test_a_request_that_waits_too_long_is_told_to_come_back() -> None:
    pool = MemoryPool({"a": 1})
    clients = [pool.ask() for _ in range(3)]
    for _ in range(8):
        pool.pass_time(4.0)
        for call in pool.nodes["a"].open_calls:
            call.act("chunk")

    assert isinstance(clients[2].error, Overloaded)
    assert pool.admitted.waiting == 0
    assert not clients[0].errors


def test_tenants_take_turns() -> None:
    """The one with many waiting gets no more than the others."""
    pool = one_slot()
    for tenant in "xxxxxxyz":
        pool.ask(tenant=tenant)
    while pool.nodes["a"].open_calls:
        finish(pool)

    assert names(pool.nodes["a"].calls) == "xyzxxxxx"


def test_long_answers_count_as_they_are_given() -> None:
    """x was served once, at length; y has the next turns until it was given as much."""
    pool = MemoryPool({"a": 2}, admission=ROOMY, rules=NO_HEAD_START)
    for tenant in "xyxyyyyy":
        pool.ask(tenant=tenant)
    long, short = pool.nodes["a"].open_calls
    for _ in range(11):
        long.act("chunk")
    pool.pass_time(0.25)
    for _ in range(4):
        short.act("whole")
        short = pool.nodes["a"].open_calls[-1]

    assert names(pool.nodes["a"].calls) == "xyyyyy"


def test_what_was_given_is_settled_at_the_end() -> None:
    """x's long bodies were taken for many tokens; they were as few as y's, so the turns are equal."""
    pool = one_slot()
    for tenant in "zxxxyyy":
        pool.ask(tenant=tenant, body=bytes(400 if tenant == "x" else 4))
    while pool.nodes["a"].open_calls:
        pool.nodes["a"].open_calls[0].act("whole")

    assert names(pool.nodes["a"].calls) == "zxyxyxy"


def test_a_tenant_with_one_request_at_a_time_has_every_second_turn() -> None:
    """Though the estimates of all are far too high, and it comes while one of them is not settled yet."""
    pool = one_slot()
    for _ in range(30):
        pool.ask(tenant="x", body=bytes(400))
    client = pool.ask(tenant="y", body=bytes(400))
    for _ in range(12):
        finish(pool)
        if client.ends:
            client = pool.ask(tenant="y", body=bytes(400))

    assert names(pool.nodes["a"].calls) == "xyxyxyxyxyxyx"


def test_urgent_requests_go_first() -> None:
    pool = one_slot()
    pool.ask()
    clients = [pool.ask(priority=priority) for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH)]
    while pool.nodes["a"].open_calls:
        finish(pool)

    served = [call.request.id for call in pool.nodes["a"].calls[1:]]
    assert served == [client.request.id for client in reversed(clients)]


def test_a_tenant_of_more_weight_gets_more_turns() -> None:
    pool = one_slot(weights={"y": 3.0})
    for tenant in "z" + "xy" * 20:
        pool.ask(tenant=tenant)
    for _ in range(21):
        finish(pool)

    assert Counter(names(pool.nodes["a"].calls[1:21])) == {"x": 5, "y": 15}


def test_models_are_served_in_blocks_where_a_node_holds_only_one() -> None:
    """AAAB, not ABAB, and B does not wait for ever."""
    pool = MemoryPool({}, admission=replace(ROOMY, max_wait_s=100.0), rules=NO_HEAD_START)
    pool.nodes["a"] = pool.join("a", 1, "m1", "m2", loaded="m1")
    for _ in range(30):
        pool.ask("m1")
        pool.ask("m2")
    while pool.nodes["a"].open_calls:
        call = pool.nodes["a"].open_calls[0]
        call.act("head")
        holds(pool, "a", call.request.model)
        pool.pass_time(1.0)
        call.act("end")

    order = "".join(call.request.model[1] for call in pool.nodes["a"].calls)
    assert len(order) == 60
    assert order.count("12") + order.count("21") <= 7
    assert order.startswith("1" * 5)
    assert "2" in order[:12]


def holds(pool: MemoryPool, name: str, model: str) -> None:
    """A probe finds this one model in memory."""
    state = pool.state(name)
    pool.fleet.reported(state, NodeReport(models=state.models, loaded={model: LoadedModel(name=model)}))


# what clients are told


def test_who_needs_not_wait_passes_straight_through() -> None:
    pool = one_slot()
    client = pool.ask()
    pool.nodes["a"].calls[0].act("head")

    assert isinstance(client.call, Run)
    assert client.heads[0].extra == b""
    assert pool.admitted.joined == 0


@pytest.mark.parametrize("act", ["head", "whole"])
def test_who_waited_is_told_its_place_in_the_head(act: str) -> None:
    pool = one_slot()
    pool.ask()
    clients = [pool.ask() for _ in range(2)]
    finish(pool)
    finish(pool)
    pool.nodes["a"].open_calls[0].act(act)

    assert clients[1].heads[0].extra == b"x-sutazai-queue-position: 2\r\n"


def test_the_time_until_its_turn_is_told_once_it_is_known() -> None:
    """A slot, a second for each request, three before it."""
    pool = one_slot()
    first = [pool.ask() for _ in range(2)]
    place = pool.admitted.place_of(first[1].request.id)
    assert place is not None
    assert place.eta_s is None
    busy_for(pool, 20)
    for _ in range(4):
        client = pool.ask()

    place = pool.admitted.place_of(client.request.id)
    assert place is not None
    assert place.eta_s is not None
    assert place.position == pool.admitted.waiting
    assert place.eta_s == pytest.approx(place.position, rel=0.3)


def test_the_place_changes_as_the_line_moves_and_ends_with_it() -> None:
    pool = one_slot()
    clients = [pool.ask() for _ in range(4)]
    seen = []
    for _ in range(4):
        seen.append(pool.position(clients[3]))
        finish(pool)

    assert seen == [3, 2, 1, 0]
    assert pool.admitted.place_of("nobody") is None


# leaving


def test_a_client_that_leaves_leaves_the_line() -> None:
    pool = one_slot()
    clients = [pool.ask() for _ in range(3)]
    clients[1].call.cancel()
    clients[1].call.cancel()
    finish(pool)

    assert [call.request.id for call in pool.nodes["a"].calls] == ["r1", "r3"]
    assert pool.admitted.left == 1
    assert not clients[1].heads
    assert not clients[1].errors


def test_a_client_that_leaves_after_it_waited_frees_the_node() -> None:
    pool = one_slot()
    clients = [pool.ask() for _ in range(2)]
    finish(pool)
    clients[1].call.cancel()

    assert pool.nodes["a"].open_calls == []
    assert pool.state("a").in_flight == 0


def test_a_pause_while_it_waits_is_told_to_the_node() -> None:
    pool = one_slot()
    clients = [pool.ask() for _ in range(2)]
    clients[1].call.pause()
    finish(pool)
    paused = pool.nodes["a"].open_calls[0].paused
    clients[1].call.resume()

    assert paused
    assert not pool.nodes["a"].open_calls[0].paused


# deadlines


def test_a_request_whose_deadline_has_passed_is_not_run() -> None:
    pool = one_slot()
    client = pool.ask(deadline_s=-1.0)

    assert isinstance(client.error, Overloaded)
    assert "deadline" in client.error.message
    assert pool.nodes["a"].calls == []


def test_a_deadline_that_passes_in_line_is_answered_and_the_request_never_run() -> None:
    pool = one_slot()
    pool.ask()
    client = pool.ask(deadline_s=2.0)
    pool.pass_time(1.9)
    assert not client.errors
    pool.pass_time(0.2)

    assert isinstance(client.error, Overloaded)
    assert "No slot became free before the deadline" in client.error.message
    assert client.error.retry_after_s > 0
    assert pool.admitted.expired == 1
    assert len(pool.nodes["a"].calls) == 1


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    pool = one_slot()
    pool.ask()
    busy_for(pool, 20)
    for _ in range(12):
        pool.ask()
    late, soon = pool.ask(deadline_s=5.0), pool.ask(deadline_s=25.0)

    assert isinstance(late.error, Overloaded)
    assert "after its deadline" in late.error.message
    assert late.error.retry_after_s == pytest.approx(8.0, abs=3.0)
    assert b"x-sutazai-queue-eta-seconds: " in late.error.extra
    assert not soon.errors
    assert pool.admitted.refused_late == 1


def test_nobody_is_refused_on_a_guess() -> None:
    """Nothing has ended yet, so it may well be in time."""
    pool = one_slot()
    for _ in range(50):
        pool.ask()

    assert not pool.ask(deadline_s=0.5).errors


def test_a_wait_that_is_plainly_too_long_is_refused_at_once() -> None:
    pool = one_slot(replace(ROOMY, max_wait_s=10.0))
    pool.ask()
    busy_for(pool, 8)
    clients = [pool.ask() for _ in range(30)]

    refused = [client.error for client in clients if client.errors]
    assert 10 <= len(refused) <= 20
    assert all("after the 10 s that a request may wait" in error.message for error in refused)


def test_a_slot_that_frees_after_the_deadline_runs_nothing() -> None:
    """Between two sweeps, too."""
    pool = one_slot()
    pool.ask()
    client = pool.ask(deadline_s=2.0)
    pool.clock.advance(2.1)
    pool.nodes["a"].open_calls[0].act("whole")

    assert "before the deadline" in client.error.message
    assert len(pool.nodes["a"].calls) == 1


# refusals


def test_a_greedy_tenant_makes_place_for_others() -> None:
    pool = MemoryPool({"a": 1})
    greedy = [pool.ask(tenant="x") for _ in range(2 + ADMISSION.max_waiting)]
    modest = pool.ask(tenant="y")
    again = pool.ask(tenant="x")

    assert isinstance(greedy[-1].error, TooManyWaiting)
    assert isinstance(again.error, TooManyWaiting)
    assert b"x-sutazai-queue-position: " in again.error.extra
    assert not modest.errors
    assert pool.position(modest) == 2
    assert pool.admitted.shed_greedy == 2
    assert pool.admitted.waiting == ADMISSION.max_waiting


def test_where_all_have_equally_much_the_pool_is_to_blame() -> None:
    pool = MemoryPool({"a": 1})
    for _ in range(2):
        pool.ask()
    for tenant in "wxyz":
        pool.ask(tenant=tenant)
    newcomer = pool.ask(tenant="v")

    assert isinstance(newcomer.error, Overloaded)
    assert pool.admitted.shed_full == 1


def test_retry_after_is_what_the_line_takes_to_drain() -> None:
    """Two in a second, and four in line."""
    pool = MemoryPool({"a": 1}, admission=ADMISSION, rules=NO_HEAD_START)
    for _ in range(2):
        pool.ask()
    for _ in range(40):
        pool.ask()
        finish(pool, seconds=0.5)
    while pool.admitted.waiting < ADMISSION.max_waiting:
        pool.ask()
    refused = pool.ask()

    assert isinstance(refused.error, Overloaded)
    assert refused.error.retry_after_s == pytest.approx(2.0, rel=0.2)


def test_bodies_in_line_are_bounded() -> None:
    pool = one_slot(ADMISSION)
    for _ in range(2):
        pool.ask(body=bytes(600))

    assert isinstance(pool.ask(body=bytes(600)).error, Overloaded)
    assert not pool.ask(body=bytes(400)).errors


def test_a_second_question_about_the_same_does_not_wait() -> None:
    """It was to be quicker than the first."""
    pool = MemoryPool({"a": 1}, rules=NO_HEAD_START)
    first = pool.ask()
    request = replace(first.request, id="r1.h1", avoid="a")
    told = Told(request)
    told.call = pool.admitted.start(request, told)

    assert isinstance(told.error, Overloaded)
    assert pool.admitted.waiting == 0


def test_those_who_wait_are_told_when_every_node_is_down() -> None:
    pool = one_slot()
    clients = [pool.ask(tenant=tenant) for tenant in "xxy"]
    for _ in range(3):
        pool.fleet.failed_probe(pool.state("a"), NodeUnreachable("It was refused.", node="a"))

    assert [type(client.error) for client in clients[1:]] == [NoHealthyNode] * 2
    assert pool.admitted.waiting == 0


def test_smaller_bounds_send_nobody_away_who_waits() -> None:
    pool = one_slot()
    clients = [pool.ask() for _ in range(10)]
    pool.admitted.adopt(replace(ROOMY, max_waiting=2))
    refused = pool.ask()

    assert refused.errors
    assert not any(client.errors for client in clients)
    assert pool.admitted.waiting_by_model() == {"m1": 9}


def test_what_happened_to_those_who_waited_adds_up() -> None:
    pool = one_slot(ADMISSION)
    clients = [pool.ask() for _ in range(4)]
    clients[3].call.cancel()
    pool.nodes["a"].open_calls[0].act("whole")
    pool.pass_time(ADMISSION.max_wait_s + 1.0)
    stage = pool.admitted

    assert (stage.joined, stage.served, stage.left, stage.expired) == (3, 1, 1, 1)


# everything, in any order


class AdmittedMachine(RuleBasedStateMachine):
    """
    A pool whose nodes hold one model at a time, and another that holds all, with tenants of several kinds.

    That calls and replies stay in order is proven by the machine of `test_routed.py`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = MemoryPool({}, weights={"z": 2.0})
        self.clients: list[Told] = []
        self.gone: set[str] = set()

    @initialize()
    def begin(self) -> None:
        self.pool.nodes["small"] = self.pool.join("small", 1, "m1", "m2", loaded="m1")
        self.pool.nodes["other"] = self.pool.join("other", 2, "m2", "m3", loaded="m3")
        self.pool.nodes["large"] = self.pool.join("large", 2, "m1")

    @rule(
        model=st.sampled_from(["m1", "m2", "m3"]),
        tenant=st.sampled_from("xxyz"),
        priority=st.sampled_from(Priority),
        deadline_s=st.sampled_from([0.0, 0.0, 3.0, 20.0]),
        size_bytes=st.sampled_from([8, 80, 600]),
    )
    def client_asks(self, model: str, tenant: str, priority: Priority, deadline_s: float, size_bytes: int) -> None:
        body = bytes(size_bytes)
        self.clients.append(self.pool.ask(model, tenant=tenant, priority=priority, deadline_s=deadline_s, body=body))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.live))
        self.gone.add(client.request.id)
        client.call.cancel()

    @precondition(lambda self: self.open_calls)
    @rule(data=st.data(), act=st.sampled_from(ACTS))
    def node_answers(self, data: st.DataObject, act: str) -> None:
        call = data.draw(st.sampled_from(self.open_calls))
        call.act(act)

    @precondition(lambda self: self.open_calls)
    @rule(data=st.data(), acts=st.lists(st.sampled_from(ACTS), min_size=1, max_size=3))
    def node_will_answer_at_once(self, data: st.DataObject, acts: list[str]) -> None:
        data.draw(st.sampled_from(self.open_calls)).node.at_once.append(acts)

    @rule(name=st.sampled_from(["small", "other"]), data=st.data())
    def probe_finds_a_model_in_memory(self, name: str, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(sorted(self.pool.state(name).models)))
        holds(self.pool, name, model)

    @rule(name=st.sampled_from(["small", "other", "large"]), times=st.integers(1, 3))
    def probe_fails(self, name: str, times: int) -> None:
        for _ in range(times):
            self.pool.fleet.failed_probe(self.pool.state(name), NodeUnreachable("It was away.", node=name))

    @rule()
    def large_node_comes_back(self) -> None:
        self.pool.fleet.reported(self.pool.state("large"), NodeReport(models={"m1": ModelInfo(name="m1")}, loaded=None))

    @rule(seconds=st.sampled_from([0.1, 2.0, 12.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.pool.pass_time(seconds)

    @rule(head_start=st.integers(0, 2))
    def settings_are_adopted(self, head_start: int) -> None:
        self.pool.fleet.rules = RoutingRules(head_start=head_start, slow_start_s=10.0, failure_penalty_s=10.0)
        self.pool.routed.adopt(patience=PATIENCE, retry=RETRY)

    @invariant()
    def every_request_has_one_end_or_none_yet(self) -> None:
        for client in self.clients:
            ends = len(client.ends) + len(client.errors)

            assert ends <= 1
            assert not (ends and self.place_of(client)), "it was answered and still waits"
        known = {run.request.id for run in self.pool.routed.runs}
        known |= {client.request.id for client in self.clients if self.place_of(client)}
        assert known == {client.request.id for client in self.live}

    @invariant()
    def nobody_waits_for_a_slot_that_it_could_have(self) -> None:
        for client in self.live:
            if self.place_of(client):
                assert self.pool.fleet.room(client.request.model) is Room.NONE
                assert self.pool.fleet.choose(client.request, (), self.pool.clock.now) is None

    @invariant()
    def the_lines_are_bounded(self) -> None:
        for model, count in self.pool.admitted.waiting_by_model().items():
            bodies = [len(one.request.body) for one in self.live if one.request.model == model and self.place_of(one)]

            assert count == len(bodies) <= ADMISSION.max_waiting
            assert sum(bodies) <= ADMISSION.max_waiting_bytes

    @invariant()
    def no_node_has_more_than_it_may(self) -> None:
        for name, node in self.pool.nodes.items():
            assert self.pool.state(name).in_flight == len(node.open_calls)

    def teardown(self) -> None:
        for _ in range(12):
            for call in self.open_calls:
                call.act("end")
            self.pool.pass_time(200.0)

        assert not self.live
        assert not self.pool.routed.runs
        assert self.pool.admitted.waiting == 0
        assert self.pool.admitted._shares.waiting == 0
        assert not any(share.unsettled for share in self.pool.admitted._shares._shares.values())
        assert all(self.pool.state(name).in_flight == 0 for name in self.pool.nodes)

    # parts

    def place_of(self, client: Told) -> bool:
        return self.pool.admitted.place_of(client.request.id) is not None

    @property
    def live(self) -> list[Told]:
        return [one for one in self.clients if not one.ends and not one.errors and one.request.id not in self.gone]

    @property
    def open_calls(self) -> list[NodeCall]:
        return [call for node in self.pool.nodes.values() for call in node.open_calls]


TestAdmitted = AdmittedMachine.TestCase
TestAdmitted.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
