"""Sessions over a store in memory and a node that does as it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from sutazai.core.errors import (
    BadRequest,
    Conflict,
    NodeFault,
    NodeTimeout,
    NotFound,
    RateLimited,
    StoreUnavailable,
    TooLarge,
)
from sutazai.core.request import Endpoint, Head, Request
from sutazai.core.session import Session
from sutazai.gateway.sessions import SWEPT_AT_ONCE, Sessions, Turn
from sutazai.ports.inference import Reply
from sutazai.settings.model import Sessions as Rules
from sutazai.testing.sessions import MemorySessions

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
EVENTS = (
    b'data: {"choices":[{"delta":{"role":"assistant","content":"Hel"}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"lo"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
)
WHOLE = b'{"choices":[{"message":{"role":"assistant","content":"Hello"}}]}'


class Answering:
    """An `Inference` that hands its replies to the test."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.replies: list[Reply] = []
        self.cancelled = 0
        self.at_once: Callable[[Reply], None] | None = None

    def start(self, request: Request, reply: Reply) -> Answering:
        self.requests.append(request)
        self.replies.append(reply)
        if self.at_once is not None:
            self.at_once(reply)
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    def pause(self) -> None:
        raise AssertionError("nothing here is large")

    def resume(self) -> None:
        raise AssertionError("nothing here is large")

    def told(self) -> list[str]:
        """The contents of the messages of the last request."""
        return [message["content"] for message in msgspec.json.decode(self.requests[-1].body)["messages"]]


class World:
    """Sessions with everything around them."""

    def __init__(self, rules: Rules | None = None, context_tokens: int = 4096) -> None:
        self.store = MemorySessions()
        self.node = Answering()
        self.now = NOW
        self.sessions = Sessions(
            self.store,
            self.node,
            rules=rules or Rules(),
            context_tokens=lambda _model: context_tokens,
            wall=lambda: self.now,
        )

    async def create(self, system: str = "", ttl_s: float | None = None) -> Session:
        return await self.sessions.create("acme", model="llama3", system=system, metadata={}, ttl_s=ttl_s)

    async def ask(self, session: Session, *texts: str, tenant: str = "acme", **fields: Any) -> Turn:
        messages = [{"role": "user", "content": text} for text in texts]
        body = msgspec.json.encode({"messages": messages} | fields)
        return await self.sessions.ask(session.id, Request("r", Endpoint.OPENAI_CHAT, "", False, body, tenant, "", 0.0))

    async def turn(self, session: Session, *texts: str, **fields: Any) -> bytes:
        """A whole turn that is answered at once."""
        self.node.at_once = lambda reply: reply.whole(Head(200, b"application/json", len(WHOLE), "a", ""), WHOLE, None)
        turn = await self.ask(session, *texts, **fields)
        try:
            return await turn.whole()
        finally:
            turn.close()
            self.node.at_once = None

    async def said(self, session: Session) -> list[str]:
        messages = await self.sessions.messages("acme", session.id)
        return [msgspec.json.decode(message.body)["content"] for message in messages]


async def into(seen: list[bytes], parts: AsyncIterator[bytes]) -> None:
    async for part in parts:
        seen.append(part)  # noqa: PERF401 - what came before an error counts


async def test_a_turn_is_asked_with_what_was_said_and_goes_to_the_node_of_its_session() -> None:
    world = World()
    session = await world.create(system="Be brief.")
    await world.turn(session, "one")
    await world.turn(session, "two", "three")

    assert world.node.told() == ["Be brief.", "one", "Hello", "two", "three"]
    assert world.node.requests[-1].conversation == session.id.encode()
    assert world.node.requests[-1].model == "llama3"
    assert await world.said(session) == ["one", "Hello", "two", "three", "Hello"]
    assert world.sessions.kept == 2


async def test_a_conversation_that_is_too_long_is_asked_with_its_newest_part_and_kept_whole() -> None:
    world = World(context_tokens=300)
    session = await world.create(system="Be brief.")
    for number in range(10):
        await world.turn(session, f"{number}" * 300)

    assert world.node.told() == ["Be brief.", "8" * 300, "Hello", "9" * 300]
    assert len(await world.said(session)) == 20


async def test_tools_and_the_longest_answer_take_their_room() -> None:
    world = World(context_tokens=1000)
    session = await world.create()
    for number in range(4):
        await world.turn(session, f"{number}" * 400)
    tool = {"type": "function", "function": {"name": "f", "description": "x" * 2000}}
    await world.turn(session, "last", tools=[tool], max_tokens=300)

    assert world.node.told() == ["3" * 400, "Hello", "last"]


async def test_a_stream_is_kept_before_its_end_is_given() -> None:
    world = World()
    session = await world.create()
    turn = await world.ask(session, "one", stream=True)
    [reply] = world.node.replies
    reply.head(Head(200, b"text/event-stream", None, "a", ""))
    for event in EVENTS:
        reply.chunk(event)
    reply.end(None)
    seen = [(part, len(await world.said(session))) async for part in turn.parts()]
    turn.close()

    assert b"".join(part for part, _ in seen) == b"".join(EVENTS)
    assert [(b"[DONE]" in part, kept) for part, kept in seen] == [(False, 0), (False, 0), (True, 2)]
    assert await world.said(session) == ["one", "Hello"]


async def test_of_a_turn_that_is_closed_in_the_middle_nothing_is_kept() -> None:
    world = World()
    session = await world.create()
    turn = await world.ask(session, "one", stream=True)
    [reply] = world.node.replies
    reply.head(Head(200, b"text/event-stream", None, "a", ""))
    reply.chunk(EVENTS[0])
    parts = turn.parts()
    await anext(parts)
    turn.close()
    turn.close()

    assert await world.said(session) == []
    assert world.node.cancelled == 1
    await world.turn(session, "again")
    assert await world.said(session) == ["again", "Hello"]


async def test_of_a_turn_that_fails_nothing_is_kept() -> None:
    world = World()
    session = await world.create()
    turn = await world.ask(session, "one")
    world.node.replies[0].fail(NodeTimeout("It was silent.", node="a"))
    with pytest.raises(NodeTimeout):
        await turn.whole()
    turn.close()

    assert await world.said(session) == []


@pytest.mark.parametrize(
    "stream", [EVENTS[:1], [b'data: {"error":{"message":"It broke."}}\n\n'], [b"data: nonsense\n\ndata: [DONE]\n\n"]]
)
async def test_a_stream_that_cannot_be_kept_is_told_in_place_of_its_end(stream: list[bytes]) -> None:
    world = World()
    session = await world.create()
    turn = await world.ask(session, "one", stream=True)
    [reply] = world.node.replies
    reply.head(Head(200, b"text/event-stream", None, "a", ""))
    for event in stream:
        reply.chunk(event)
    reply.end(None)
    seen: list[bytes] = []
    with pytest.raises(NodeFault, match="Nothing of the turn was kept"):
        await into(seen, turn.parts())
    turn.close()

    assert b"".join(seen) == b"".join(stream).removesuffix(b"data: [DONE]\n\n")
    assert await world.said(session) == []


async def test_a_second_turn_at_once_is_a_conflict_and_reaches_no_node() -> None:
    world = World()
    session = await world.create()
    first = await world.ask(session, "one")
    with pytest.raises(Conflict, match="another turn"):
        await world.ask(session, "two")
    first.close()

    assert len(world.node.requests) == 1
    assert world.sessions.conflicts == 1
    await world.turn(session, "two")


async def test_a_turn_that_another_gateway_overtook_is_a_conflict() -> None:
    world = World()
    session = await world.create()
    here = await world.ask(session, "here")
    there = Sessions(world.store, world.node, rules=Rules(), context_tokens=lambda _: 4096, wall=lambda: NOW)
    world.sessions, ours = there, world.sessions
    await world.turn(session, "there")
    world.node.replies[0].whole(Head(200, b"application/json", None, "a", ""), WHOLE, None)
    with pytest.raises(Conflict):
        await here.whole()
    here.close()

    assert await world.said(session) == ["there", "Hello"]
    assert (ours.conflicts, ours.kept) == (1, 0)


async def test_a_question_that_is_wrong_leaves_the_session_free() -> None:
    world = World()
    session = await world.create()
    with pytest.raises(BadRequest):
        await world.ask(session)

    await world.turn(session, "one")


async def test_a_store_that_is_away_is_told_and_leaves_the_session_free() -> None:
    world = World()
    session = await world.create()
    turn = await world.ask(session, "one")
    world.store.is_away = True
    world.node.replies[0].whole(Head(200, b"application/json", None, "a", ""), WHOLE, None)
    with pytest.raises(StoreUnavailable):
        await turn.whole()
    turn.close()
    world.store.is_away = False

    await world.turn(session, "one")


@pytest.mark.parametrize("session_id", ["", "sess_x", "sess_" + "0" * 32, "sess_" + "0" * 31 + "\0", "../x"])
async def test_what_is_no_session_is_not_found(session_id: str) -> None:
    world = World()

    with pytest.raises(NotFound):
        await world.sessions.get("acme", session_id)
    with pytest.raises(NotFound):
        await world.sessions.delete("acme", session_id)


async def test_a_foreign_session_is_not_found_in_the_same_words_as_none() -> None:
    world = World()
    session = await world.create()
    absent = "sess_" + "0" * 32
    words = []
    for tenant, wanted in (("rival", session.id), ("acme", absent)):
        with pytest.raises(NotFound) as caught:
            await world.sessions.get(tenant, wanted)
        words.append(caught.value.message.replace(wanted, "X"))
    with pytest.raises(NotFound):
        await world.ask(session, "hi", tenant="rival")

    assert words[0] == words[1]
    assert not world.node.requests


async def test_a_session_lives_from_its_last_turn_on() -> None:
    world = World()
    session = await world.create(ttl_s=60.0)
    world.now = NOW + timedelta(seconds=59)
    await world.turn(session, "one")
    world.now = NOW + timedelta(seconds=118)

    assert (await world.sessions.get("acme", session.id)).expires_at == NOW + timedelta(seconds=119)
    world.now = NOW + timedelta(seconds=119)
    with pytest.raises(NotFound):
        await world.sessions.get("acme", session.id)
    assert await world.sessions.page("acme", before="", limit=9) == []


async def test_a_sweep_forgets_all_that_is_over() -> None:
    world = World(Rules(max_per_tenant=5000))
    for _ in range(SWEPT_AT_ONCE + 2):
        await world.create(ttl_s=1.0)
    await world.create()
    world.now = NOW + timedelta(seconds=2)
    await world.sessions.sweep()

    assert world.sessions.swept == SWEPT_AT_ONCE + 2
    assert len(await world.sessions.page("acme", before="", limit=9)) == 1


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, 86_401.0, float("nan")])
async def test_a_time_to_live_is_within_the_settings(ttl_s: float) -> None:
    with pytest.raises(BadRequest) as caught:
        await World().create(ttl_s=ttl_s)
    assert caught.value.where == "ttl_s"


async def test_a_tenant_with_too_many_sessions_is_told_to_come_back() -> None:
    world = World(Rules(max_per_tenant=2))
    await world.create()
    await world.create()
    with pytest.raises(RateLimited, match="max_per_tenant") as caught:
        await world.create()
    assert caught.value.retry_after_s > 0


async def test_a_session_keeps_its_newest_messages_and_no_half_round() -> None:
    world = World(Rules(max_messages=5))
    session = await world.create()
    for text in ("one", "two", "three"):
        await world.turn(session, text)

    assert await world.said(session) == ["two", "Hello", "three", "Hello"]
    assert (await world.sessions.get("acme", session.id)).messages == 4


async def test_a_session_keeps_no_more_bytes_than_it_may() -> None:
    world = World(Rules(max_bytes=2048))
    session = await world.create()
    for text in ("a", "b", "c"):
        await world.turn(session, text * 800)

    assert await world.said(session) == ["b" * 800, "Hello", "c" * 800, "Hello"]


@pytest.mark.parametrize("rules", [Rules(max_messages=4), Rules(max_bytes=1024)])
async def test_one_round_that_is_more_than_a_session_may_hold_is_refused(rules: Rules) -> None:
    world = World(rules)
    session = await world.create()
    messages = [
        {"role": "user", "content": "x" * 300},
        *({"role": "assistant", "content": "y" * 300} for _ in range(3)),
    ]
    body = msgspec.json.encode({"messages": messages})
    with pytest.raises(TooLarge, match=r"sessions\.max_"):
        await world.sessions.ask(session.id, Request("r", Endpoint.OPENAI_CHAT, "", False, body, "acme", "", 0.0))

    assert not world.node.requests
    await world.turn(session, "one")
