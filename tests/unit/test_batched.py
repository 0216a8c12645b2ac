"""Requests that share calls: everybody gets his own part and exactly one end, whatever happens in whatever order."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sutazai.core.errors import NodeFault, NodeRejected, NodeTimeout, Overloaded, SutazaiError
from sutazai.core.identity import Allowance, Limits
from sutazai.core.request import Endpoint, Head, Priority, Request, Usage
from sutazai.gateway.batched import Batched
from sutazai.policy.batching import BatchRules
from sutazai.ports.inference import Call, Reply
from sutazai.testing.memory_pool import Clock

RULES = BatchRules(max_requests=4, max_wait_s=0.1)
REFUSED = "bad"
"""A text that has this in it is refused by the node with 400."""
TOO_LONG = "long"
"""And one with this as llama.cpp refuses it: with 500."""


def vector(text: str) -> list[int]:
    """What the node makes of a text."""
    return list(hashlib.sha256(text.encode()).digest()[:4])


@dataclass(slots=True, eq=False)
class Asked:
    """One call to the node."""

    request: Request
    reply: Reply
    over: bool = False
    cancelled: bool = False
    paused: bool = False

    @property
    def texts(self) -> list[str]:
        """Its inputs."""
        given = msgspec.json.decode(self.request.body)["input"]
        return [given] if isinstance(given, str) else given

    def cancel(self) -> None:
        self.cancelled = self.cancelled or not self.over
        self.over = True

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def answer(self, *, in_parts: bool = False) -> None:
        """As the node would: vectors, or a refusal of the first text that it cannot take."""
        if self.over:
            return
        for text in self.texts:
            if REFUSED in text or TOO_LONG in text:
                self.fail(_refusal(text))
                return
        data = [{"index": at, "embedding": vector(text)} for at, text in enumerate(self.texts)]
        tokens = sum(map(len, self.texts))
        self.say({"data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}, in_parts=in_parts)

    def say(self, answer: object, *, in_parts: bool = False) -> None:
        """Answer with this."""
        body = msgspec.json.encode(answer)
        head = Head(200, b"application/json", len(body), "a", "warm")
        if not in_parts:
            self.over = True
            self.reply.whole(head, body, None)
            return
        self.reply.head(head)
        for part in (body[:9], body[9:]):
            if not self.over:
                self.reply.chunk(part)
        if not self.over:
            self.over = True
            self.reply.end(None)

    def fail(self, error: SutazaiError) -> None:
        """Answer with an error."""
        if not self.over:
            self.over = True
            self.reply.fail(error)


def _refusal(text: str) -> NodeRejected:
    return NodeRejected(
        f"I cannot take {text}.",
        node="a",
        status=400 if REFUSED in text else 500,
        body=b'{"said":"%b"}' % text.encode(),
        is_verbatim=True,
    )


@dataclass(slots=True)
class Node:
    """Everything inside of the stage: it answers when it is told to, or at once."""

    asked: list[Asked] = field(default_factory=list)
    answers_at_once: bool = False

    def start(self, request: Request, reply: Reply) -> Call:
        asked = Asked(request, reply)
        self.asked.append(asked)
        if self.answers_at_once:
            asked.answer()
        return asked

    @property
    def open(self) -> list[Asked]:
        """Calls that are not over."""
        return [asked for asked in self.asked if not asked.over]

    def answer_all(self) -> None:
        """Answer until nothing is asked any more."""
        while self.open:
            self.open[0].answer()


@dataclass(slots=True, eq=False)
class Caller:
    """A reply that keeps what it hears, and complains of what it must not."""

    texts: Sequence[str]
    kind: object = None
    arrived_at: float = 0.0
    on_end: Callable[[], None] | None = None
    call: Call | None = None
    left: bool = False
    node: str = ""
    reason: str = ""
    body: bytes = b""
    usage: Usage | None = None
    error: SutazaiError | None = None
    ends: int = 0

    def head(self, head: Head) -> None:
        self._hears()
        self.node, self.reason = head.node, head.reason

    def chunk(self, data: bytes) -> None:
        self._hears()
        self.body += data

    def end(self, usage: Usage | None) -> None:
        self._hears()
        self.usage = usage
        self._ended()

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        self.head(head)
        assert head.length == len(body)
        self.chunk(body)
        self.end(usage)

    def fail(self, error: SutazaiError) -> None:
        self._hears()
        self.error = error
        self._ended()

    def leave(self) -> None:
        assert self.call is not None
        self.left = True
        self.call.cancel()

    @property
    def is_done(self) -> bool:
        """Answered or gone."""
        return self.left or self.ends > 0

    @property
    def vectors(self) -> list[object]:
        """What it was given, in the order of the numbers."""
        data = msgspec.json.decode(self.body)["data"]
        assert [entry["index"] for entry in data] == list(range(len(data)))
        return [entry["embedding"] for entry in data]

    def _hears(self) -> None:
        assert not self.left, "It left and was told something."
        assert not self.ends, "It was told something after the end."

    def _ended(self) -> None:
        self.ends += 1
        if self.on_end is not None:
            self.on_end()


@dataclass(slots=True)
class Pool:
    """A stage between callers and a node."""

    node: Node = field(default_factory=Node)
    clock: Clock = field(default_factory=Clock)
    has_idle_node: bool = False
    takes_arrays: bool = True
    callers: list[Caller] = field(default_factory=list)
    stage: Batched = field(init=False)
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.stage = Batched(
            self.node,
            RULES,
            takes_arrays=lambda _model, _endpoint: self.takes_arrays,
            has_idle_node=lambda _model: self.has_idle_node,
            later=self.clock.later,
            clock=self.clock,
        )

    def ask(self, *texts: str, **others: Any) -> Caller:
        """One more caller."""
        return self.enter(self.caller(*texts), **others)

    def caller(self, *texts: str) -> Caller:
        """One who did not ask yet."""
        return Caller(texts, arrived_at=self.clock.now)

    def enter(self, caller: Caller, **others: Any) -> Caller:
        """Let this one ask; `fields` are for the body, others for the request."""
        self.callers.append(caller)
        given: object = caller.texts[0] if len(caller.texts) == 1 else list(caller.texts)
        body = msgspec.json.encode({"model": "m", "input": given, **others.pop("fields", {})})
        request = Request(
            f"r{next(self.numbers)}", Endpoint.OPENAI_EMBEDDING, "m", False, body, "t", "", self.clock.now
        )
        caller.call = self.stage.start(replace(request, **others), caller)
        return caller


def _busy() -> Pool:
    """The node works on something, so that others gather."""
    pool = Pool()
    pool.ask("first")
    return pool


# who waits


def test_a_request_to_an_idle_model_passes_at_once_and_untouched() -> None:
    pool = Pool()

    caller = pool.ask("a")

    assert len(pool.node.asked) == 1
    assert pool.node.asked[0].request.body == b'{"model":"m","input":"a"}'
    assert pool.node.asked[0].request.id == "r0"
    assert not pool.clock.pending
    pool.node.asked[0].answer()
    assert caller.vectors == [vector("a")]
    assert caller.reason == "warm"


def test_while_the_model_is_busy_requests_gather_and_share_the_next_call() -> None:
    pool = _busy()
    callers = [pool.ask("a"), pool.ask("b", "c")]
    before = len(pool.node.asked)

    pool.node.asked[0].answer()

    assert before == 1
    shared = pool.node.asked[1]
    assert shared.request.id == "r1.b1"
    assert shared.texts == ["a", "b", "c"]
    shared.answer(in_parts=True)
    assert [caller.vectors for caller in callers] == [[vector("a")], [vector("b"), vector("c")]]
    assert callers[0].reason == "warm; one of 2 in a batch"
    assert callers[1].usage == Usage(2, 0)
    assert (pool.stage.batches, pool.stage.batched_requests, pool.stage.bisections) == (1, 2, 0)


def test_as_many_inputs_as_a_call_takes_leave_without_waiting() -> None:
    pool = _busy()

    for text in "abcde":
        pool.ask(text)

    assert [asked.texts for asked in pool.node.asked] == [["first"], ["a", "b", "c", "d"]]
    assert pool.stage.waiting == 1


def test_nobody_waits_longer_than_allowed() -> None:
    pool = _busy()
    pool.ask("a")
    pool.clock.advance(0.06)
    pool.ask("b")

    pool.clock.advance(0.03)
    early = len(pool.node.asked)
    pool.clock.advance(0.02)

    assert early == 1
    assert pool.node.asked[1].texts == ["a", "b"]
    assert not pool.clock.pending


def test_one_who_gathered_alone_passes_untouched() -> None:
    pool = _busy()
    pool.ask("a")

    pool.clock.advance(0.2)

    assert pool.node.asked[1].request.body == b'{"model":"m","input":"a"}'
    assert pool.stage.batches == 0


def test_a_node_that_works_on_nothing_lets_nobody_wait() -> None:
    pool = _busy()
    pool.has_idle_node = True

    pool.ask("a")

    assert len(pool.node.asked) == 2


def test_what_is_not_equal_is_not_merged() -> None:
    pool = _busy()
    pool.node.asked[0].answer()
    others: list[Mapping[str, Any]] = [
        {},
        {"fields": {"dimensions": 2}},
        {"tenant": "u"},
        {"priority": Priority.LOW},
        {"model": "n"},
        {"allowance": Allowance(tenant="t", key_id="k", of_tenant=Limits(), of_key=Limits())},
    ]

    for other in others:
        pool.ask("a", **other)

    assert len(pool.node.open) == len(others)


def test_where_nodes_take_no_arrays_nothing_is_held_or_wrapped() -> None:
    pool = Pool(takes_arrays=False)

    first, second = pool.ask("a"), pool.ask("b")

    assert [asked.reply for asked in pool.node.asked] == [first, second]
    assert first.call is pool.node.asked[0]


def test_streams_full_requests_and_switched_off_batching_pass_by() -> None:
    pool = Pool()
    pool.ask("a", stream=True)
    pool.ask("a", "b", "c", "d")
    pool.stage.adopt(BatchRules(max_requests=1, max_wait_s=0.1))
    pool.ask("a")

    assert [asked.reply for asked in pool.node.asked] == pool.callers


# errors


def test_a_bad_input_is_found_by_halving_and_spoils_nobody_else() -> None:
    pool = _busy()
    callers = [pool.ask("a"), pool.ask("b"), pool.ask("a bad one"), pool.ask("d")]

    pool.node.answer_all()

    assert [caller.vectors for caller in callers if caller.error is None] == [[vector(text)] for text in "abd"]
    guilty = callers[2].error
    assert isinstance(guilty, NodeRejected)
    assert guilty.body == b'{"said":"a bad one"}'
    assert guilty.is_verbatim
    assert [len(asked.texts) for asked in pool.node.asked[1:]] == [4, 2, 2, 1, 1]
    assert pool.node.asked[2].request.id == "r1.b2"
    assert pool.stage.bisections == 2


def test_an_embedding_too_long_for_llamacpp_spoils_nobody_else() -> None:
    pool = _busy()
    callers = [pool.ask("a"), pool.ask("a long one"), pool.ask("another long one"), pool.ask("d")]

    pool.node.answer_all()

    assert [caller.error is None for caller in callers] == [True, False, False, True]
    assert [len(asked.texts) for asked in pool.node.asked[1:]] == [4, 1, 1, 1, 1]


def test_a_failing_pool_is_not_asked_again_and_everybody_hears_of_it() -> None:
    for error in (NodeTimeout("Silent.", node="a"), Overloaded("Full.", retry_after_s=3)):
        pool = _busy()
        callers = [pool.ask("a"), pool.ask("b")]
        pool.node.asked[0].answer()

        pool.node.asked[1].fail(error)

        assert [caller.error for caller in callers] == [error, error]
        assert len(pool.node.asked) == 2


def test_an_answer_with_a_vector_too_few_is_given_to_nobody() -> None:
    pool = _busy()
    callers = [pool.ask("a"), pool.ask("b")]
    pool.node.asked[0].answer()

    pool.node.asked[1].say({"data": [{"index": 0, "embedding": [1]}]})

    for caller in callers:
        assert isinstance(caller.error, NodeFault)
        assert caller.error.node == "a"
        assert not caller.body


# leaving


def test_one_who_leaves_while_waiting_is_not_sent() -> None:
    pool = _busy()
    leaver, stayer = pool.ask("a"), pool.ask("b")
    leaver.leave()

    pool.node.answer_all()

    assert pool.node.asked[1].texts == ["b"]
    assert stayer.vectors == [vector("b")]


def test_one_who_leaves_a_call_under_way_is_dropped_and_the_others_are_answered() -> None:
    pool = _busy()
    leaver, stayer = pool.ask("a"), pool.ask("b")
    pool.node.asked[0].answer()
    leaver.leave()

    pool.node.answer_all()

    assert not pool.node.asked[1].cancelled
    assert stayer.vectors == [vector("b")]


def test_the_call_ends_when_the_last_caller_left() -> None:
    pool = _busy()
    leavers = [pool.ask("a"), pool.ask("b")]
    pool.node.asked[0].answer()
    waiting = pool.ask("c")

    for leaver in leavers:
        leaver.leave()

    assert pool.node.asked[1].cancelled
    pool.node.answer_all()
    assert waiting.vectors == [vector("c")]


def test_one_who_is_alone_ends_his_call_by_leaving() -> None:
    pool = _busy()
    waiting = pool.ask("a")

    pool.callers[0].leave()

    assert pool.node.asked[0].cancelled
    assert pool.node.asked[1].texts == ["a"]
    assert not waiting.is_done


def test_one_who_left_is_not_asked_for_again_after_a_refusal() -> None:
    pool = _busy()
    callers = [pool.ask("a"), pool.ask("bad"), pool.ask("c")]
    pool.node.asked[0].answer()
    callers[0].leave()

    pool.node.answer_all()

    assert [asked.texts for asked in pool.node.asked[2:]] == [["bad"], ["c"]]


def test_the_fault_of_one_who_left_is_not_told_to_another() -> None:
    pool = _busy()
    leaver, stayer = pool.ask("a bad one"), pool.ask("b")
    pool.node.asked[0].answer()
    leaver.leave()

    pool.node.answer_all()

    assert stayer.error is None
    assert stayer.vectors == [vector("b")]


def test_one_who_leaves_because_of_another_answer_is_not_asked_for() -> None:
    pool = _busy()
    answered, leaver = pool.ask("a long one"), pool.ask("b")
    answered.on_end = leaver.leave
    pool.node.asked[0].answer()
    pool.node.answers_at_once = True

    pool.node.asked[1].answer()

    assert [asked.texts for asked in pool.node.asked[2:]] == [["a long one"]]
    pool.ask("c")
    assert pool.callers[3].vectors == [vector("c")]


# pauses and deadlines


def test_a_pause_reaches_a_call_of_ones_own_and_not_a_shared_one() -> None:
    pool = _busy()
    callers = [pool.ask("a"), pool.ask("b")]
    alone = pool.callers[0].call
    assert alone is not None
    alone.pause()
    was_paused = pool.node.asked[0].paused
    alone.resume()
    pool.node.asked[0].answer()

    for caller in callers:
        assert caller.call is not None
        caller.call.pause()

    assert was_paused
    assert not pool.node.asked[0].paused
    assert not pool.node.asked[1].paused
    pool.node.asked[1].answer()
    assert all(caller.ends == 1 for caller in callers)


def test_one_who_paused_while_waiting_is_asked_paused_where_he_is_alone() -> None:
    pool = _busy()
    caller = pool.ask("a")
    assert caller.call is not None
    caller.call.pause()

    pool.clock.advance(0.2)

    assert pool.node.asked[1].paused


def test_a_shared_call_is_of_use_as_long_as_to_the_most_patient() -> None:
    pool = _busy()
    pool.ask("a", deadline_at=1010.0)
    pool.ask("b", deadline_at=1020.0)
    pool.clock.advance(0.2)
    pool.ask("c", deadline_at=1010.0)
    pool.ask("d")
    pool.clock.advance(0.2)

    assert [asked.request.deadline_at for asked in pool.node.asked[1:]] == [1020.0, 0.0]
    assert [asked.request.arrived_at for asked in pool.node.asked[1:]] == pytest.approx([1000.1, 1000.3])


# any order


class AnyOrder(RuleBasedStateMachine):
    """Arrivals, answers, failures and leavings in any order, from within each other too."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()
        self.failed: set[SutazaiError] = set()

    @rule(
        marks=st.lists(st.sampled_from(["", "", "", REFUSED, TOO_LONG]), min_size=1, max_size=3),
        tenant=st.sampled_from("tu"),
        dimensions=st.sampled_from([1, 2]),
        on_end=st.sampled_from(["", "", "ask", "leave"]),
    )
    def arrive(self, marks: list[str], tenant: str, dimensions: int, on_end: str) -> None:
        caller = self._caller(marks, tenant, dimensions)
        if on_end == "ask":
            caller.on_end = lambda: self._enter(self._caller([""], tenant, dimensions), tenant, dimensions)
        elif on_end == "leave":
            caller.on_end = self._one_leaves
        self._enter(caller, tenant, dimensions)

    @precondition(lambda self: self.pool.node.open)
    @rule(data=st.data(), in_parts=st.booleans())
    def answer(self, data: st.DataObject, in_parts: bool) -> None:
        self._open(data).answer(in_parts=in_parts)

    @precondition(lambda self: self.pool.node.open)
    @rule(data=st.data(), status=st.sampled_from([0, 404, 429, 503]))
    def fail(self, data: st.DataObject, status: int) -> None:
        error: SutazaiError = NodeTimeout("Silent.", node="a")
        if status:
            error = NodeRejected("No.", node="a", status=status)
        self.failed.add(error)
        self._open(data).fail(error)

    @precondition(lambda self: any(len(asked.texts) > 1 for asked in self.pool.node.open))
    @rule(change=st.sampled_from([-1, 1]))
    def talk_nonsense(self, change: int) -> None:
        asked = next(asked for asked in self.pool.node.open if len(asked.texts) > 1)
        if asked.request.id.endswith(".b1"):
            asked.say({"data": [{"embedding": [0]}] * (len(asked.texts) + change)})

    @precondition(lambda self: not all(caller.is_done for caller in self.pool.callers))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from([caller for caller in self.pool.callers if not caller.is_done])).leave()

    @rule(by_s=st.floats(0, 0.15))
    def wait(self, by_s: float) -> None:
        self.pool.clock.advance(by_s)

    @rule(is_so=st.booleans())
    def answer_at_once_from_now_on(self, is_so: bool) -> None:
        self.pool.node.answers_at_once = is_so

    @rule(is_so=st.booleans())
    def have_an_idle_node(self, is_so: bool) -> None:
        self.pool.has_idle_node = is_so

    @invariant()
    def calls_are_of_one_kind_and_not_too_large(self) -> None:
        for asked in self.pool.node.asked:
            texts = asked.texts
            assert len(texts) <= RULES.max_requests
            assert len({text.split("-")[0] for text in texts}) == 1
            assert texts[0].startswith(f"{asked.request.tenant}{msgspec.json.decode(asked.request.body)['dimensions']}")

    @invariant()
    def everybody_gets_his_own(self) -> None:
        for caller in self.pool.callers:
            if caller.ends and caller.error is None:
                assert caller.vectors == [vector(text) for text in caller.texts]
            elif isinstance(caller.error, NodeRejected) and caller.error.body:
                assert any(caller.error.body == _refusal(text).body for text in caller.texts)
            elif caller.error is not None:
                assert caller.error in self.failed or type(caller.error) is NodeFault

    @invariant()
    def nobody_waits_too_long(self) -> None:
        asked = {text for call in self.pool.node.asked for text in call.texts}
        for caller in self.pool.callers:
            if not caller.is_done and caller.texts[0] not in asked:
                assert self.pool.clock.now - caller.arrived_at <= RULES.max_wait_s + 1e-9

    def teardown(self) -> None:
        self.pool.clock.advance(1)
        while self.pool.node.open:
            self.pool.node.open[0].answer()
            self.pool.clock.advance(1)
        self.everybody_gets_his_own()

        assert all(caller.ends == (not caller.left) for caller in self.pool.callers)
        assert self.pool.clock.pending == 0
        assert self.pool.stage.waiting == 0
        assert not self.pool.stage._groups

    def _caller(self, marks: Sequence[str], tenant: str, dimensions: int) -> Caller:
        number = next(self.pool.numbers)
        return self.pool.caller(*[f"{tenant}{dimensions}-{mark}-{number}-{place}" for place, mark in enumerate(marks)])

    def _enter(self, caller: Caller, tenant: str, dimensions: int) -> None:
        self.pool.enter(caller, tenant=tenant, fields={"dimensions": dimensions})

    def _one_leaves(self) -> None:
        for caller in self.pool.callers:
            if not caller.is_done and caller.call is not None:
                caller.leave()
                return

    def _open(self, data: st.DataObject) -> Asked:
        return data.draw(st.sampled_from(self.pool.node.open))


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
