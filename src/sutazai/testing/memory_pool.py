"""
A pool without a network and with a time of its own: the stages of the gateway over nodes that do what they are told.

For tests of one stage, or of all of them together, in any order of events.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sutazai.core.errors import BadRequest, NodeRejected, NodeTimeout, NodeUnreachable, SutazaiError
from sutazai.core.node import LoadedModel, ModelInfo, Node, NodeKind, NodeReport, NodeState
from sutazai.core.request import Endpoint, Head, Priority, Request, Usage
from sutazai.gateway.admitted import Admitted
from sutazai.gateway.fleet import Fleet
from sutazai.gateway.routed import Patience, Routed
from sutazai.policy.admission import AdmissionRules
from sutazai.policy.retry import RetryRules
from sutazai.policy.routing import RoutingRules
from sutazai.ports.inference import Call, Reply

PATIENCE = Patience(first_token_s=20.0, idle_s=5.0, total_s=120.0, max_wait_s=30.0)
RETRY = RetryRules(attempts=3, budget_ratio=0.2, budget_minimum_per_s=3.0, backoff_s=0.5, backoff_max_s=2.0)
RULES = RoutingRules(head_start=1, slow_start_s=10.0, failure_penalty_s=10.0)
ADMISSION = AdmissionRules(
    max_waiting=4,
    max_waiting_bytes=1000,
    max_wait_s=30.0,
    output_weight=2.0,
    promote_after_s=20.0,
    swap_patience_s=10.0,
)


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

    @property
    def pending(self) -> int:
        """Timers that will still do something."""
        return sum(not timer.cancelled for _, _, timer in self.timers)


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


class MemoryPool:
    """Nodes in memory, the fleet of them, routing, and the waiting room."""

    def __init__(
        self,
        slots: Mapping[str, int],
        *,
        patience: Patience = PATIENCE,
        retry: RetryRules = RETRY,
        admission: AdmissionRules = ADMISSION,
        rules: RoutingRules = RULES,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """
        A pool whose nodes have these slots and the model `m1`.

        Args:
            weights: of tenants; 1.0 for others.
        """
        self.clock = Clock()
        self.fleet = Fleet(rules, failures_to_down=3, clock=self.clock, random=random.Random(1).random)
        self.faults: list[tuple[str, str]] = []
        self.routed = Routed(
            self.fleet,
            patience=patience,
            retry=retry,
            random=random.Random(1).random,
            later=self.clock.later,
            on_fault=lambda node, _model, error: self.faults.append((node, type(error).__name__)),
        )
        self.admitted = Admitted(self.routed, admission, weight=lambda tenant: (weights or {}).get(tenant, 1.0))
        self.nodes = {name: self.join(name, count) for name, count in slots.items()}
        self.asked = 0

    def join(self, name: str, slots: int, *models: str, loaded: str = "") -> MemoryNode:
        """A node comes in; with `loaded` it is one that has a single model in memory."""
        node = Node(name=name, kind=NodeKind.OPENAI, url=f"http://{name}")
        client = MemoryNode(node, lambda _node, _request: None)
        state = self.fleet.add(node, client, slots=slots)
        names = models or ("m1",)
        memory = {loaded: LoadedModel(name=loaded)} if loaded else None
        self.fleet.reported(state, NodeReport(models={one: ModelInfo(name=one) for one in names}, loaded=memory))
        return client

    def ask(
        self,
        model: str = "m1",
        *,
        tenant: str = "local",
        priority: Priority = Priority.NORMAL,
        deadline_s: float = 0.0,
        body: bytes = b"{}",
    ) -> Told:
        """A client asks; `deadline_s` is from now."""
        self.asked += 1
        request = Request(f"r{self.asked}", Endpoint.OPENAI_CHAT, model, True, body, tenant, "", self.clock.now)
        request.priority = priority
        request.deadline_at = self.clock.now + deadline_s if deadline_s else 0.0
        told = Told(request)
        told.call = self.admitted.start(request, told)
        return told

    def position(self, told: Told) -> int:
        """Place in line, from 1; 0 for one that does not wait for its first try."""
        place = self.admitted.place_of(told.request.id)
        return 0 if place is None else place.position

    def state(self, name: str) -> NodeState:
        """What the fleet knows of a node; it is in it."""
        state = self.fleet.state(name)
        assert state is not None
        return state

    def pass_time(self, seconds: float) -> None:
        """Let time go by, with one sweep at its end."""
        self.clock.advance(seconds)
        self.routed.sweep()
        self.admitted.sweep()


class Told:
    """A reply that keeps what it was told."""

    call: Call

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
        """The one error that it was told."""
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
