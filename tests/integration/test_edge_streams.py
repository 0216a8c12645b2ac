"""Streams through the gateway: nothing is held back, nobody is waited for who left, and every end is told."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from sutazai.core.node import NodeKind
from sutazai.settings.model import HealthSettings, NodeSettings, Queue, Retry, Routing, Timeouts
from sutazai.testing import Answer, Fault

if TYPE_CHECKING:
    from tests.conftest import Dial, StartGateway, StartNode, StartProgram, Wire

    from sutazai.testing import FakeNode

CHATS = {"openai": "/v1/chat/completions", "ollama": "/api/chat"}
ALL_DIALECTS = pytest.mark.parametrize("dialect", list(CHATS))
ALL_KINDS = pytest.mark.parametrize("kind", list(NodeKind))
STREAMED = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
SLOWLY = Answer(between_s=0.05)
"""So that the fault is not read together with the token before it."""
ONE_TRY = Retry(attempts=1)
FREE_S = 1.0
"""A node is free that soon after its client left."""


def chat(**fields: object) -> dict[str, Any]:
    return {"model": "llama3", "messages": [{"role": "user", "content": "hi"}], "stream": True} | fields


def content_of(dialect: str, stream: bytes) -> str:
    """The text in whatever came of a stream."""
    return "".join(_content(dialect, event) for event in events(dialect, stream) if "error" not in event)


def events(dialect: str, stream: bytes) -> list[dict[str, Any]]:
    """The JSON of a stream."""
    lines = [line for line in stream.split(b"\n") if line.strip() and not line.startswith(b":")]
    if dialect == "openai":
        lines = [line.removeprefix(b"data: ") for line in lines if line != b"data: [DONE]"]
    return [json.loads(line) for line in lines]


def _content(dialect: str, event: dict[str, Any]) -> str:
    if dialect == "ollama":
        return str(event["message"]["content"])
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


async def until_content(wire: Wire, dialect: str, wanted: str) -> bytes:
    """Read a chunked stream until this much text has come."""
    got = b""
    while content_of(dialect, got) != wanted:
        part = await wire.chunk()
        assert part, got
        got += part
    return got


@ALL_KINDS
@ALL_DIALECTS
async def test_a_token_is_passed_on_before_the_next_one_exists(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, kind: NodeKind, dialect: str
) -> None:
    node = await fake_nodes(kind)
    node.default = Fault.stall_mid_stream(1, Answer(tokens=("one", "two")))
    gateway = await gateways(node)
    wire = await dial(gateway.port)
    wire.post(CHATS[dialect], chat())
    head = await wire.head()
    async with asyncio.timeout(2):
        await until_content(wire, dialect, "one")

    assert head.status == 200
    assert node.in_flight == 1


@ALL_DIALECTS
async def test_tokens_come_in_the_rhythm_of_the_node(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, dialect: str
) -> None:
    node = await fake_nodes()
    node.default = Answer(tokens=tuple("abcde"), between_s=0.1)
    gateway = await gateways(node)
    wire = await dial(gateway.port)
    wire.post(CHATS[dialect], chat())
    await wire.head()
    came_at: list[float] = []
    for count in range(1, 6):
        await until_content(wire, dialect, "abcde"[count - 1])
        came_at.append(time.monotonic())

    assert came_at[-1] - came_at[0] > 0.3


@ALL_DIALECTS
async def test_a_stream_without_a_token_shows_signs_of_life(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, dialect: str
) -> None:
    node = await fake_nodes()
    node.default = Answer(first_token_s=1.2)
    gateway = await gateways(node, timeouts=Timeouts(keep_alive_s=0.2))
    wire = await dial(gateway.port)
    wire.post(CHATS[dialect], chat())
    head = await wire.head()
    signs = [await wire.chunk(), await wire.chunk()]
    rest = await until_content(wire, dialect, "Hello")

    assert head.status == 200
    assert signs == [b" " if dialect == "ollama" else b": waiting\n\n"] * 2
    assert content_of(dialect, rest) == "Hello"


async def test_an_answer_in_one_piece_shows_no_signs_of_life(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    node.default = Answer(first_token_s=0.6)
    gateway = await gateways(node, timeouts=Timeouts(keep_alive_s=0.1))
    wire = await dial(gateway.port)
    wire.post("/api/chat", chat(stream=False))
    answer = await wire.answer()

    assert answer.json["message"]["content"] == "Hello"


@STREAMED
@ALL_KINDS
@ALL_DIALECTS
async def test_a_client_that_leaves_before_the_first_token_frees_the_node(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, kind: NodeKind, dialect: str, stream: bool
) -> None:
    node = await fake_nodes(kind)
    node.default = Answer(first_token_s=30)
    gateway = await gateways(node)
    wire, watcher = await dial(gateway.port), await dial(gateway.port)
    wire.post(CHATS[dialect], chat(stream=stream))
    await node.wait_for(1)
    wire.writer.close()

    await node.wait_idle(within_s=FREE_S)
    assert node.inferences[0].aborted
    assert await watcher.gauge("sutazai_in_flight") == 0
    assert gateway.fleet.states()[0].in_flight == 0


@ALL_KINDS
@ALL_DIALECTS
async def test_a_client_that_leaves_in_the_middle_frees_the_node(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, kind: NodeKind, dialect: str
) -> None:
    node = await fake_nodes(kind)
    node.default = Answer(tokens=("x",) * 1000, between_s=0.05)
    gateway = await gateways(node)
    wire = await dial(gateway.port)
    wire.post(CHATS[dialect], chat())
    await wire.head()
    await until_content(wire, dialect, "xx")
    wire.writer.close()

    await node.wait_idle(within_s=FREE_S)
    assert node.inferences[0].aborted


@pytest.mark.parametrize(
    "fault",
    [
        Fault.reset_mid_stream(1, SLOWLY),
        Fault.truncate(1, SLOWLY),
        Fault.garbage_mid_stream(1, SLOWLY),
        Fault.stall_mid_stream(1, SLOWLY),
    ],
    ids=lambda fault: fault.name,
)
@ALL_KINDS
@ALL_DIALECTS
async def test_a_stream_that_breaks_ends_with_an_error_of_the_dialect(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, kind: NodeKind, dialect: str, fault: Fault
) -> None:
    node = await fake_nodes(kind)
    node.script.append(fault)
    gateway = await gateways(node, timeouts=Timeouts(idle_s=0.3))
    wire = await dial(gateway.port)
    wire.post(CHATS[dialect], chat())
    answer = await wire.answer()
    *before, last = events(dialect, answer.body)

    assert answer.status == 200
    assert [_content(dialect, event) for event in before if _content(dialect, event)] == ["Hel"]
    assert sentence_in(dialect, last).endswith(".")
    assert b"[DONE]" not in answer.body
    wire.post(CHATS[dialect], chat())
    assert content_of(dialect, (await wire.answer()).body) == "Hello"


def sentence_in(dialect: str, error: dict[str, Any]) -> str:
    """What an error says, in the form of the dialect."""
    if dialect == "ollama":
        assert list(error) == ["error"]
        return str(error["error"])
    assert set(error["error"]) == {"message", "type", "param", "code"}
    return str(error["error"]["message"])


@pytest.mark.parametrize(
    ("limits", "fault", "sentence"),
    [
        (Timeouts(first_token_s=0.3), Fault.stall_before_head(), "gave no token within 0.3 s"),
        (Timeouts(total_s=0.3), Fault.stall_before_head(), "not complete after 0.3 s"),
    ],
    ids=["first token", "total"],
)
@STREAMED
@ALL_DIALECTS
async def test_a_node_that_says_nothing_in_time_is_a_504(
    gateways: StartGateway,
    fake_nodes: StartNode,
    dial: Dial,
    dialect: str,
    stream: bool,
    limits: Timeouts,
    fault: Fault,
    sentence: str,
) -> None:
    node = await fake_nodes()
    node.default = fault
    gateway = await gateways(node, timeouts=limits)
    wire = await dial(gateway.port)
    wire.post(CHATS[dialect], chat(stream=stream))
    answer = await wire.answer()

    assert answer.status == 504
    assert sentence in sentence_in(dialect, answer.json)
    await node.wait_idle(within_s=FREE_S)


@pytest.mark.parametrize(
    ("limits", "planned", "sentence"),
    [
        (Timeouts(first_token_s=0.3), Fault.stall_mid_stream(0), "gave no token within 0.3 s"),
        (Timeouts(idle_s=0.3), Fault.stall_mid_stream(1), "fell silent for 0.3 s"),
        (Timeouts(total_s=0.5), Answer(tokens=("x",) * 100, between_s=0.05), "not complete after 0.5 s"),
    ],
    ids=["first token", "idle", "total"],
)
@ALL_DIALECTS
async def test_a_stream_that_takes_too_long_ends_with_the_reason(
    gateways: StartGateway,
    fake_nodes: StartNode,
    dial: Dial,
    dialect: str,
    limits: Timeouts,
    planned: Answer | Fault,
    sentence: str,
) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    node.default = planned
    gateway = await gateways(node, timeouts=limits)
    wire = await dial(gateway.port)
    wire.post(CHATS[dialect], chat())
    answer = await wire.answer()

    said = answer.json if answer.status == 504 else events(dialect, answer.body)[-1]
    assert sentence in sentence_in(dialect, said)
    await node.wait_idle(within_s=FREE_S)


@ALL_DIALECTS
async def test_a_node_that_accepts_no_connection_is_a_504(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, dialect: str
) -> None:
    node = await fake_nodes()
    gateway = await gateways(
        node, timeouts=Timeouts(connect_s=0.2), retry=ONE_TRY, health=HealthSettings(interval_s=60)
    )
    await node.stop()
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        deaf.bind(("127.0.0.1", node.port))
        deaf.listen(0)
        for filler in (first, second):  # the line of a listener that never accepts is full with these
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", node.port))
        wire = await dial(gateway.port)
        wire.post(CHATS[dialect], chat())
        answer = await wire.answer()

    assert answer.status == 504
    assert "accepted no connection within 0.2 s" in sentence_in(dialect, answer.json)


@ALL_DIALECTS
async def test_a_node_that_refuses_connections_is_a_502(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, dialect: str
) -> None:
    node = await fake_nodes()
    gateway = await gateways(node, retry=ONE_TRY, health=HealthSettings(interval_s=60))
    await node.stop()
    wire = await dial(gateway.port)
    wire.post(CHATS[dialect], chat())
    answer = await wire.answer()

    assert answer.status == 502
    assert "could not be reached" in sentence_in(dialect, answer.json)


@ALL_DIALECTS
async def test_whoever_waits_too_long_for_a_slot_is_told_to_come_back(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, dialect: str
) -> None:
    node = await fake_nodes(slots=1)
    node.default = Answer(first_token_s=30)
    gateway = await gateways(
        NodeSettings(url=node.url, slots=1), queue=Queue(max_wait_s=0.3), routing=Routing(head_start=0)
    )
    first, second = await dial(gateway.port), await dial(gateway.port)
    first.post(CHATS[dialect], chat())
    await node.wait_for(1)
    second.post(CHATS[dialect], chat())
    answer = await second.answer()

    assert answer.status == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert "No slot became free" in sentence_in(dialect, answer.json)


async def test_a_node_that_fails_before_the_first_byte_is_replaced_by_another(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    nodes = [await fake_nodes(), await fake_nodes()]
    gateway = await gateways(*nodes)
    wire = await dial(gateway.port)
    for fault in (Fault.reset_before_head(), Fault.garbage(), Fault.status(503)):
        nodes[0].script.append(fault)
        nodes[1].script.append(fault)
        answers = []
        for _ in range(3):
            wire.post("/api/chat", chat(stream=False))
            answers.append(await wire.answer())

        assert [answer.status for answer in answers] == [200, 200, 200], fault.name
        nodes[0].script.clear()
        nodes[1].script.clear()


# stopping


def file_for(node: FakeNode, more: str = "") -> str:
    return f'{more}\n[[nodes]]\nurl = "{node.url}"\nkind = "{node.kind.value}"\n'


async def answered_status(dial: Dial, port: int, path: str) -> int:
    wire = await dial(port)
    wire.get(path)
    return (await wire.answer()).status


@ALL_DIALECTS
async def test_a_stream_under_way_is_finished_before_the_gateway_stops(
    programs: StartProgram, fake_nodes: StartNode, dial: Dial, dialect: str
) -> None:
    node = await fake_nodes()
    node.default = Answer(tokens=("x",) * 30, between_s=0.05)
    program = await programs(file_for(node, "server.port = 0\nserver.unready_s = 0.5"))
    wire, kept = await dial(program.port), await dial(program.port)
    kept.get("/readyz")
    before = await kept.answer()
    wire.post(CHATS[dialect], chat())
    await wire.head()
    await until_content(wire, dialect, "x")
    program.process.send_signal(signal.SIGTERM)
    while await answered_status(dial, program.port, "/readyz") != 503:
        await asyncio.sleep(0.01)
    answer = await finished(wire)
    code = await program.ended()

    assert before.status == 200
    assert content_of(dialect, answer) == "x" * 29
    assert code == 0
    with pytest.raises(ConnectionRefusedError):
        await dial(program.port)


async def finished(wire: Wire) -> bytes:
    """The rest of a chunked stream."""
    got = b""
    while part := await wire.chunk():
        got += part
    return got


async def test_a_stopping_gateway_takes_no_new_connections(
    programs: StartProgram, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    node.default = Answer(tokens=("x",) * 40, between_s=0.05)
    program = await programs(file_for(node, "server.port = 0"))
    wire, idle = await dial(program.port), await dial(program.port)
    wire.post("/api/chat", chat())
    await wire.head()
    program.process.send_signal(signal.SIGTERM)

    assert await idle.rest() == b""
    with pytest.raises(ConnectionRefusedError):
        await dial(program.port)
    assert len(events("ollama", await finished(wire))) == 41
    assert await wire.rest() == b""
    assert await program.ended() == 0


@STREAMED
@ALL_DIALECTS
async def test_an_answer_that_outlasts_the_stop_is_told_so(
    programs: StartProgram, fake_nodes: StartNode, dial: Dial, dialect: str, stream: bool
) -> None:
    node = await fake_nodes()
    node.default = Answer(tokens=("x",) * 1000, between_s=0.05)
    program = await programs(file_for(node, "server.port = 0\nserver.drain_s = 0.5"))
    wire = await dial(program.port)
    wire.post(CHATS[dialect], chat(stream=stream))
    await node.wait_for(1)
    program.process.send_signal(signal.SIGTERM)
    began_at = time.monotonic()
    answer = await wire.answer()
    code = await program.ended()

    said = events(dialect, answer.body)[-1] if stream else answer.json
    assert answer.status == (200 if stream else 503)
    assert "stopped before the answer was complete" in sentence_in(dialect, said)
    assert code == 0
    assert time.monotonic() - began_at < 5


def test_the_content_of_an_answer_is_read_from_either_dialect() -> None:
    """The test's own reading is right."""
    sse = b': waiting\n\ndata: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: [DONE]\n\n'
    ndjson = b' {"message":{"content":"a"}}\n{"error":"b"}\n'

    assert content_of("openai", sse) == content_of("ollama", ndjson) == "a"
