"""Choosing a model, and another when it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest

from sutazai.core.errors import (
    BadRequest,
    NodeRejected,
    NodeUnreachable,
    NoHealthyNode,
    Overloaded,
    SutazaiError,
    UnknownModel,
)
from sutazai.core.request import Endpoint, Head, Request, Usage
from sutazai.gateway.typed import Readiness, Typed, TypeRules
from sutazai.policy.request_type import RequestType
from sutazai.ports.inference import Call, Reply

FREE, BUSY, DOWN, MISSING = Readiness.FREE, Readiness.BUSY, Readiness.DOWN, Readiness.MISSING


@dataclass(slots=True)
class PoolCall:
    cancelled: bool = False
    paused: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False


@dataclass(slots=True)
class AnyPool:
    """Takes down what it is asked; `outcomes` answer within `start`, by model."""

    outcomes: Mapping[str, Callable[[Reply], None]] = field(default_factory=dict)
    asked: list[tuple[Request, Reply, PoolCall]] = field(default_factory=list)

    def start(self, request: Request, reply: Reply) -> Call:
        call = PoolCall()
        self.asked.append((request, reply, call))
        outcome = self.outcomes.get(request.model)
        if outcome is not None:
            outcome(reply)
        return call

    @property
    def models(self) -> list[str]:
        return [request.model for request, _, _ in self.asked]


@dataclass(slots=True)
class Heard:
    heads: list[Head] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    ends: int = 0
    errors: list[SutazaiError] = field(default_factory=list)

    def head(self, head: Head) -> None:
        self.heads.append(head)

    def chunk(self, data: bytes) -> None:
        self.chunks.append(data)

    def end(self, usage: Usage | None) -> None:
        self.ends += 1

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        self.head(head)
        self.chunk(body)
        self.end(usage)

    def fail(self, error: SutazaiError) -> None:
        self.errors.append(error)


def rules(
    chain: Sequence[str] = ("a", "b", "c"), name: str = "auto", fallbacks: Mapping[str, Sequence[str]] | None = None
) -> TypeRules:
    return TypeRules(name=name, chains=dict.fromkeys(RequestType, chain), rules=(), fallbacks=fallbacks or {})


def typed(pool: AnyPool, with_rules: TypeRules, **known: Readiness) -> Typed:
    return Typed(pool, with_rules, readiness=lambda model: known.get(model, MISSING))


def chat(model: str = "auto", text: str = "Hello!") -> Request:
    body = msgspec.json.encode({"model": model, "messages": [{"role": "user", "content": text}]})
    return Request("r1", Endpoint.OPENAI_CHAT, model, False, body, "t", "", 0.0)


def head() -> Head:
    return Head(200, b"application/json", None, "n", "warm")


def failing(error: SutazaiError) -> Callable[[Reply], None]:
    return lambda reply: reply.fail(error)


def test_a_model_without_a_chain_passes_untouched() -> None:
    pool, reply, request = AnyPool(), Heard(), chat("m")

    typed(pool, rules()).start(request, reply)

    assert pool.asked[0][0] is request
    assert pool.asked[0][1] is reply


def test_auto_asks_the_first_of_its_chain_that_has_room_with_its_name_in_the_body() -> None:
    pool, reply = AnyPool(), Heard()

    typed(pool, rules(), a=MISSING, b=BUSY, c=FREE).start(chat(), reply)
    asked, inner, _ = pool.asked[0]
    inner.whole(head(), b"{}", None)

    assert pool.models == ["c"]
    assert msgspec.json.decode(asked.body)["model"] == "c"
    assert reply.heads[0].model == "c"
    assert reply.heads[0].reason.startswith("simple_queries: ")
    assert "a is missing; b is busy; warm" in reply.heads[0].reason


def test_where_all_are_busy_the_first_that_is_there_is_waited_for() -> None:
    pool = AnyPool()

    typed(pool, rules(), a=MISSING, b=BUSY, c=BUSY).start(chat(), Heard())

    assert pool.models == ["b"]


def test_once_answered_the_request_says_what_answered() -> None:
    pool, request = AnyPool(), chat()

    typed(pool, rules(), a=FREE).start(request, Heard())
    pool.asked[0][1].head(head())

    assert request.model == "a"


@pytest.mark.parametrize(
    "error",
    [
        NodeUnreachable("cut", node="n"),
        NoHealthyNode("down", retry_after_s=1),
        Overloaded("full", retry_after_s=1),
        UnknownModel("a", ()),
        NodeRejected("broken", node="n", status=500),
        NodeRejected("full", node="n", status=429),
    ],
)
def test_when_one_fails_before_anything_was_said_the_next_is_asked(error: SutazaiError) -> None:
    pool, reply = AnyPool({"a": failing(error)}), Heard()
    stage = typed(pool, rules(), a=FREE, b=FREE, c=FREE)

    stage.start(chat(), reply)
    pool.asked[1][1].whole(head(), b"{}", None)

    assert pool.models == ["a", "b"]
    assert pool.asked[0][2].cancelled
    assert "a failed" in reply.heads[0].reason
    assert (reply.ends, reply.errors, stage.fallbacks) == (1, [], 1)


def test_a_request_that_every_model_would_refuse_is_not_tried_again() -> None:
    refused = NodeRejected("no such field", node="n", status=400)
    pool, reply = AnyPool({"a": failing(refused)}), Heard()

    typed(pool, rules(), a=FREE, b=FREE).start(chat(), reply)

    assert pool.models == ["a"]
    assert reply.errors == [refused]


def test_when_all_fail_the_last_error_is_told_once() -> None:
    errors = {name: NodeUnreachable(name, node=name) for name in "abc"}
    pool, reply = AnyPool({name: failing(error) for name, error in errors.items()}), Heard()

    typed(pool, rules(), a=FREE, b=FREE, c=FREE).start(chat(), reply)

    assert pool.models == ["a", "b", "c"]
    assert reply.errors == [errors["c"]]


def test_after_the_first_word_nobody_else_is_asked() -> None:
    pool, reply = AnyPool(), Heard()
    typed(pool, rules(), a=FREE, b=FREE).start(chat(), reply)
    inner = pool.asked[0][1]

    inner.head(head())
    inner.chunk(b"x")
    inner.fail(NodeUnreachable("cut", node="n"))

    assert pool.models == ["a"]
    assert len(reply.errors) == 1


def test_a_model_that_was_named_falls_back_too_where_the_settings_say_so() -> None:
    pool, reply = AnyPool({"big": failing(NoHealthyNode("down", retry_after_s=1))}), Heard()

    typed(pool, rules(fallbacks={"big": ("small",)}), big=FREE, small=FREE).start(chat("big"), reply)

    assert pool.models == ["big", "small"]
    assert pool.asked[0][0].body == chat("big").body


def test_a_client_that_leaves_ends_the_present_call_and_no_other_is_made() -> None:
    pool, reply = AnyPool(), Heard()
    call = typed(pool, rules(), a=FREE, b=FREE).start(chat(), reply)

    call.cancel()
    pool.asked[0][1].fail(NodeUnreachable("cut", node="n"))

    assert pool.asked[0][2].cancelled
    assert (pool.models, reply.errors) == (["a"], [])


def test_a_pause_holds_for_the_next_model_too() -> None:
    pool = AnyPool()
    call = typed(pool, rules(), a=FREE, b=FREE).start(chat(), Heard())

    call.pause()
    pool.asked[0][1].fail(NodeUnreachable("cut", node="n"))

    assert pool.asked[1][2].paused
    call.resume()
    assert not pool.asked[1][2].paused


def test_where_no_model_of_the_chain_is_there_the_settings_are_named() -> None:
    reply = Heard()

    typed(AnyPool(), rules()).start(chat(), reply)

    assert isinstance(reply.errors[0], BadRequest)
    assert "[auto]" in reply.errors[0].message
    assert "a, b, c" in reply.errors[0].message


def test_an_embedding_needs_a_model_that_is_named() -> None:
    request = chat()
    request.endpoint, request.body = Endpoint.OPENAI_EMBEDDING, b'{"model":"auto","input":"x"}'
    reply = Heard()

    typed(AnyPool(), rules(), a=FREE).start(request, reply)

    assert "embeddings" in reply.errors[0].message


def test_without_a_name_nothing_is_chosen() -> None:
    pool, request = AnyPool(), chat("auto")

    typed(pool, rules(name=""), a=FREE).start(request, Heard())

    assert pool.asked[0][0] is request


def test_how_often_each_kind_was_chosen_is_counted() -> None:
    stage = typed(AnyPool(), rules(), a=FREE)

    stage.start(chat(text="Write a Python function that sorts a list."), Heard())

    assert stage.chosen[RequestType.CODE_GENERATION] == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"auto","messages":[{"role":"user","content":"\xff"}]}',
        b'{"model":"auto","messages":[{"role":"user","content":"a"}],"\xff":1}',
    ],
)
def test_a_body_that_is_no_unicode_is_refused_and_nothing_is_raised(body: bytes) -> None:
    """Whoever is further out has set aside room in the limits, which only a reply gives back."""
    request, reply = chat(), Heard()
    request.body = body

    call = typed(AnyPool(), rules(), a=FREE).start(request, reply)
    call.cancel()

    assert isinstance(reply.errors[0], BadRequest)
    assert len(reply.errors) == 1


def test_a_chain_that_names_a_model_twice_asks_it_once() -> None:
    pool, reply = AnyPool({"a": failing(NoHealthyNode("down", retry_after_s=1))}), Heard()

    typed(pool, rules(fallbacks={"a": ("a", "b", "b")}), a=FREE, b=FREE).start(chat("a"), reply)

    assert pool.models == ["a", "b"]


def test_to_load_one_model_does_not_mean_to_load_another() -> None:
    pool, request, reply = AnyPool(), chat("big"), Heard()
    request.loads_only = True

    typed(pool, rules(fallbacks={"big": ("small",)}), big=BUSY, small=FREE).start(request, reply)

    assert pool.asked[0][0] is request
    assert pool.asked[0][1] is reply


def test_while_every_node_of_the_chain_is_down_the_client_is_told_to_come_back() -> None:
    reply = Heard()

    typed(AnyPool(), rules(), a=DOWN).start(chat(), reply)

    assert isinstance(reply.errors[0], NoHealthyNode)


def test_a_named_model_that_is_down_with_all_that_could_stand_in_is_refused_as_without_a_chain() -> None:
    pool, request, reply = AnyPool(), chat("big"), Heard()

    typed(pool, rules(fallbacks={"big": ("small",)}), big=DOWN).start(request, reply)

    assert pool.asked[0][0] is request
    assert pool.asked[0][1] is reply


def test_a_choice_that_is_down_is_not_offered() -> None:
    stage = typed(AnyPool(), rules(), a=DOWN)

    assert stage.choice() == ""


def test_where_the_named_model_answers_there_is_nothing_to_tell_about_it() -> None:
    pool, reply = AnyPool(), Heard()

    typed(pool, rules(fallbacks={"big": ("small",)}), big=FREE).start(chat("big"), reply)
    pool.asked[0][1].head(head())

    assert reply.heads[0].model == ""
