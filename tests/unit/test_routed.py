"""Fleet and routing under any order of events: nothing is lost, counted twice, or said after the end."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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
from sutazai.core.request import Endpoint, Head, Request, Usage
from sutazai.gateway.fleet import Fleet
from sutazai.gateway.routed import Patience, Routed, Run
from sutazai.policy.health import Outcome
from sutazai.policy.retry import RetryRules
from sutazai.policy.routing import RoutingRules, has_room, penalty_now
from sutazai.ports.inference import Reply

MODELS = {"a": ("m1",), "b": ("m1", "m2"), "c": ("m2",)}
"""By node."""
PATIENCE = Patience(first_token_s=20.0, idle_s=5.0, total_s=120.0, max_wait_s=30.0, max_waiting=4)
RETRY = RetryRules(attempts=3, budget_ratio=0.2, budget_minimum_per_s=3.0, backoff_s=0.5, backoff_max_s=2.0)
RULES = RoutingRules(head_start=1, slow_start_s=10.0, failure_penalty_s=10.0)


@dataclass(slots=True)
class Timer:
    """One entry of the clock."""

    callback: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass(slots=True)
class Clock:
    """Virtual time: it moves when it is told to."""

    now: float = 1000.0
    timers: list[tuple[float, int, Timer]] = field(default_factory=list)
    count: itertools.count[int] = field(default_factory=itertools.count)

    def __call__(self) -> float:
        return self.now

    def later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self.timers, (self.now + delay_s, next(self.count), timer))
        return timer

    def advance(self, by_s: float) -> None:
        until = self.now + by_s
        while self.timers and self.timers[0][0] <= until:
            self.now, _, timer = heapq.heappop(self.timers)
            if not timer.cancelled:
                timer.callback()
        self.now = until


@dataclass(slots=True, eq=False)
class NodeCall:
    """One request at a node, as the node sees it."""

    node: MemoryNode
    request: Request
    reply: Reply
    headed: bool = False
    over: bool = False
    paused: bool = False

    def cancel(self) -> None:
        self.over = True

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def act(self, what: str) -> None:
        """Answer as far as the contract allows now."""
        if self.over:
            return
        if what == "whole" and not self.headed:
            self.over = True
            self.reply.whole(self._head(), b"all", Usage(1, 2))
        elif what == "end":
            self._begin()
            self._end()
        elif what == "chunk":
            self._begin()
            if not self.over:
                self.reply.chunk(b"part")
        elif what == "head":
            self._begin()
        elif what in ERRORS:
            self.over = True
            self.reply.fail(ERRORS[what](self.node.node.name))

    def _begin(self) -> None:
        if not self.headed:
            self.headed = True
            self.reply.head(self._head())

    def _end(self) -> None:
        if not self.over:
            self.over = True
            self.reply.end(None)

    def _head(self) -> Head:
        return Head(200, b"text/plain", None, self.node.node.name, "")


ERRORS: Mapping[str, Callable[[str], SutazaiError]] = {
    "reset": lambda node: NodeUnreachable("It was reset.", node=node),
    "unreached": lambda node: NodeTimeout("It did not accept.", node=node, connecting=True),
    "busy": lambda node: NodeRejected("It was busy.", node=node, status=503),
    "sick": lambda node: NodeRejected("It broke.", node=node, status=500),
    "refused": lambda node: NodeRejected("It refused.", node=node, status=400),
    "untranslatable": lambda _: BadRequest("Images must be sent as data."),
}
ACTS = ["head", "chunk", "end", "whole", *ERRORS]


class MemoryNode:
    """A node without a network: it does what it is told, now or as soon as a request comes."""

    def __init__(self, node: Node, on_start: Callable[[MemoryNode, Request], None]) -> None:
        self.node = node
        self.calls: list[NodeCall] = []
        self.at_once: deque[list[str]] = deque()
        """What the next requests get before `start` returns."""
        self._on_start = on_start

    @property
    def open_calls(self) -> list[NodeCall]:
        return [call for call in self.calls if not call.over]

    def start(self, request: Request, reply: Reply) -> NodeCall:
        call = NodeCall(self, request, reply)
        self.calls.append(call)
        self._on_start(self, request)
        for act in self.at_once.popleft() if self.at_once else ():
            call.act(act)
        return call

    async def probe(self) -> NodeReport:
        raise AssertionError("the machine reports")

    async def show(self, model: str) -> Mapping[str, object]:
        raise AssertionError("nobody asks")

    async def close(self) -> None:
        raise AssertionError("nobody closes")


class Client:
    """The reply of one request; it complains about anything that comes out of turn."""

    def __init__(self, request: Request, *, leaves_at_head: bool, at_end: Callable[[], None]) -> None:
        self.request = request
        self.run: Run | None = None
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
        if self.run is not None:
            self.left = self.left or not self.ended
            self.run.cancel()

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
        self.clock = Clock()
        self.fleet = Fleet(RULES, failures_to_down=3, clock=self.clock)
        self.faults: list[str] = []
        self.routed = Routed(
            self.fleet,
            patience=PATIENCE,
            retry=RETRY,
            random=random.Random(1).random,
            later=self.clock.later,
            on_fault=lambda node, _model, _error: self.faults.append(node),
        )
        self.clients: list[Client] = []
        self.members: list[tuple[NodeState, MemoryNode]] = []
        """Every node that ever was in the fleet."""
        self.most_waiting = PATIENCE.max_waiting
        self.asked = 0

    @initialize()
    def begin(self) -> None:
        for name in MODELS:
            self.node_joins(name)
            self.probe_succeeds(name, 0)

    # clients

    @rule(
        model=st.sampled_from(["m1", "m2", "m2", "unknown"]),
        leaves_at_head=st.sampled_from([False, False, False, True]),
        asks_again=st.booleans(),
    )
    def client_asks(self, model: str, leaves_at_head: bool, asks_again: bool) -> None:
        self.asked += 1
        request = Request(f"r{self.asked}", Endpoint.OPENAI_CHAT, model, True, b"{}", "local", "", self.clock.now)

        def ask_again() -> None:
            """The next request of a connection begins within the end of the last."""
            if asks_again:
                self.client_asks(model, False, False)

        client = Client(request, leaves_at_head=leaves_at_head, at_end=ask_again)
        self.clients.append(client)
        run = self.routed.start(request, client)
        assert isinstance(run, Run)
        client.run = run
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
        assert client.run is not None
        client.paused = not reads
        if reads:
            client.run.resume()
        else:
            client.run.pause()

    @precondition(lambda self: any(not client.is_done for client in self.clients))
    @rule(data=st.data())
    def operator_cancels(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.live))
        assert client.run is not None
        client.run.end_by_operator()

        assert client.ended

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
        self.routed.sweep()

        for run in self.routed.runs:
            assert not self.routed.position(run) or self.routed.choose(run, self.clock.now) is None

    @rule(head_start=st.integers(0, 2), max_waiting=st.integers(0, 6), attempts=st.integers(1, 4))
    def settings_are_adopted(self, head_start: int, max_waiting: int, attempts: int) -> None:
        self.fleet.rules = RoutingRules(head_start=head_start, slow_start_s=10.0, failure_penalty_s=10.0)
        self.most_waiting = max(self.routed.waiting, max_waiting)
        self.routed.adopt(
            patience=Patience(first_token_s=20.0, idle_s=5.0, total_s=120.0, max_wait_s=30.0, max_waiting=max_waiting),
            retry=RetryRules(
                attempts=attempts,
                budget_ratio=0.2,
                budget_minimum_per_s=3.0,
                backoff_s=0.5,
                backoff_max_s=2.0,
            ),
        )

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
        known = {run.request.id for run in self.routed.runs}

        assert known == {client.request.id for client in self.live}

    @invariant()
    def the_line_is_bounded(self) -> None:
        assert self.routed.waiting <= self.most_waiting

    @invariant()
    def nobody_waits_for_a_slot_that_is_free(self) -> None:
        for run in self.routed.runs:
            if self.routed.position(run):
                candidates = self.fleet.candidates(run.request.model)

                assert any(state.health is Health.UP for state in candidates)
                assert not any(self._is_sound_and_free(state, run) for state in candidates)

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
            self.routed.sweep()

        assert all(client.is_done for client in self.clients)
        assert not self.routed.runs
        assert self.routed.waiting == 0
        assert all(state.in_flight == 0 for state, _ in self.members)

    # parts

    @property
    def live(self) -> list[Client]:
        return [client for client in self.clients if not client.is_done]

    @property
    def open_calls(self) -> list[NodeCall]:
        return [call for _, node in self.members for call in node.open_calls]

    def _is_sound_and_free(self, state: NodeState, run: Run) -> bool:
        ghosts = penalty_now(state, self.clock.now, self.fleet.rules)
        return has_room(state, self.fleet.rules) and ghosts < 1.0 and state not in run.tried

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


class Bench:
    """A pool to try one thing on."""

    def __init__(self, slots: Mapping[str, int], *, patience: Patience = PATIENCE, retry: RetryRules = RETRY) -> None:
        self.clock = Clock()
        self.fleet = Fleet(RULES, failures_to_down=3, clock=self.clock)
        self.faults: list[tuple[str, str]] = []
        self.routed = Routed(
            self.fleet,
            patience=patience,
            retry=retry,
            random=random.Random(1).random,
            later=self.clock.later,
            on_fault=lambda node, _model, error: self.faults.append((node, type(error).__name__)),
        )
        self.nodes = {name: self.join(name, count) for name, count in slots.items()}
        self.asked = 0

    def join(self, name: str, slots: int, model: str = "m1") -> MemoryNode:
        """A node comes in, and has one model."""
        node = Node(name=name, kind=NodeKind.OPENAI, url=f"http://{name}")
        client = MemoryNode(node, lambda _node, _request: None)
        state = self.fleet.add(node, client, slots=slots)
        self.fleet.reported(state, NodeReport(models={model: ModelInfo(name=model)}, loaded=None))
        return client

    def ask(self, model: str = "m1") -> Told:
        """A client asks."""
        self.asked += 1
        request = Request(f"r{self.asked}", Endpoint.OPENAI_CHAT, model, True, b"{}", "local", "", self.clock.now)
        told = Told(request)
        run = self.routed.start(request, told)
        assert isinstance(run, Run)
        told.run = run
        return told

    def state(self, name: str) -> NodeState:
        state = self.fleet.state(name)
        assert state is not None
        return state

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.routed.sweep()


class Told:
    """A reply that keeps what it was told."""

    run: Run

    def __init__(self, request: Request) -> None:
        self.request = request
        self.heads: list[Head] = []
        self.chunks: list[bytes] = []
        self.ends: list[Usage | None] = []
        self.errors: list[SutazaiError] = []
        self.at_head: Callable[[], object] = _nothing
        self.at_fail: Callable[[], object] = _nothing

    @property
    def error(self) -> SutazaiError:
        (error,) = self.errors
        return error

    def head(self, head: Head) -> None:
        self.heads.append(head)
        self.at_head()

    def chunk(self, data: bytes) -> None:
        self.chunks.append(data)

    def end(self, usage: Usage | None) -> None:
        self.ends.append(usage)

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        self.heads.append(head)
        self.chunks.append(body)
        self.ends.append(usage)

    def fail(self, error: SutazaiError) -> None:
        self.errors.append(error)
        self.at_fail()


def _nothing() -> None:
    return


def test_requests_wait_and_are_served_in_the_order_they_came() -> None:
    bench = Bench({"a": 1})
    clients = [bench.ask() for _ in range(6)]
    assert [bench.routed.position(client.run) for client in clients] == [0, 0, 1, 2, 3, 4]
    for _ in clients:
        bench.nodes["a"].open_calls[0].act("whole")

    assert [call.request.id for call in bench.nodes["a"].calls] == [client.request.id for client in clients]
    assert all(client.ends for client in clients)


def test_a_newcomer_does_not_overtake_those_who_wait() -> None:
    bench = Bench({"a": 1})
    first = [bench.ask() for _ in range(3)]
    bench.nodes["a"].open_calls[0].act("whole")
    bench.ask()
    bench.nodes["a"].open_calls[0].act("whole")

    assert [call.request.id for call in bench.nodes["a"].calls][:3] == [client.request.id for client in first]


def test_a_line_that_is_full_turns_clients_away_at_once() -> None:
    bench = Bench({"a": 1})
    clients = [bench.ask() for _ in range(2 + PATIENCE.max_waiting + 1)]

    assert isinstance(clients[-1].error, Overloaded)
    assert clients[-1].error.retry_after_s > 0
    assert bench.routed.waiting == PATIENCE.max_waiting


def test_a_request_that_waits_too_long_is_told_to_come_back() -> None:
    bench = Bench({"a": 1})
    clients = [bench.ask() for _ in range(3)]
    for _ in range(8):
        bench.pass_time(4.0)
        for call in bench.nodes["a"].open_calls:
            call.act("chunk")

    assert isinstance(clients[2].error, Overloaded)
    assert bench.routed.waiting == 0
    assert not clients[0].errors


def test_a_silent_node_times_out_and_is_named() -> None:
    bench = Bench({"a": 1})
    client = bench.ask()
    bench.pass_time(PATIENCE.first_token_s + 1)

    assert isinstance(client.error, NodeTimeout)
    assert client.error.node == "a"
    assert "no token within 20 s" in client.error.message
    assert bench.nodes["a"].open_calls == []


def test_a_stream_that_falls_silent_times_out_sooner() -> None:
    bench = Bench({"a": 1})
    client = bench.ask()
    bench.nodes["a"].calls[0].act("chunk")
    bench.pass_time(PATIENCE.idle_s - 1)
    assert not client.errors
    bench.pass_time(2.0)

    assert "fell silent for 5 s" in client.error.message


def test_the_silence_of_a_client_that_does_not_read_is_not_the_nodes() -> None:
    bench = Bench({"a": 1})
    client = bench.ask()
    bench.nodes["a"].calls[0].act("chunk")
    client.run.pause()
    bench.pass_time(60.0)
    client.run.resume()
    bench.pass_time(PATIENCE.idle_s - 1)

    assert not client.errors


def test_a_stream_that_never_ends_is_ended_and_its_node_is_not_blamed() -> None:
    bench = Bench({"a": 1})
    client = bench.ask()
    for _ in range(31):
        bench.nodes["a"].calls[0].act("chunk")
        bench.pass_time(4.0)

    assert "not complete after 120 s" in client.error.message
    assert bench.state("a").failures == 0
    assert bench.state("a").penalty == 0.0


def test_an_answer_is_never_tried_again_once_it_has_begun() -> None:
    bench = Bench({"a": 1, "b": 1})
    client = bench.ask()
    (call,) = [call for node in bench.nodes.values() for call in node.open_calls]
    call.act("head")
    call.act("reset")
    bench.pass_time(5.0)

    assert isinstance(client.error, NodeUnreachable)
    assert sum(len(node.calls) for node in bench.nodes.values()) == 1


@pytest.mark.parametrize("fault", ["reset", "unreached", "busy"])
def test_another_node_is_tried_while_nothing_was_said(fault: str) -> None:
    bench = Bench({"a": 1, "b": 1})
    client = bench.ask()
    (call,) = [call for node in bench.nodes.values() for call in node.open_calls]
    call.act(fault)
    bench.pass_time(1.0)
    (again,) = [call for node in bench.nodes.values() for call in node.open_calls]
    again.act("whole")

    assert again.node is not call.node
    assert client.ends
    assert client.heads[0].reason.endswith("attempt 2")
    assert bench.faults[0][0] == call.node.node.name


@pytest.mark.parametrize("fault", ["sick", "refused"])
def test_what_another_node_would_not_do_better_is_told_at_once(fault: str) -> None:
    bench = Bench({"a": 1, "b": 1})
    client = bench.ask()
    (call,) = [call for node in bench.nodes.values() for call in node.open_calls]
    call.act(fault)

    assert isinstance(client.error, NodeRejected)
    assert not bench.routed.runs


def test_a_mistake_of_the_client_is_not_counted_against_the_node() -> None:
    """Some requests cannot be said in the node's dialect; no node was asked."""
    bench = Bench({"a": 1})
    client = bench.ask()
    bench.nodes["a"].calls[0].act("untranslatable")

    assert isinstance(client.error, BadRequest)
    assert bench.faults == []
    assert bench.state("a").penalty == 0.0


def test_when_everything_fails_retries_stay_within_the_budget() -> None:
    """2,000 requests at once get 20 % more attempts, and what is always allowed."""
    bench = Bench({"a": 1000, "b": 1000, "c": 1000}, retry=RETRY)
    bench.routed.adopt(
        patience=PATIENCE,
        retry=RetryRules(attempts=5, budget_ratio=0.2, budget_minimum_per_s=3.0, backoff_s=0.01, backoff_max_s=0.01),
    )
    clients = [bench.ask() for _ in range(2000)]
    bench.routed.sweep()
    while bench.routed.runs:
        for node in bench.nodes.values():
            for call in node.open_calls:
                call.act("busy")
        bench.clock.advance(0.02)

    attempts = sum(len(node.calls) for node in bench.nodes.values())
    assert all(client.errors for client in clients)
    assert 2400 < attempts <= 2400 + 30 + 1


def test_nodes_go_down_after_three_failures_and_those_who_wait_are_told() -> None:
    """The line is not held up by nodes that are away."""
    bench = Bench({"a": 1})
    clients = [bench.ask() for _ in range(4)]
    for _ in range(3):
        bench.fleet.failed_probe(bench.state("a"), NodeUnreachable("It was refused.", node="a"))

    assert bench.state("a").health is Health.DOWN
    assert [type(client.error) for client in clients[2:]] == [NoHealthyNode, NoHealthyNode]
    assert "a: It was refused." in clients[3].error.message
    assert not clients[0].errors, "what is under way may yet end well"


def test_those_who_wait_for_a_node_that_leaves_are_told() -> None:
    bench = Bench({"a": 1})
    clients = [bench.ask() for _ in range(3)]
    bench.fleet.remove("a")

    assert clients[2].errors
    bench.nodes["a"].calls[0].act("whole")
    assert clients[0].ends


def test_a_model_that_nobody_has_is_told_with_names_like_it() -> None:
    bench = Bench({"a": 1})
    client = bench.ask("m")

    assert isinstance(client.error, UnknownModel)
    assert client.error.nearest == ("m1",)


def test_a_larger_head_start_serves_those_who_wait() -> None:
    bench = Bench({"a": 1})
    clients = [bench.ask() for _ in range(4)]
    bench.fleet.rules = RoutingRules(head_start=3, slow_start_s=10.0, failure_penalty_s=10.0)
    bench.routed.adopt(patience=PATIENCE, retry=RETRY)

    assert bench.routed.waiting == 0
    assert len(bench.nodes["a"].open_calls) == len(clients)


def test_a_client_that_leaves_while_its_answer_begins_frees_the_node() -> None:
    """Within `start` nobody holds the node's call yet."""
    bench = Bench({"a": 1})
    for _ in range(2):
        bench.ask()
    waiting = bench.ask()
    waiting.at_head = waiting.run.cancel
    bench.nodes["a"].at_once.append(["head"])
    bench.nodes["a"].calls[0].act("whole")

    assert bench.nodes["a"].calls[2].over
    assert bench.state("a").in_flight == 1


def test_a_slot_that_frees_while_the_line_is_served_is_not_forgotten() -> None:
    bench = Bench({"a": 1})
    other = bench.join("b", 1, "m2")
    holding = [bench.ask("m1"), bench.ask("m1")]
    bench.ask("m2")
    bench.ask("m2")
    first, second = bench.ask("m1"), bench.ask("m2")
    second.at_fail = holding[0].run.cancel
    other.at_once.append(["sick"])
    other.open_calls[0].act("whole")

    assert second.errors
    assert bench.routed.position(first.run) == 0
    assert bench.nodes["a"].calls[2].request is first.request


def test_a_client_that_asks_again_as_it_is_refused_is_refused_again() -> None:
    """It must not be left in a line that nobody serves."""
    bench = Bench({"a": 1})
    clients = [bench.ask() for _ in range(4)]
    clients[2].at_fail = lambda: clients.append(bench.ask())
    for _ in range(3):
        bench.fleet.failed_probe(bench.state("a"), NodeUnreachable("It was refused.", node="a"))

    assert bench.routed.waiting == 0
    assert isinstance(clients[4].error, NoHealthyNode)


def test_failures_fade_and_then_the_node_is_tried_again() -> None:
    """A request that waits for the sound node goes to the other one as soon as that may do."""
    bench = Bench({"sound": 1})
    bench.ask()
    bench.ask()
    failing = bench.join("failing", 1)
    for _ in range(3):
        bench.fleet.lease(bench.state("failing")).end(Outcome.SICK)
    client = bench.ask()
    assert bench.routed.position(client.run) == 1
    bench.pass_time(8.0)

    assert [call.request for call in failing.calls] == [client.request]


def test_a_request_is_tried_as_often_as_the_settings_say() -> None:
    bench = Bench(dict.fromkeys("abcde", 1))
    client = bench.ask()
    for _ in range(5):
        for node in bench.nodes.values():
            for call in node.open_calls:
                call.act("busy")
        bench.pass_time(2.0)

    assert isinstance(client.error, NodeRejected)
    assert sum(len(node.calls) for node in bench.nodes.values()) == RETRY.attempts


def test_a_pause_is_told_to_the_next_attempt() -> None:
    bench = Bench({"a": 1, "b": 1})
    client = bench.ask()
    client.run.pause()
    (call,) = [call for node in bench.nodes.values() for call in node.open_calls]
    call.act("reset")
    bench.pass_time(1.0)
    (again,) = [call for node in bench.nodes.values() for call in node.open_calls]

    assert again.paused
