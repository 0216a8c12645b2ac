"""Fleet, routing and waiting room in any order of events: nothing is lost, counted twice, or said after the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sutazai.core.errors import (
    BadRequest,
    NodeRejected,
    NodeTimeout,
    NodeUnreachable,
    NoHealthyNode,
    Overloaded,
    SutazaiError,
    UnknownModel,
)
from sutazai.core.node import Health, ModelInfo, Node, NodeKind, NodeReport, NodeState
from sutazai.core.request import Endpoint, Head, Priority, Request, Usage
from sutazai.gateway.routed import Stage
from sutazai.policy.health import Outcome
from sutazai.policy.retry import RetryRules
from sutazai.policy.routing import Room, RoutingRules
from sutazai.ports.inference import Call
from sutazai.testing.memory_pool import ACTS, ADMISSION, PATIENCE, RETRY, MemoryNode, MemoryPool, NodeCall

MODELS = {"a": ("m1",), "b": ("m1", "m2"), "c": ("m2",)}
"""By node."""


class Client:
    """The reply of one request; it complains about anything that comes out of turn."""

    def __init__(self, request: Request, *, leaves_at_head: bool, at_end: Callable[[], None]) -> None:
        self.request = request
        self.call: Call | None = None
        self.headed = False
        self.ended = False
        self.left = False
        self.paused = False
        self._leaves_at_head = leaves_at_head
        self._at_end = at_end

    @property
    def is_done(self) -> bool:
        return self.ended or self.left

    def leave(self) -> None:
        """Only who holds the call can end it; a client that leaves before that does so right after `start`."""
        if self.call is not None:
            self.left = self.left or not self.ended
            self.call.cancel()

    def head(self, head: Head) -> None:
        assert not self.is_done
        assert not self.headed
        self.headed = True
        assert head.reason
        if self._leaves_at_head:
            self.leave()

    def chunk(self, data: bytes) -> None:
        assert self.headed
        assert not self.is_done

    def end(self, usage: Usage | None) -> None:
        assert self.headed
        self._finish()

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        assert not self.headed
        self._finish()

    def fail(self, error: SutazaiError) -> None:
        assert error.message
        self._finish()

    def _finish(self) -> None:
        assert not self.is_done
        self.ended = True
        self._at_end()


class RoutedMachine(RuleBasedStateMachine):
    """All that can happen to a pool of three nodes."""

    def __init__(self) -> None:
        super().__init__()
        pool = MemoryPool({})
        self.clock, self.fleet, self.routed, self.admitted = pool.clock, pool.fleet, pool.routed, pool.admitted
        self.clients: list[Client] = []
        self.members: list[tuple[NodeState, MemoryNode]] = []
        """Every node that ever was in the fleet."""
        self.most_waiting = ADMISSION.max_waiting
        self.asked = 0
        self.swept_at = 0.0

    @initialize()
    def begin(self) -> None:
        for name in MODELS:
            self.node_joins(name)
            self.probe_succeeds(name, 0)

    # clients

    @rule(
        model=st.sampled_from(["m1", "m2", "m2", "unknown"]),
        tenant=st.sampled_from("xyz"),
        priority=st.sampled_from(Priority),
        deadline_s=st.sampled_from([0.0, 0.0, 5.0, 50.0]),
        size_bytes=st.sampled_from([10, 100, 600]),
        leaves_at_head=st.sampled_from([False, False, False, True]),
        asks_again=st.booleans(),
    )
    def client_asks(
        self,
        model: str,
        tenant: str,
        priority: Priority,
        deadline_s: float,
        size_bytes: int,
        leaves_at_head: bool,
        asks_again: bool,
    ) -> None:
        self.asked += 1
        now = self.clock.now
        request = Request(f"r{self.asked}", Endpoint.OPENAI_CHAT, model, True, bytes(size_bytes), tenant, "", now)
        request.priority = priority
        request.deadline_at = now + deadline_s if deadline_s else 0.0

        def ask_again() -> None:
            """The next request of a connection begins within the end of the last."""
            if asks_again:
                self.client_asks(model, tenant, priority, deadline_s, size_bytes, False, False)

        client = Client(request, leaves_at_head=leaves_at_head, at_end=ask_again)
        self.clients.append(client)
        client.call = self.admitted.start(request, client)
        if leaves_at_head and client.headed:
            client.leave()

    @precondition(lambda self: any(not client.is_done for client in self.clients))
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.live)).leave()

    @precondition(lambda self: any(client.is_done for client in self.clients))
    @rule(data=st.data())
    def client_leaves_late(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from([client for client in self.clients if client.is_done])).leave()

    @precondition(lambda self: any(not client.is_done for client in self.clients))
    @rule(data=st.data(), reads=st.booleans())
    def client_pauses_or_reads_on(self, data: st.DataObject, reads: bool) -> None:
        client = data.draw(st.sampled_from(self.live))
        assert client.call is not None
        client.paused = not reads
        if reads:
            client.call.resume()
        else:
            client.call.pause()

    # nodes

    @precondition(lambda self: self.open_calls)
    @rule(data=st.data(), act=st.sampled_from(ACTS))
    def node_answers(self, data: st.DataObject, act: str) -> None:
        data.draw(st.sampled_from(self.open_calls)).act(act)

    @rule(name=st.sampled_from(list(MODELS)), acts=st.lists(st.sampled_from(ACTS), min_size=1, max_size=3))
    def node_will_answer_at_once(self, name: str, acts: list[str]) -> None:
        state = self.fleet.state(name)
        if state is not None:
            self.memory_node(state).at_once.append(acts)

    @rule(name=st.sampled_from(list(MODELS)), running=st.integers(0, 3))
    def probe_succeeds(self, name: str, running: int) -> None:
        state = self.fleet.state(name)
        if state is not None:
            models = {model: ModelInfo(name=model) for model in MODELS[name]}
            self.fleet.reported(state, NodeReport(models=models, loaded=None, running=running))

            assert state.health is Health.UP

    @rule(name=st.sampled_from(list(MODELS)), times=st.integers(1, 3))
    def probe_fails(self, name: str, times: int) -> None:
        state = self.fleet.state(name)
        if state is not None:
            for _ in range(times):
                self.fleet.failed_probe(state, NodeUnreachable("It was away.", node=name))

    @rule(name=st.sampled_from(list(MODELS)))
    def node_leaves(self, name: str) -> None:
        self.fleet.remove(name)

    @rule(name=st.sampled_from(list(MODELS)))
    def node_joins(self, name: str) -> None:
        assume(self.fleet.state(name) is None)
        node = Node(name=name, kind=NodeKind.OPENAI, url=f"http://{name}")
        client = MemoryNode(node, self._node_started)
        self.members.append((self.fleet.add(node, client, slots=1 + (name == "b")), client))

    # time and settings

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0, 25.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.sweep()

    @rule(head_start=st.integers(0, 2), max_waiting=st.integers(0, 6), attempts=st.integers(1, 4))
    def settings_are_adopted(self, head_start: int, max_waiting: int, attempts: int) -> None:
        self.fleet.rules = RoutingRules(head_start=head_start, slow_start_s=10.0, failure_penalty_s=10.0)
        self.most_waiting = max(*self.admitted.waiting_by_model().values(), max_waiting, 0)
        self.admitted.adopt(replace(ADMISSION, max_waiting=max_waiting))
        self.routed.adopt(patience=PATIENCE, retry=replace(RETRY, attempts=attempts))

    # what must hold

    @invariant()
    def every_lease_is_a_request_at_the_node(self) -> None:
        for state, node in self.members:
            assert state.in_flight == len(node.open_calls)

    @invariant()
    def no_counter_is_negative(self) -> None:
        for state, _ in self.members:
            assert min(state.in_flight, state.failures, state.foreign) >= 0
            assert state.penalty >= 0.0

    @invariant()
    def every_client_that_waits_is_known_and_no_other(self) -> None:
        sent = {run.request.id for run in self.routed.runs}
        waiting = {client.request.id for client in self.clients if self.admitted.place_of(client.request.id)}

        assert not sent & waiting
        assert sent | waiting == {client.request.id for client in self.live}
        assert self.admitted.waiting == len(waiting) + self.routed.waiting
        assert sum(self.admitted.waiting_by_model().values()) == len(waiting)

    @invariant()
    def the_lines_are_bounded(self) -> None:
        for model, count in self.admitted.waiting_by_model().items():
            waiting = [client for client in self.waiting if client.request.model == model]

            assert count <= self.most_waiting
            assert sum(len(client.request.body) for client in waiting) <= ADMISSION.max_waiting_bytes

    @invariant()
    def nobody_waits_for_a_slot_that_is_free(self) -> None:
        for model in self.admitted.waiting_by_model():
            assert self.fleet.room(model) is Room.NONE
            assert any(state.health is Health.UP for state in self.fleet.candidates(model))
        for run in self.routed.runs:
            if run.stage is Stage.WAITING:
                assert self.fleet.choose(run.request, run.tried, self.clock.now) is None

    @invariant()
    def nobody_waits_past_its_time(self) -> None:
        for client in self.waiting:
            waited_s = self.swept_at - client.request.arrived_at

            assert waited_s <= ADMISSION.max_wait_s
            assert not 0.0 < client.request.deadline_at < self.swept_at

    @invariant()
    def a_node_is_read_exactly_while_its_client_reads(self) -> None:
        for client in self.live:
            calls = [call for call in self.open_calls if call.request is client.request]

            assert [call.paused for call in calls] in ([], [client.paused])

    def teardown(self) -> None:
        """Whatever happened: once the nodes have answered and time has passed, nothing is left."""
        for _ in range(10):
            for call in self.open_calls:
                call.act("end")
            self.clock.advance(200.0)
            self.sweep()

        assert all(client.is_done for client in self.clients)
        assert not self.routed.runs
        assert self.admitted.waiting == 0
        assert all(state.in_flight == 0 for state, _ in self.members)

    # parts

    def sweep(self) -> None:
        self.swept_at = self.clock.now
        self.routed.sweep()
        self.admitted.sweep()

    @property
    def live(self) -> list[Client]:
        return [client for client in self.clients if not client.is_done]

    @property
    def waiting(self) -> list[Client]:
        return [client for client in self.live if self.admitted.place_of(client.request.id)]

    @property
    def open_calls(self) -> list[NodeCall]:
        return [call for _, node in self.members for call in node.open_calls]

    def memory_node(self, state: NodeState) -> MemoryNode:
        return next(node for member, node in self.members if member is state)

    def _node_started(self, node: MemoryNode, request: Request) -> None:
        state = next(member for member, client in self.members if client is node)
        assert state.in_flight <= state.slots + self.fleet.rules.head_start
        assert state.health is Health.UP
        assert not state.draining
        assert request.model in state.models
        client = next(client for client in self.clients if client.request is request)
        assert not client.headed, "it was tried again after something was said"
        assert not client.is_done


TestRouted = RoutedMachine.TestCase
TestRouted.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def test_a_silent_node_times_out_and_is_named() -> None:
    pool = MemoryPool({"a": 1})
    client = pool.ask()
    pool.pass_time(PATIENCE.first_token_s + 1)

    assert isinstance(client.error, NodeTimeout)
    assert client.error.node == "a"
    assert "no token within 20 s" in client.error.message
    assert pool.nodes["a"].open_calls == []


def test_a_stream_that_falls_silent_times_out_sooner() -> None:
    pool = MemoryPool({"a": 1})
    client = pool.ask()
    pool.nodes["a"].calls[0].act("chunk")
    pool.pass_time(PATIENCE.idle_s - 1)
    assert not client.errors
    pool.pass_time(2.0)

    assert "fell silent for 5 s" in client.error.message


def test_the_silence_of_a_client_that_does_not_read_is_not_the_nodes() -> None:
    pool = MemoryPool({"a": 1})
    client = pool.ask()
    pool.nodes["a"].calls[0].act("chunk")
    client.call.pause()
    pool.pass_time(60.0)
    client.call.resume()
    pool.pass_time(PATIENCE.idle_s - 1)

    assert not client.errors


def test_a_stream_that_never_ends_is_ended_and_its_node_is_not_blamed() -> None:
    pool = MemoryPool({"a": 1})
    client = pool.ask()
    for _ in range(31):
        pool.nodes["a"].calls[0].act("chunk")
        pool.pass_time(4.0)

    assert "not complete after 120 s" in client.error.message
    assert pool.state("a").failures == 0
    assert pool.state("a").penalty == 0.0


def test_an_answer_is_never_tried_again_once_it_has_begun() -> None:
    pool = MemoryPool({"a": 1, "b": 1})
    client = pool.ask()
    (call,) = [call for node in pool.nodes.values() for call in node.open_calls]
    call.act("head")
    call.act("reset")
    pool.pass_time(5.0)

    assert isinstance(client.error, NodeUnreachable)
    assert sum(len(node.calls) for node in pool.nodes.values()) == 1


@pytest.mark.parametrize("fault", ["reset", "unreached", "busy"])
def test_another_node_is_tried_while_nothing_was_said(fault: str) -> None:
    pool = MemoryPool({"a": 1, "b": 1})
    client = pool.ask()
    (call,) = [call for node in pool.nodes.values() for call in node.open_calls]
    call.act(fault)
    pool.pass_time(1.0)
    (again,) = [call for node in pool.nodes.values() for call in node.open_calls]
    again.act("whole")

    assert again.node is not call.node
    assert client.ends
    assert client.heads[0].reason.endswith("attempt 2")
    assert pool.faults[0][0] == call.node.node.name


@pytest.mark.parametrize("fault", ["sick", "refused"])
def test_what_another_node_would_not_do_better_is_told_at_once(fault: str) -> None:
    pool = MemoryPool({"a": 1, "b": 1})
    client = pool.ask()
    (call,) = [call for node in pool.nodes.values() for call in node.open_calls]
    call.act(fault)

    assert isinstance(client.error, NodeRejected)
    assert not pool.routed.runs


def test_a_mistake_of_the_client_is_not_counted_against_the_node() -> None:
    """Some requests cannot be said in the node's dialect; no node was asked."""
    pool = MemoryPool({"a": 1})
    client = pool.ask()
    pool.nodes["a"].calls[0].act("untranslatable")

    assert isinstance(client.error, BadRequest)
    assert pool.faults == []
    assert pool.state("a").penalty == 0.0


def test_when_everything_fails_retries_stay_within_the_budget() -> None:
    """2,000 requests at once get 20 % more attempts, and what is always allowed."""
    pool = MemoryPool({"a": 1000, "b": 1000, "c": 1000}, retry=RETRY)
    pool.routed.adopt(
        patience=PATIENCE,
        retry=RetryRules(attempts=5, budget_ratio=0.2, budget_minimum_per_s=3.0, backoff_s=0.01, backoff_max_s=0.01),
    )
    clients = [pool.ask() for _ in range(2000)]
    pool.routed.sweep()
    while pool.routed.runs:
        for node in pool.nodes.values():
            for call in node.open_calls:
                call.act("busy")
        pool.clock.advance(0.02)

    attempts = sum(len(node.calls) for node in pool.nodes.values())
    assert all(client.errors for client in clients)
    assert 2400 < attempts <= 2400 + 30 + 1


def test_nodes_go_down_after_three_failures_and_those_who_wait_are_told() -> None:
    """The line is not held up by nodes that are away."""
    pool = MemoryPool({"a": 1})
    clients = [pool.ask() for _ in range(4)]
    for _ in range(3):
        pool.fleet.failed_probe(pool.state("a"), NodeUnreachable("It was refused.", node="a"))

    assert pool.state("a").health is Health.DOWN
    assert [type(client.error) for client in clients[2:]] == [NoHealthyNode, NoHealthyNode]
    assert "a: It was refused." in clients[3].error.message
    assert not clients[0].errors, "what is under way may yet end well"


def test_those_who_wait_for_a_node_that_leaves_are_told() -> None:
    pool = MemoryPool({"a": 1})
    clients = [pool.ask() for _ in range(3)]
    pool.fleet.remove("a")

    assert clients[2].errors
    pool.nodes["a"].calls[0].act("whole")
    assert clients[0].ends


def test_a_model_that_nobody_has_is_told_with_names_like_it() -> None:
    pool = MemoryPool({"a": 1})
    client = pool.ask("m")

    assert isinstance(client.error, UnknownModel)
    assert client.error.nearest == ("m1",)


def test_a_larger_head_start_serves_those_who_wait() -> None:
    pool = MemoryPool({"a": 1})
    clients = [pool.ask() for _ in range(4)]
    pool.fleet.rules = RoutingRules(head_start=3, slow_start_s=10.0, failure_penalty_s=10.0)
    pool.routed.adopt(patience=PATIENCE, retry=RETRY)

    assert pool.admitted.waiting == 0
    assert len(pool.nodes["a"].open_calls) == len(clients)


def test_a_client_that_leaves_while_its_answer_begins_frees_the_node() -> None:
    """Within `start` nobody holds the node's call yet."""
    pool = MemoryPool({"a": 1})
    for _ in range(2):
        pool.ask()
    waiting = pool.ask()
    waiting.at_head = waiting.call.cancel
    pool.nodes["a"].at_once.append(["head"])
    pool.nodes["a"].calls[0].act("whole")

    assert pool.nodes["a"].calls[2].over
    assert pool.state("a").in_flight == 1


def test_a_slot_that_frees_while_the_line_is_served_is_not_forgotten() -> None:
    pool = MemoryPool({"a": 1})
    other = pool.join("b", 1, "m2")
    holding = [pool.ask("m1"), pool.ask("m1")]
    pool.ask("m2")
    pool.ask("m2")
    first, second = pool.ask("m1"), pool.ask("m2")
    second.at_fail = holding[0].call.cancel
    other.at_once.append(["sick"])
    other.open_calls[0].act("whole")

    assert second.errors
    assert pool.position(first) == 0
    assert pool.nodes["a"].calls[2].request is first.request


def test_a_client_that_asks_again_as_it_is_refused_is_refused_again() -> None:
    """It must not be left in a line that nobody serves."""
    pool = MemoryPool({"a": 1})
    clients = [pool.ask() for _ in range(4)]
    clients[2].at_fail = lambda: clients.append(pool.ask())
    for _ in range(3):
        pool.fleet.failed_probe(pool.state("a"), NodeUnreachable("It was refused.", node="a"))

    assert pool.admitted.waiting == 0
    assert isinstance(clients[4].error, NoHealthyNode)


def test_failures_fade_and_then_the_node_is_tried_again() -> None:
    """A request that waits for the sound node goes to the other one as soon as that may do."""
    pool = MemoryPool({"sound": 1})
    pool.ask()
    other = pool.ask()
    failing = pool.join("failing", 1)
    for _ in range(3):
        pool.fleet.lease(pool.state("failing"), other.request, pool.clock.now).end(Outcome.SICK)
    client = pool.ask()
    assert pool.position(client) == 1
    pool.pass_time(8.0)

    assert [call.request for call in failing.calls] == [client.request]


def test_a_request_is_tried_as_often_as_the_settings_say() -> None:
    pool = MemoryPool(dict.fromkeys("abcde", 1))
    client = pool.ask()
    for _ in range(5):
        for node in pool.nodes.values():
            for call in node.open_calls:
                call.act("busy")
        pool.pass_time(2.0)

    assert isinstance(client.error, NodeRejected)
    assert sum(len(node.calls) for node in pool.nodes.values()) == RETRY.attempts


def test_a_pause_is_told_to_the_next_attempt() -> None:
    pool = MemoryPool({"a": 1, "b": 1})
    client = pool.ask()
    client.call.pause()
    (call,) = [call for node in pool.nodes.values() for call in node.open_calls]
    call.act("reset")
    pool.pass_time(1.0)
    (again,) = [call for node in pool.nodes.values() for call in node.open_calls]

    assert again.paused


def test_a_deadline_ends_what_was_sent_and_is_named() -> None:
    pool = MemoryPool({"a": 1})
    client = pool.ask(deadline_s=3.0)
    pool.nodes["a"].calls[0].act("chunk")
    pool.pass_time(2.9)
    assert not client.errors
    pool.pass_time(0.2)

    assert isinstance(client.error, NodeTimeout)
    assert "at the deadline of the request, 3 s after it came" in client.error.message
    assert pool.nodes["a"].open_calls == []
    assert pool.state("a").failures == 0


def test_a_request_that_is_to_be_tried_again_goes_before_those_who_wait() -> None:
    """It waits for the other node, which is full, and gets its next slot."""
    pool = MemoryPool({"a": 1, "b": 1})
    clients = [pool.ask() for _ in range(4)]
    newcomer = pool.ask()
    (failed,) = [call for call in pool.nodes["a"].open_calls if call.request is clients[0].request] or [
        call for call in pool.nodes["b"].open_calls if call.request is clients[0].request
    ]
    failed.act("reset")
    pool.pass_time(1.0)
    assert pool.position(newcomer) == 0, "the slot that the failure freed went to who waited"
    waiting = pool.ask()
    other = pool.nodes["b" if failed.node is pool.nodes["a"] else "a"]
    other.open_calls[0].act("whole")

    assert other.calls[-1].request is clients[0].request
    assert pool.position(waiting) == 1


def test_retries_that_wait_are_answered_when_their_time_is_over() -> None:
    pool = MemoryPool({"a": 1, "b": 1})
    clients = [pool.ask() for _ in range(5)]
    (failed,) = [call for node in pool.nodes.values() for call in node.open_calls if call.request.id == "r1"]
    failed.act("reset")
    for _ in range(8):
        pool.pass_time(4.5)
        for node in pool.nodes.values():
            for call in node.open_calls:
                call.act("chunk")

    assert isinstance(clients[0].error, Overloaded)
    assert "No slot became free within 30 s" in clients[0].error.message
    assert not pool.admitted.waiting
