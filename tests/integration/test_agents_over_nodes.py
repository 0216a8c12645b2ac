"""Agents over a whole gateway and a node, by HTTP all the way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

from sutazai.adapters.openai.gateway_models import HttpModels, open_models
from sutazai.agents import assistant, tools_with
from sutazai.agents.chat import chat
from sutazai.agents.extract import extract
from sutazai.agents.summarize import summarize
from sutazai.core.errors import NotFound
from sutazai.core.node import NodeKind
from sutazai.testing import Answer, FakeNode, ToolCall
from sutazai.testing.agents import FakeContext, run

if TYPE_CHECKING:
    from tests.conftest import StartGateway, StartNode


@pytest.fixture(params=[NodeKind.OPENAI, NodeKind.OLLAMA])
async def pool(
    request: pytest.FixtureRequest, fake_nodes: StartNode, gateways: StartGateway
) -> AsyncIterator[tuple[HttpModels, FakeNode]]:
    node = await fake_nodes(request.param, ("m",))
    gateway = await gateways(node)
    async with open_models(f"http://127.0.0.1:{gateway.port}", key=None) as models:
        yield models, node


async def test_chat_is_answered_by_a_node(pool: tuple[HttpModels, FakeNode]) -> None:
    models, node = pool
    node.script.append(Answer(tokens=("Good ", "day."), prompt_tokens=5))

    answer = await run(
        chat, {"model": "m", "messages": [{"role": "user", "content": "hi"}]}, FakeContext(models=models)
    )

    assert (answer.text, answer.input_tokens, answer.output_tokens) == ("Good day.", 5, 2)


async def test_a_long_text_is_summed_up_by_a_node(pool: tuple[HttpModels, FakeNode]) -> None:
    models, node = pool
    text = "A sentence about something. " * 100

    summary = await run(summarize, {"model": "m", "text": text, "chunk_characters": 500}, FakeContext(models=models))

    assert summary.summary == "Hello"
    assert len(node.inferences) == summary.chunks + 1


async def test_data_is_extracted_with_the_schema_at_the_node(pool: tuple[HttpModels, FakeNode]) -> None:
    models, node = pool
    node.script.append(Answer(tokens=('{"age": ', "36}")))
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}

    found = await run(extract, {"model": "m", "text": "Ada is 36.", "schema": schema}, FakeContext(models=models))

    assert found.data == {"age": 36}
    asked = node.inferences[0].json
    given = asked["format"] if node.kind is NodeKind.OLLAMA else asked["response_format"]["json_schema"]["schema"]
    assert given == schema


async def test_an_assistant_calls_tools_that_a_node_asks_for(pool: tuple[HttpModels, FakeNode]) -> None:
    models, node = pool
    node.script.append(Answer(tokens=(), tool_calls=(ToolCall(name="calculator", arguments={"expression": "6*7"}),)))
    node.script.append(Answer(tokens=("It is ", "42.")))

    done = await run(assistant(tools_with()), {"model": "m", "prompt": "What is 6*7?"}, FakeContext(models=models))

    assert done.answer == "It is 42."
    assert [(step.tool, step.is_done) for step in done.steps] == [("calculator", True)]
    told = node.inferences[1].json["messages"][-1]
    assert (told["role"], told["content"]) == ("tool", "42")


async def test_a_model_that_nobody_has_fails_as_the_gateway_says(pool: tuple[HttpModels, FakeNode]) -> None:
    models, _ = pool

    with pytest.raises(NotFound, match="on no node"):
        await run(chat, {"model": "none", "messages": [{"role": "user", "content": "hi"}]}, FakeContext(models=models))
