"""Conversations that the platform keeps, through real gateways on a real database."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from sutazai.adapters.postgres.stores import open_stores
from sutazai.core.identity import Role
from sutazai.core.node import NodeKind
from sutazai.settings.model import Auth, Database, LimitSettings, Sessions, Timeouts
from sutazai.testing import Answer, Fault
from sutazai.testing.script import ToolCall

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Answered, Dial, StartGateway, StartNode, StartProgram, Wire
    from tests.redis_servers import Servers

    from sutazai.adapters.postgres.stores import Stores
    from sutazai.testing import FakeNode, Received

SLOW = Answer(tokens=("Hel", "lo"), first_token_s=30.0)


@pytest.fixture
async def stores(data_dir: Path) -> AsyncIterator[Stores]:
    """The same database as the gateway's, as the command line would open it."""
    async with open_stores(Database(), data_dir) as opened:
        yield opened


@pytest.fixture(params=list(NodeKind), ids=lambda kind: kind.value)
async def node(request: pytest.FixtureRequest, fake_nodes: StartNode) -> FakeNode:
    """A node of each kind."""
    return await fake_nodes(request.param)


@pytest.fixture
async def wire(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> Wire:
    """A connection to a gateway with one node."""
    return await dial((await gateways(await fake_nodes())).port)


async def begun(wire: Wire, *headers: str, **draft: Any) -> str:
    """The id of a new session."""
    wire.post("/v1/sessions", {"model": "llama3"} | draft, *headers)
    answer = await wire.answer()
    assert answer.status == 201, answer.body
    found: str = answer.json["id"]
    return found


def ask(wire: Wire, session: str, text: str, *headers: str, **fields: Any) -> None:
    """Send a turn."""
    body = {"messages": [{"role": "user", "content": text}]} | fields
    wire.post(f"/v1/sessions/{session}/chat/completions", body, *headers)


async def asked(wire: Wire, session: str, text: str, *headers: str, **fields: Any) -> Answered:
    """One turn."""
    ask(wire, session, text, *headers, **fields)
    return await wire.answer()


async def said(wire: Wire, session: str, *headers: str) -> list[str]:
    """The contents of what is kept."""
    wire.get(f"/v1/sessions/{session}/messages", *headers)
    return [one["content"] for one in (await wire.answer()).json["data"]]


def told(received: Received) -> list[str]:
    """The contents of the messages that a node got."""
    return [message["content"] for message in received.json["messages"]]


async def test_a_turn_comes_with_all_that_was_said_before(gateways: StartGateway, node: FakeNode, dial: Dial) -> None:
    """Whole and streamed, whatever API the node speaks."""
    wire = await dial((await gateways(node)).port)
    session = await begun(wire, system="Be brief.")
    whole = await asked(wire, session, "one")
    stream = await asked(wire, session, "two", stream=True)
    again = await asked(wire, session, "three")

    assert (whole.status, stream.status, again.status) == (200, 200, 200)
    assert whole.json["choices"][0]["message"]["content"] == "Hello"
    assert whole.headers["x-sutazai-node"]
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.body.endswith(b"data: [DONE]\n\n")
    assert told(node.inferences[-1]) == ["Be brief.", "one", "Hello", "two", "Hello", "three"]
    assert await said(wire, session) == ["one", "Hello", "two", "Hello", "three", "Hello"]


async def test_a_session_tells_what_it_is(wire: Wire) -> None:
    before = time.time()
    session = await begun(wire, system="Be brief.", metadata={"room": "kitchen"}, ttl_s=60)
    await asked(wire, session, "one")
    wire.get(f"/v1/sessions/{session}")
    shown = (await wire.answer()).json

    assert shown["created_at"] >= int(before)
    assert 55 <= shown["expires_at"] - time.time() <= 61
    assert {name: shown[name] for name in ("id", "object", "model", "system", "metadata", "turns", "messages")} == {
        "id": session,
        "object": "session",
        "model": "llama3",
        "system": "Be brief.",
        "metadata": {"room": "kitchen"},
        "turns": 1,
        "messages": 2,
    }


async def test_sessions_are_listed_page_by_page_and_deleted(wire: Wire) -> None:
    mine = [await begun(wire) for _ in range(5)]
    wire.get("/v1/sessions?limit=2")
    first = (await wire.answer()).json
    wire.get(f"/v1/sessions?limit=100&after={first['last_id']}")
    rest = (await wire.answer()).json
    wire.get(f"/v1/sessions/{mine[0]}", method="DELETE")
    gone = await wire.answer()
    wire.get(f"/v1/sessions/{mine[0]}")

    seen = [one["id"] for one in first["data"] + rest["data"]]
    assert first["has_more"]
    assert len(first["data"]) == 2
    assert sorted(set(mine) & set(seen)) == sorted(mine)
    assert seen == sorted(set(seen), reverse=True)
    assert gone.json == {"id": mine[0], "object": "session.deleted", "deleted": True}
    assert (await wire.answer()).status == 404


async def test_tool_calls_are_kept_and_their_results_go_with_them(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    call = ToolCall(name="weather", arguments={"place": "Rome"})
    node.script.extend([Answer(tokens=(), tool_calls=(call,)), Answer()])
    wire = await dial((await gateways(node)).port)
    session = await begun(wire)
    first = await asked(wire, session, "Weather?", stream=True)
    wire.get(f"/v1/sessions/{session}/messages")
    [_, assistant] = (await wire.answer()).json["data"]
    result = {"role": "tool", "tool_call_id": assistant["tool_calls"][0]["id"], "content": "sunny"}
    wire.post(f"/v1/sessions/{session}/chat/completions", {"messages": [result]})
    second = await wire.answer()

    assert (first.status, second.status) == (200, 200)
    assert assistant["tool_calls"][0]["function"]["name"] == "weather"
    assert node.inferences[-1].json["messages"][1:] == [assistant, result]


async def test_of_two_turns_at_once_the_second_is_a_conflict(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """In one gateway, which says so at once; and in two, where the later one finds out at its end."""
    node = await fake_nodes()
    here, there = await gateways(node), await gateways(node)
    wires = [await dial(port) for port in (here.port, here.port, there.port)]
    session = await begun(wires[0])
    node.script.extend([Answer(first_token_s=0.6), Answer(first_token_s=0.2)])
    ask(wires[0], session, "one")
    await node.until(lambda: len(node.inferences) == 1)
    at_once = await asked(wires[1], session, "two")
    won = await asked(wires[2], session, "three")
    lost = await wires[0].answer()

    assert (at_once.status, won.status, lost.status) == (409, 200, 409)
    assert at_once.json["error"]["type"] == "conflict_error"
    assert len(node.inferences) == 2
    assert await said(wires[0], session) == ["three", "Hello"]


async def test_a_streamed_turn_that_lost_says_so_in_place_of_its_end(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    here, there = await gateways(node), await gateways(node)
    one, two = await dial(here.port), await dial(there.port)
    session = await begun(one)
    node.script.extend([Answer(first_token_s=0.4), Answer()])
    ask(one, session, "one", stream=True)
    await node.until(lambda: len(node.inferences) == 1)
    assert (await asked(two, session, "two")).status == 200
    lost = await one.answer()

    assert lost.status == 200
    assert b"[DONE]" not in lost.body
    assert msgspec.json.decode(lost.body.rsplit(b"data: ", 1)[1])["error"]["code"] == "409"


async def test_of_a_client_that_leaves_in_the_middle_nothing_is_kept(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    node.script.append(Answer(tokens=("a", "b", "c"), between_s=30.0))
    gateway = await gateways(node)
    wire, other = await dial(gateway.port), await dial(gateway.port)
    session = await begun(wire)
    ask(wire, session, "one", stream=True)
    await wire.head()
    while b'"a"' not in await wire.chunk():
        pass
    wire.writer.close()
    await node.until(lambda: node.inferences[0].aborted)

    assert await said(other, session) == []
    assert (await asked(other, session, "again")).status == 200


async def test_a_node_that_breaks_in_the_middle_leaves_the_session_as_it_was(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    node.script.append(Fault.reset_mid_stream(1))
    wire = await dial((await gateways(node)).port)
    session = await begun(wire)
    broken = await asked(wire, session, "one", stream=True)
    whole = await asked(wire, session, "two")

    assert b'"error"' in broken.body
    assert b"[DONE]" not in broken.body
    assert whole.status == 200
    assert await said(wire, session) == ["two", "Hello"]


async def test_a_turn_that_waits_gets_signs_of_life(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    node = await fake_nodes()
    node.script.append(Answer(first_token_s=0.5))
    wire = await dial((await gateways(node, timeouts=Timeouts(keep_alive_s=0.1))).port)
    session = await begun(wire)
    answer = await asked(wire, session, "one", stream=True)

    assert answer.body.startswith(b": waiting\n\n: waiting\n\n")
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert await said(wire, session) == ["one", "Hello"]


async def test_a_question_that_no_node_can_answer_has_the_status_it_has_elsewhere(wire: Wire) -> None:
    session = await begun(wire, model="nobody-has-it")

    for stream in (False, True):
        answer = await asked(wire, session, "one", stream=stream)
        assert answer.status == 404
        assert "nobody-has-it" in answer.json["error"]["message"]
    assert await said(wire, session) == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("", {}),
        ("", {"model": ""}),
        ("", {"model": "a\0b"}),
        ("", {"model": "m", "system": "a\0b"}),
        ("", {"model": "m", "metadata": {"a": "b\0"}}),
        ("", {"model": "m", "metadata": {"a": 1}}),
        ("", {"model": "m", "metadata": {str(n): "" for n in range(17)}}),
        ("", {"model": "m", "ttl_s": 0}),
        ("", {"model": "m", "ttl_s": 1e9}),
        ("", {"model": "m", "unknown": 1}),
        ("/{}/chat/completions", {"messages": []}),
        ("/{}/chat/completions", {"messages": [{"role": "user"}]}),
        ("/{}/chat/completions", b"\xff"),
    ],
)
async def test_what_cannot_be_understood_is_a_400(wire: Wire, path: str, body: object) -> None:
    session = await begun(wire)
    wire.post(f"/v1/sessions{path.format(session)}", body)
    answer = await wire.answer()

    assert answer.status == 400, answer.body
    assert answer.json["error"]["message"]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "limit=%C2%B2", "limit=", "after=%00"])
async def test_a_page_that_cannot_be_understood_is_a_400(wire: Wire, query: str) -> None:
    wire.get(f"/v1/sessions?{query}")

    assert (await wire.answer()).status == 400


async def test_a_tenant_sees_its_own_sessions_alone(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, stores: Stores
) -> None:
    """To another, one of its sessions is like one that is not there: the same status, the same words."""
    node = await fake_nodes()
    keys = {}
    for tenant in (f"a{time.monotonic_ns()}", f"b{time.monotonic_ns()}"):
        keys[tenant] = (await stores.keys.create(name=f"test {tenant}", tenant=tenant, role=Role.USER))[1]
    mine, theirs = (f"Authorization: Bearer {key}" for key in keys.values())
    wire = await dial((await gateways(node, auth=Auth(required=True))).port)
    session = await begun(wire, mine)
    assert (await asked(wire, session, "secret", mine)).status == 200
    absent = "sess_" + "0" * 32
    for method, path in (
        ("GET", ""),
        ("GET", "/messages"),
        ("DELETE", ""),
        ("POST", "/chat/completions"),
    ):
        answers = []
        for wanted in (session, absent):
            if method == "POST":
                ask(wire, wanted, "hi", theirs)
            else:
                wire.get(f"/v1/sessions/{wanted}{path}", theirs, method=method)
            answer = await wire.answer()
            answers.append((answer.status, answer.body.replace(wanted.encode(), b"X")))
        assert answers[0] == answers[1]
        assert answers[0][0] == 404
    wire.get("/v1/sessions", theirs)

    assert (await wire.answer()).json["data"] == []
    assert await said(wire, session, mine) == ["secret", "Hello"]
    assert len(node.inferences) == 1


async def test_a_session_past_its_time_is_gone(wire: Wire) -> None:
    session = await begun(wire, ttl_s=0.05)
    async with asyncio.timeout(5):
        while True:
            wire.get(f"/v1/sessions/{session}")
            if (await wire.answer()).status == 404:
                break

    assert (await asked(wire, session, "one")).status == 404


async def test_settings_bound_what_a_session_holds(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    rules = Sessions(max_messages=4, max_per_tenant=10_000, max_bytes=2000)
    wire = await dial((await gateways(await fake_nodes(), sessions=rules)).port)
    session = await begun(wire)
    for text in ("one", "two", "three"):
        await asked(wire, session, text)
    too_large = await asked(wire, session, "x" * 2000)

    assert await said(wire, session) == ["two", "Hello", "three", "Hello"]
    assert too_large.status == 413


async def test_turns_are_counted_like_other_requests(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    wire = await dial((await gateways(await fake_nodes())).port)
    session = await begun(wire)
    await asked(wire, session, "one")
    wire.get("/metrics")
    page = (await wire.answer()).body.decode()

    assert any("llama3" in line and line.endswith(" 1.0") for line in page.splitlines() if "requests_total" in line)


async def test_a_turn_beyond_a_limit_is_told_how_the_limits_stand(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    limits = LimitSettings(requests_per_minute=1)
    wire = await dial((await gateways(await fake_nodes(), limits=limits)).port)
    session = await begun(wire)
    first, second = await asked(wire, session, "one"), await asked(wire, session, "two")

    assert (first.status, second.status) == (200, 429)
    for answer in (first, second):
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert int(second.headers["retry-after"]) >= 1
    assert await said(wire, session) == ["one", "Hello"]


# several gateways


@pytest.mark.deadline(120)
@pytest.mark.parametrize("with_redis", [False, True], ids=["alone", "redis"])
async def test_a_conversation_outlives_the_gateway_that_had_it(
    programs: StartProgram, fake_nodes: StartNode, dial: Dial, redis_alone: Servers, with_redis: bool
) -> None:
    """Killed without a word between two turns; with Redis, that loses all it has between the next two."""
    node = await fake_nodes()
    toml = f'[server]\nport = 0\n[[nodes]]\nurl = "{node.url}"\n'
    if with_redis:
        toml += f'[redis]\nurl = "{redis_alone.url}"\n'
    first, second = await programs(toml), await programs(toml)
    wire, other = await dial(first.port), await dial(second.port)
    session = await begun(wire)
    assert (await asked(wire, session, "one", stream=True)).body.endswith(b"[DONE]\n\n")
    first.process.kill()
    await first.ended()
    assert (await asked(other, session, "two")).status == 200
    if with_redis:
        redis_alone.servers[0].cli("FLUSHALL")
    assert (await asked(other, session, "three")).status == 200

    assert told(node.inferences[-1]) == ["one", "Hello", "two", "Hello", "three"]
    assert await said(other, session) == ["one", "Hello", "two", "Hello", "three", "Hello"]


@pytest.mark.deadline(120)
async def test_a_gateway_that_is_killed_in_the_middle_of_a_turn_leaves_the_session_as_it_was(
    programs: StartProgram, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    toml = f'[server]\nport = 0\n[[nodes]]\nurl = "{node.url}"\n'
    first, second = await programs(toml), await programs(toml)
    wire, other = await dial(first.port), await dial(second.port)
    session = await begun(wire)
    await asked(wire, session, "one")
    node.script.append(SLOW)
    ask(wire, session, "two", stream=True)
    await node.until(lambda: len(node.inferences) == 2)
    first.process.kill()
    await first.ended()

    assert await said(other, session) == ["one", "Hello"]
    assert (await asked(other, session, "two again")).status == 200
    assert told(node.inferences[-1]) == ["one", "Hello", "two again"]
