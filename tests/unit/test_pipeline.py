"""All stages together: whatever happens in whatever order, each client hears one end of its own answer, and no more."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sutazai.core.errors import NodeRejected, NodeTimeout, NodeUnreachable, SutazaiError
from sutazai.core.identity import Allowance, Limits
from sutazai.core.node import Health, LoadedModel, ModelInfo, Node, NodeKind, NodeReport, NodeState
from sutazai.core.request import Endpoint, Head, Operation, Priority, Request, Usage
from sutazai.gateway.fleet import Fleet
from sutazai.gateway.pipeline import Clocks, Knowledge, Pipeline, StageRules, readiness
from sutazai.gateway.routed import Patience, Routed
from sutazai.gateway.typed import Readiness, TypeRules
from sutazai.policy.admission import AdmissionRules
from sutazai.policy.batching import BatchRules
from sutazai.policy.breaker import BreakerRules
from sutazai.policy.cacheability import CacheRules
from sutazai.policy.hedging import HedgeRules
from sutazai.policy.request_type import RequestType
from sutazai.policy.retry import RetryRules
from sutazai.policy.routing import RoutingRules
from sutazai.ports.inference import Call, Reply
from sutazai.testing.memory_pool import Clock

JSON, SSE = b"application/json", b"text/event-stream; charset=utf-8"
CHAT, COMPLETION, EMBEDDING = Endpoint.OPENAI_CHAT, Endpoint.OPENAI_COMPLETION, Endpoint.OPENAI_EMBEDDING
PUBLIC = "public"
"""A model whose answers may be everybody's."""
MODELS = ("m", "n", PUBLIC)
ASKED = ("m", "m:latest", "n", PUBLIC, "auto", "nowhere")
TENANTS = {
    "free": None,
    "few": Allowance(tenant="few", key_id="k", of_tenant=Limits(concurrent_requests=3), of_key=Limits()),
    "poor": Allowance(tenant="poor", key_id="k", of_tenant=Limits(tokens_per_minute=300), of_key=Limits()),
}
RULES = StageRules(
    types=TypeRules(
        name="auto",
        chains=dict.fromkeys(RequestType, ("gone", "m", "n")),
        rules=(),
        fallbacks={"n": ("m",)},
    ),
    cache=CacheRules(
        memory_ttl_s=5.0,
        chat_ttl_s=5.0,
        embedding_ttl_s=5.0,
        max_answer_bytes=10_000,
        refresh_from_hits=2,
        stale_if_error_s=20.0,
    ),
    cache_memory_bytes=1_000_000,
    cache_store_limit_s=0.02,
    batches=BatchRules(max_requests=4, max_wait_s=0.1),
    hedges=HedgeRules(embeddings=True, after_quantile=0.5),
    admission=AdmissionRules(
        max_waiting=4,
        max_waiting_bytes=10_000,
        max_wait_s=10.0,
        output_weight=2.0,
        promote_after_s=3.0,
        swap_patience_s=1.0,
    ),
)
OTHER_RULES = StageRules(
    types=TypeRules(name="", chains=dict.fromkeys(RequestType, ()), rules=(), fallbacks={}),
    cache=RULES.cache,
    cache_memory_bytes=RULES.cache_memory_bytes,
    cache_store_limit_s=0.02,
    batches=BatchRules(max_requests=1, max_wait_s=0.0),
    hedges=HedgeRules(embeddings=False, after_quantile=0.95),
    admission=RULES.admission,
)
FAULTS: Mapping[str, Callable[[str], SutazaiError]] = {
    "cut": lambda node: NodeUnreachable("It was cut.", node=node),
    "silent": lambda node: NodeTimeout("It was silent.", node=node),
    "busy": lambda node: NodeRejected("It was full.", node=node, status=503),
    "broken": lambda node: NodeRejected("It broke.", node=node, status=500),
    "refused": lambda node: NodeRejected("No.", node=node, status=400),
    "unknown": lambda node: NodeRejected("No such model.", node=node, status=404),
}


def said(tenant: str, model: str, text: str) -> str:
    """What a node answers: it gives away who asked, so that nobody else may hear it."""
    return f"{tenant}|{model.removesuffix(':latest')}|{text}"


def vector(tenant: str, model: str, text: str) -> list[int]:
    return list(hashlib.sha256(said(tenant, model, text).encode()).digest()[:8])


@dataclass(slots=True, eq=False)
class Asked:
    """One call to a node."""

    pool: Pool
    node: str
    request: Request
    reply: Reply
    over: bool = False
    chunks: int = 0

    def cancel(self) -> None:
        self.over = True

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def texts(self) -> list[str]:
        body = msgspec.json.decode(self.request.body)
        if self.request.endpoint is CHAT:
            return [body["messages"][-1]["content"]]
        given = body["input" if self.request.endpoint is EMBEDDING else "prompt"]
        return [given] if isinstance(given, str) else given

    def answer(self) -> None:
        """All that is left of it."""
        while self.request.stream and not self.over:
            self.say_more()
        if not self.over:
            self._say_all()

    def _say_all(self) -> None:
        self.over = True
        body, usage = self._whole()
        self.pool.told.append(usage)
        self.reply.whole(Head(200, JSON, len(body), self.node, ""), body, usage)

    def say_more(self) -> None:
        """A head, a word, or the end."""
        if self.over or not self.request.stream:
            return
        self.chunks += 1
        if self.chunks == 1:
            self.reply.head(Head(200, SSE, None, self.node, ""))
        elif self.chunks < 4:
            self.reply.chunk(self._event())
        else:
            self.over = True
            usage = Usage(1, 1)
            self.pool.told.append(usage)
            self.reply.end(usage)

    def fail(self, error: SutazaiError) -> None:
        if not self.over:
            self.over = True
            self.reply.fail(error)

    def _event(self) -> bytes:
        if self.chunks == 3:
            return b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
        (text,) = self.texts()
        told = said(self.request.tenant, self.request.model, text)
        return b"data: %b\n\n" % msgspec.json.encode({"choices": [{"index": 0, "delta": {"content": told}}]})

    def _whole(self) -> tuple[bytes, Usage]:
        request, texts = self.request, self.texts()
        usage = Usage(len(texts), 0 if request.endpoint is EMBEDDING else len(texts))
        answer: dict[str, Any] = {
            "usage": {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens}
        }
        told = [said(request.tenant, request.model, text) for text in texts]
        if request.endpoint is EMBEDDING:
            vectors = [vector(request.tenant, request.model, text) for text in texts]
            answer["data"] = [{"index": at, "embedding": one} for at, one in enumerate(vectors)]
        elif request.endpoint is COMPLETION:
            answer["choices"] = [{"index": at, "text": one, "finish_reason": "stop"} for at, one in enumerate(told)]
        else:
            message = {"role": "assistant", "content": told[0]}
            answer["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return msgspec.json.encode(answer), usage


@dataclass(slots=True)
class Client:
    """A node as the gateway talks to it."""

    node: Node
    pool: Pool

    def start(self, request: Request, reply: Reply) -> Call:
        asked = Asked(self.pool, self.node.name, request, reply)
        self.pool.asked.append(asked)
        fault = self.pool.at_once.get(self.node.name)
        if fault == "answer":
            asked.answer()
        elif fault is not None:
            asked.fail(FAULTS[fault](self.node.name))
        return asked

    async def probe(self) -> NodeReport:
        raise NotImplementedError

    async def show(self, model: str) -> Mapping[str, object]:
        raise NotImplementedError

    async def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class Asker:
    """One client of the gateway, who complains of what is out of turn."""

    pool: Pool
    request: Request
    text: str
    on: Mapping[str, Callable[[], None]]
    """What it does when it hears a `head`, or the `end`."""
    call: Call | None = None
    left: bool = False
    heads: int = 0
    body: bytes = b""
    ends: int = 0
    usage: Usage | None = None
    error: SutazaiError | None = None

    def start(self, pipeline: Pipeline) -> None:
        self.call = pipeline.start(self.request, self)

    def leave(self) -> None:
        if self.call is not None and not self.ends:
            self.left = True
            self.call.cancel()

    def head(self, head: Head) -> None:
        self._hears()
        assert self.request.stream
        self.heads += 1
        assert self.heads == 1
        self._do("head")

    def chunk(self, data: bytes) -> None:
        self._hears()
        assert self.heads == 1
        self.body += data

    def end(self, usage: Usage | None) -> None:
        self._hears()
        assert self.heads == 1
        self.usage = usage
        self._end()

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        self._hears()
        assert not self.heads
        assert not self.request.stream
        self.body, self.usage = body, usage
        self._end()

    def fail(self, error: SutazaiError) -> None:
        self._hears()
        self.error = error
        self._end()

    def check(self) -> None:
        """What it got is the answer to its own question, given to its own tenant."""
        if self.error is not None or not self.ends:
            return
        told = self.body.decode()
        request = self.request
        tenants = [request.tenant] if request.model != PUBLIC else list(TENANTS)
        if request.endpoint is EMBEDDING:
            (entry,) = msgspec.json.decode(self.body)["data"]
            assert entry["embedding"] in [vector(tenant, request.model, self.text) for tenant in tenants]
        else:
            assert any(said(tenant, request.model, self.text) in told for tenant in tenants)

    def _hears(self) -> None:
        assert not self.left, "it had left"
        assert not self.ends, "it had its end"

    def _end(self) -> None:
        self.ends += 1
        self.check()
        self._do("end")

    def _do(self, what: str) -> None:
        if what in self.on:
            self.on[what]()


class Pool:
    """Three nodes, and all stages in front of them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.asked: list[Asked] = []
        self.told: list[Usage] = []
        """Tokens that nodes spoke of."""
        self.at_once: dict[str, str] = {}
        """What a node does within `start`, by its name."""
        self.askers: list[Asker] = []
        self.fleet = Fleet(
            RoutingRules(
                head_start=0,
                slow_start_s=1.0,
                failure_penalty_s=1.0,
                breaker=BreakerRules(minimum_requests=2, window_s=5.0, slow_s=2.0, open_s=1.0),
            ),
            failures_to_down=2,
            random=lambda: 0.5,
            clock=self.clock,
        )
        routed = Routed(
            self.fleet,
            patience=Patience(first_token_s=20.0, idle_s=20.0, total_s=40.0, max_wait_s=10.0),
            retry=RetryRules(attempts=3, budget_ratio=0.2, budget_minimum_per_s=3.0, backoff_s=0.02, backoff_max_s=1.0),
            random=lambda: 0.5,
            later=self.clock.later,
            on_fault=lambda _node, _model, _error: None,
        )
        self.pipeline = Pipeline(
            routed,
            RULES,
            Knowledge(price=lambda _: (1.0, 1.0), is_public=PUBLIC.__eq__, weight=lambda _: 1.0),
            Clocks(clock=self.clock, wall=self.clock, later=self.clock.later),
        )
        for name, kind in (("a", NodeKind.OPENAI), ("b", NodeKind.OPENAI), ("o", NodeKind.OLLAMA)):
            self.join(name, kind)

    def join(self, name: str, kind: NodeKind) -> None:
        node = Node(name=name, kind=kind, url=f"http://{name}", is_adaptive=name == "b")
        self.fleet.add(node, Client(node, self), slots=2 if name == "a" else 1)
        self.report(name)

    def report(self, name: str) -> None:
        state = self.fleet.state(name)
        if state is None:
            return
        listed = ("m:latest", "n", PUBLIC) if state.node.kind is NodeKind.OLLAMA else ("m", PUBLIC)
        models = {model: ModelInfo(name=model) for model in listed}
        is_ollama = state.node.kind is NodeKind.OLLAMA
        loaded = {"m:latest": LoadedModel(name="m:latest")} if is_ollama else None
        self.fleet.reported(state, NodeReport(models=models, loaded=loaded))

    def sweep(self) -> None:
        pipeline = self.pipeline
        pipeline.routed.sweep()
        pipeline.admitted.sweep()
        assert pipeline.cached is not None
        pipeline.cached.sweep()

    @property
    def open(self) -> list[Asked]:
        return [asked for asked in self.asked if not asked.over]

    def states(self) -> list[NodeState]:
        return list(self.fleet.states())


ENDPOINTS = st.sampled_from([CHAT, CHAT, COMPLETION, EMBEDDING, EMBEDDING])


class AnyOrder(RuleBasedStateMachine):
    """Clients, nodes, time and settings, each as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()
        self.count = itertools.count(1)

    @rule(
        endpoint=ENDPOINTS,
        model=st.sampled_from(ASKED),
        tenant=st.sampled_from(sorted(TENANTS)),
        text=st.sampled_from(["x", "y", "a longer text"]),
        stream=st.booleans(),
        is_repeatable=st.booleans(),
        deadline_s=st.sampled_from([0.0, 0.0, 1.0, 5.0]),
        priority=st.sampled_from(list(Priority)),
        cache_control=st.sampled_from([b"", b"", b"no-cache", b"no-store", b"max-age=1"]),
        conversation=st.sampled_from([b"", b"c"]),
        reaction=st.sampled_from(["", "", "head ask", "end ask", "head node leaves", "end node leaves"]),
    )
    def ask(self, **wished: Any) -> None:
        self._ask(**wished)

    @rule(data=st.data())
    @precondition(lambda self: self.pool.open)
    def answer(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.pool.open)).answer()

    @rule(data=st.data())
    @precondition(lambda self: any(asked.request.stream for asked in self.pool.open))
    def say_more(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from([asked for asked in self.pool.open if asked.request.stream])).say_more()

    @rule(data=st.data(), fault=st.sampled_from(sorted(FAULTS)))
    @precondition(lambda self: self.pool.open)
    def fail(self, data: st.DataObject, fault: str) -> None:
        asked = data.draw(st.sampled_from(self.pool.open))
        asked.fail(FAULTS[fault](asked.node))

    @rule(data=st.data())
    @precondition(lambda self: self._there())
    def leave(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self._there())).leave()

    @rule(data=st.data(), is_pause=st.booleans())
    @precondition(lambda self: self._there())
    def pause_or_resume(self, data: st.DataObject, is_pause: bool) -> None:
        call = data.draw(st.sampled_from(self._there())).call
        assert call is not None
        (call.pause if is_pause else call.resume)()

    @rule(by_s=st.sampled_from([0.05, 0.3, 2.0, 12.0]))
    def wait(self, by_s: float) -> None:
        self.pool.clock.advance(by_s)
        self.pool.sweep()

    @rule(name=st.sampled_from("abo"), does=st.sampled_from(["", "", "answer", *FAULTS]))
    def change_habits(self, name: str, does: str) -> None:
        self.pool.at_once.pop(name, None)
        if does:
            self.pool.at_once[name] = does

    @rule(name=st.sampled_from("abo"), is_well=st.booleans())
    def probe(self, name: str, is_well: bool) -> None:
        state = self.pool.fleet.state(name)
        if is_well:
            self.pool.report(name)
        elif state is not None:
            self.pool.fleet.failed_probe(state, NodeUnreachable("It was cut.", node=name))

    @rule(name=st.sampled_from("abo"))
    def go_or_come(self, name: str) -> None:
        if self.pool.fleet.state(name) is None:
            self.pool.join(name, NodeKind.OLLAMA if name == "o" else NodeKind.OPENAI)
        else:
            self.pool.fleet.remove(name)

    @rule(rules=st.sampled_from([RULES, OTHER_RULES]))
    def adopt(self, rules: StageRules) -> None:
        self.pool.pipeline.adopt(rules)

    @invariant()
    def no_node_has_more_than_its_slots_allow(self) -> None:
        for state in self.pool.states():
            assert state.in_flight >= 0
            if not state.node.is_adaptive:
                assert state.in_flight <= state.slots

    @invariant()
    def tokens_are_told_once(self) -> None:
        heard = [asker.usage for asker in self.pool.askers if asker.usage is not None]
        told = self.pool.told
        assert sum(one.input_tokens for one in heard) <= sum(one.input_tokens for one in told)
        assert sum(one.output_tokens for one in heard) <= sum(one.output_tokens for one in told)

    def teardown(self) -> None:
        """Once all have been answered nothing is left in any stage."""
        pool, pipeline = self.pool, self.pool.pipeline
        pool.at_once = dict.fromkeys("abo", "answer")
        for asker in self._there():
            assert asker.call is not None
            asker.call.resume()
        for _ in range(200):
            if not pool.open and not self._there() and not pipeline.routed.runs:
                break
            for asked in pool.open:
                asked.answer()
            pool.clock.advance(0.5)
            pool.sweep()
            for name in "abo":
                pool.report(name)

        assert all(asker.ends + asker.left == 1 for asker in pool.askers)
        assert not pool.open
        assert not pipeline.routed.runs
        assert pipeline.admitted.waiting == 0
        assert pipeline.batched.waiting == 0
        assert pipeline.coalesced.flights == 0
        assert all(state.in_flight == 0 and not state.loading for state in pool.states())
        assert not pool.fleet.experience.because
        pool.clock.advance(200.0)
        self._take_all_places()

    def _take_all_places(self) -> None:
        """No place in the limits was left behind: as many requests as may run at once still may."""
        pool = self.pool
        pool.at_once = {}
        for name in "abo":
            if pool.fleet.state(name) is None:
                pool.join(name, NodeKind.OLLAMA if name == "o" else NodeKind.OPENAI)
            pool.report(name)
        for number in range(3):
            self._ask(tenant="few", text=f"last {number}")
        assert all(asker.error is None for asker in pool.askers[-3:])
        for asker in pool.askers[-3:]:
            asker.leave()

    def _ask(
        self,
        *,
        endpoint: Endpoint = CHAT,
        model: str = "m",
        tenant: str = "free",
        text: str = "x",
        stream: bool = False,
        is_repeatable: bool = False,
        deadline_s: float = 0.0,
        priority: Priority = Priority.NORMAL,
        cache_control: bytes = b"",
        conversation: bytes = b"",
        reaction: str = "",
    ) -> None:
        pool = self.pool
        stream = stream and endpoint is CHAT
        body: dict[str, Any] = {"model": model, "stream": stream}
        if endpoint is EMBEDDING:
            body = {"model": model, "input": text}
        elif endpoint is COMPLETION:
            body["prompt"] = text
        else:
            body["messages"] = [{"role": "user", "content": text}]
        if is_repeatable and endpoint is not EMBEDDING:
            body["temperature"] = 0
        now = pool.clock.now
        request = Request(f"r{next(self.count)}", endpoint, model, stream, msgspec.json.encode(body), tenant, "k", now)
        request.is_deterministic = is_repeatable or endpoint.operation is Operation.EMBEDDING
        request.deadline_at = now + deadline_s if deadline_s else 0.0
        request.priority, request.cache_control, request.conversation = priority, cache_control, conversation
        request.allowance = TENANTS[tenant]
        when, _, what = reaction.partition(" ")
        asker = Asker(pool, request, text, {when: lambda: self._react(what)} if what else {})
        pool.askers.append(asker)
        asker.start(pool.pipeline)

    def _react(self, what: str) -> None:
        if what == "ask":
            self._ask(endpoint=EMBEDDING, text="y")
        else:
            self.pool.fleet.remove("b")

    def _there(self) -> list[Asker]:
        return [asker for asker in self.pool.askers if asker.call is not None and not asker.ends and not asker.left]


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


def test_a_model_is_ready_busy_down_or_missing() -> None:
    pool = Pool()
    free = readiness(pool.fleet, "m")
    for state in pool.states():
        state.in_flight = state.slots
    busy, missing = readiness(pool.fleet, "m"), readiness(pool.fleet, "nowhere")
    for state in pool.states():
        state.health = Health.DOWN

    assert [free, busy, missing] == [Readiness.FREE, Readiness.BUSY, Readiness.MISSING]
    assert [readiness(pool.fleet, model) for model in ("m", "nowhere")] == [Readiness.DOWN, Readiness.DOWN]


def test_a_request_that_one_full_line_sends_away_waits_in_the_next_under_the_same_id() -> None:
    """It fell back to another model within `start`; what was left of the first try must not take its new place."""
    machine = AnyOrder()
    for number in range(4):
        machine._ask(text=f"slot {number}")
    for number in range(12):
        machine._ask(model="n", text=f"line {number}")

    waiting = machine.pool.pipeline.admitted.waiting_by_model()
    assert waiting == {"n": 4, "m": 4}
    machine.teardown()
