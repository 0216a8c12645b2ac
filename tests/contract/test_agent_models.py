"""The contract of the port `Models`: in the gateway's process and over HTTP, with a node behind."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from sutazai.adapters.openai import OpenAINode
from sutazai.adapters.openai.gateway_models import open_models
from sutazai.core import errors
from sutazai.core.errors import BadRequest, NodeUnreachable, NotFound, SutazaiError
from sutazai.core.node import Node, NodeKind
from sutazai.core.request import Dialect, Priority
from sutazai.edge.errors import answer_to, status_of
from sutazai.gateway.models import GatewayModels
from sutazai.ports.agent import CHAT, COMPLETION, EMBEDDING, Models, Said
from sutazai.settings.model import Retry
from sutazai.testing import Answer, FakeNode, Fault, ToolCall

if TYPE_CHECKING:
    from tests.conftest import StartGateway, StartNode

QUESTION: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
ids = itertools.count()


@pytest.fixture(params=["within", "over HTTP"])
async def way(
    request: pytest.FixtureRequest, fake_nodes: StartNode, gateways: StartGateway
) -> AsyncIterator[tuple[Models, FakeNode]]:
    node = await fake_nodes(NodeKind.OPENAI, ("m",))
    if request.param == "within":
        client = OpenAINode(Node(name="a", kind=node.kind, url=node.url), api_key=None, connect_s=1.0)
        yield (
            GatewayModels(
                client,
                next_id=lambda: f"r{next(ids)}",
                clock=time.monotonic,
                allowance=lambda _tenant, _user: None,
                usual=lambda: "m",
            ),
            node,
        )
        await client.close()
        return
    gateway = await gateways(node, retry=Retry(attempts=1))
    async with open_models(f"http://127.0.0.1:{gateway.port}", key=None) as models:
        yield models, node


async def ask(models: Models, **fields: Any) -> Said:
    return await models.chat(QUESTION | fields, tenant="acme", user="", priority=Priority.LOW)


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


async def test_a_question_is_answered_whole_with_what_it_took(way: tuple[Models, FakeNode]) -> None:
    models, node = way
    node.script.append(Answer(tokens=("Good ", "day."), prompt_tokens=7))

    said = await ask(models, temperature=0.5, stream=True)

    assert (said.text, said.model, said.input_tokens, said.output_tokens) == ("Good day.", "m", 7, 2)
    assert said.message["role"] == "assistant"
    assert node.inferences[0].json["temperature"] == 0.5


async def test_calls_of_tools_come_as_openai_gives_them(way: tuple[Models, FakeNode]) -> None:
    models, node = way
    node.script.append(Answer(tokens=(), tool_calls=(ToolCall(name="add", arguments={"a": 1}),)))

    said = await ask(models, tools=[{"type": "function", "function": {"name": "add", "parameters": {}}}])

    assert said.text == ""
    assert said.tool_calls[0]["function"]["name"] == "add"
    assert said.message["tool_calls"] == list(said.tool_calls)


@pytest.mark.parametrize(
    ("fields", "where"), [({"messages": []}, "messages"), ({"messages": 3}, "messages"), ({"model": 3}, "model")]
)
async def test_a_question_that_is_wrong_is_refused_with_its_place(
    way: tuple[Models, FakeNode], fields: dict[str, Any], where: str
) -> None:
    models, node = way

    with pytest.raises(BadRequest) as caught:
        await ask(models, **fields)
    assert caught.value.where == where
    assert not node.inferences


async def test_a_text_is_embedded_and_the_numbers_stay_as_the_node_wrote_them(way: tuple[Models, FakeNode]) -> None:
    models, node = way
    body = {"model": "m", "input": ["one two", "three"]}

    answer = await models.ask(EMBEDDING, body, tenant="acme", user="", priority=Priority.LOW)

    told = msgspec.json.decode(answer.body)
    assert [one["index"] for one in told["data"]] == [0, 1]
    assert told["object"] == "list"
    assert (answer.input_tokens, answer.output_tokens) == (3, 0)
    assert b"\n" not in answer.body
    assert node.inferences[0].json == body
    assert node.inferences[0].path == EMBEDDING


async def test_a_text_is_completed(way: tuple[Models, FakeNode]) -> None:
    models, node = way
    node.script.append(Answer(tokens=("and ", "on"), prompt_tokens=3))

    answer = await models.ask(COMPLETION, {"model": "m", "prompt": "on"}, tenant="acme", user="", priority=Priority.LOW)

    assert msgspec.json.decode(answer.body)["choices"][0]["text"] == "and on"
    assert (answer.input_tokens, answer.output_tokens) == (3, 2)


@pytest.mark.parametrize(
    ("endpoint", "body", "where"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": "hi"}, "messages"),
        (EMBEDDING, {}, "input"),
        (EMBEDDING, {"input": 3}, "input"),
        (COMPLETION, {}, "prompt"),
        (COMPLETION, {"prompt": "a", "model": 3}, "model"),
    ],
)
async def test_a_body_that_its_address_cannot_have_is_refused(
    way: tuple[Models, FakeNode], endpoint: str, body: dict[str, Any], where: str
) -> None:
    models, node = way

    with pytest.raises(BadRequest) as caught:
        await models.ask(endpoint, {"model": "m", **body}, tenant="acme", user="", priority=Priority.LOW)
    assert caught.value.where == where
    assert not node.inferences


async def test_a_question_that_is_no_json_is_refused(way: tuple[Models, FakeNode]) -> None:
    with pytest.raises(BadRequest, match="JSON"):
        await ask(way[0], metadata=object())


@pytest.mark.parametrize(
    ("fault", "status"), [(Fault.status(400), 400), (Fault.status(500), 502), (Fault.reset_before_head(), 502)]
)
async def test_what_fails_behind_the_gateway_fails_with_the_same_status(
    way: tuple[Models, FakeNode], fault: Fault, status: int
) -> None:
    models, node = way
    node.default = fault

    with pytest.raises(SutazaiError) as caught:
        await ask(models)
    assert status_of(caught.value)[0] == status
    assert caught.value.message


async def test_who_stops_asking_frees_the_node(way: tuple[Models, FakeNode]) -> None:
    models, node = way
    node.default = Fault.stall_before_head()
    asking = asyncio.create_task(ask(models))
    await eventually(lambda: node.in_flight == 1)

    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking

    await eventually(lambda: node.in_flight == 0)


async def test_many_questions_at_once_are_all_answered(way: tuple[Models, FakeNode]) -> None:
    models, _ = way

    assert [said.text for said in await asyncio.gather(*(ask(models) for _ in range(20)))] == ["Hello"] * 20


async def test_a_gateway_that_is_away_is_told(fake_nodes: StartNode) -> None:
    node = await fake_nodes(NodeKind.OPENAI, ("m",))
    await node.stop()

    async with open_models(node.url, key=None) as models:
        with pytest.raises(NodeUnreachable, match="See that it runs"):
            await ask(models)


async def test_an_unknown_model_is_told_as_the_gateway_tells_it(fake_nodes: StartNode, gateways: StartGateway) -> None:
    gateway = await gateways(await fake_nodes(NodeKind.OPENAI, ("m",)))

    async with open_models(f"http://127.0.0.1:{gateway.port}", key=None) as models:
        with pytest.raises(NotFound, match="on no node"):
            await ask(models, model="other")


@asynccontextmanager
async def one_answer(answer: bytes) -> AsyncIterator[str]:
    """A server that always says the same."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("body", [b"", b"no JSON", b"{}", b'{"choices": []}', b'{"choices": [{"message": 3}]}'])
async def test_nonsense_is_a_fault_of_who_said_it(body: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with one_answer(head + body) as url, open_models(url, key=None) as models:
        with pytest.raises(SutazaiError, match="answer"):
            await ask(models)


@pytest.mark.parametrize(
    "error",
    [
        errors.BadRequest("It was odd.", where="messages[0]"),
        errors.TooLarge("It was large."),
        errors.Unauthorized("It had no key."),
        errors.Forbidden("It may not."),
        errors.NotFound("It is not."),
        errors.Conflict("It changed."),
        errors.RateLimited("It was often.", retry_after_s=7),
        errors.BudgetSpent("It was dear.", retry_after_s=7),
        errors.Overloaded("It was full.", retry_after_s=7),
        errors.Cancelled("It was cancelled."),
        errors.NodeTimeout("It was silent.", node="gateway"),
        errors.NodeFault("It broke.", node="gateway"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_of_the_gateway_come_back_as_they_were(error: SutazaiError) -> None:
    told = answer_to(error, Dialect.OPENAI)
    head = (
        f"HTTP/1.1 {told.status} No\r\nconnection: close\r\nretry-after: 7\r\ncontent-length: {len(told.body)}\r\n\r\n"
    )

    async with one_answer(head.encode() + told.body) as url, open_models(url, key="sk-key") as models:
        with pytest.raises(SutazaiError) as caught:
            await ask(models)

    assert type(caught.value) is type(error)
    assert vars(caught.value) == vars(error)


async def test_a_model_is_named_for_those_who_name_none(way: tuple[Models, FakeNode]) -> None:
    models, _ = way

    assert await models.usual() == "m"
