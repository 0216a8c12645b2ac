"""OpenAI's and Ollama's own Python clients, against pools of every kind of node."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import ollama
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from sutazai.core.node import NodeKind
from sutazai.settings.model import Auth, Retry, Timeouts
from sutazai.testing import Answer, FakeNode, Fault, ToolCall
from sutazai.testing.machine import vector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import StartGateway, StartNode

    from sutazai.bootstrap import Gateway

ALL_KINDS = pytest.mark.parametrize("kind", list(NodeKind))
OTHERS = pytest.mark.parametrize("kind", [NodeKind.OPENAI, NodeKind.LLAMACPP])
HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi there"}]
HI_OLLAMA = [{"role": "user", "content": "hi there"}]
WEATHER = ToolCall(name="weather", arguments={"city": "Oslo", "days": 2})
PARAMETERS: dict[str, object] = {
    "type": "object",
    "required": ["city"],
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}
TOOLS: list[ChatCompletionToolParam] = [
    {"type": "function", "function": {"name": "weather", "description": "Tell it.", "parameters": PARAMETERS}}
]
WAITS_S = 10.0


@pytest.fixture
async def node(fake_nodes: StartNode, kind: NodeKind) -> FakeNode:
    return await fake_nodes(kind, ("llama3",))


@pytest.fixture
async def gateway(gateways: StartGateway, node: FakeNode) -> Gateway:
    return await gateways(node, retry=Retry(attempts=1), timeouts=Timeouts(keep_alive_s=0.2))


def openai_url(gateway: Gateway) -> str:
    return f"http://127.0.0.1:{gateway.port}/v1"


@asynccontextmanager
async def openai_client(gateway: Gateway, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=openai_url(gateway), api_key=key, max_retries=0, timeout=WAITS_S) as client:
        yield client


@asynccontextmanager
async def ollama_client(gateway: Gateway) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(f"http://127.0.0.1:{gateway.port}", timeout=WAITS_S) as client:
        yield client


@ALL_KINDS
class TestOpenAI:
    """The package `openai`."""

    async def test_a_chat_is_answered(self, gateway: Gateway) -> None:
        async with openai_client(gateway) as client:
            answer = await client.chat.completions.create(model="llama3", messages=HI)

        assert answer.choices[0].message.content == "Hello"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 2

    async def test_the_client_without_async_works_too(self, gateway: Gateway) -> None:
        def ask() -> tuple[str | None, str]:
            with openai.OpenAI(base_url=openai_url(gateway), api_key="none", timeout=WAITS_S) as client:
                whole = client.chat.completions.create(model="llama3", messages=HI)
                with client.chat.completions.create(model="llama3", messages=HI, stream=True) as stream:
                    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
                return whole.choices[0].message.content, "".join(parts)

        assert await asyncio.to_thread(ask) == ("Hello", "Hello")

    async def test_a_stream_comes_in_parts_and_tells_its_usage_when_asked(self, gateway: Gateway) -> None:
        async with openai_client(gateway) as client:
            stream = await client.chat.completions.create(
                model="llama3", messages=HI, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]

        texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
        assert [text for text in texts if text] == ["Hel", "lo"]
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 2
        assert not chunks[-1].choices
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"

    async def test_signs_of_life_do_not_disturb_it(self, gateway: Gateway, node: FakeNode) -> None:
        node.default = Answer(first_token_s=0.8)
        async with openai_client(gateway) as client:
            stream = await client.chat.completions.create(model="llama3", messages=HI, stream=True)
            texts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]

        assert "".join(texts) == "Hello"

    async def test_a_completion_is_answered(self, gateway: Gateway) -> None:
        async with openai_client(gateway) as client:
            whole = await client.completions.create(model="llama3", prompt="hi")
            stream = await client.completions.create(model="llama3", prompt="hi", stream=True)
            texts = [chunk.choices[0].text async for chunk in stream if chunk.choices]

        assert whole.choices[0].text == "Hello"
        assert "".join(texts) == "Hello"

    async def test_tools_are_called(self, gateway: Gateway, node: FakeNode) -> None:
        node.default = Answer(tokens=(), tool_calls=(WEATHER,))
        async with openai_client(gateway) as client:
            answer = await client.chat.completions.create(model="llama3", messages=HI, tools=TOOLS)

        assert answer.choices[0].finish_reason == "tool_calls"
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.id
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == WEATHER.arguments

    async def test_tools_are_called_in_a_stream_and_their_results_are_taken(
        self, gateway: Gateway, node: FakeNode
    ) -> None:
        node.script.append(Answer(tokens=(), tool_calls=(WEATHER,)))
        async with openai_client(gateway) as client:
            stream = await client.chat.completions.create(model="llama3", messages=HI, tools=TOOLS, stream=True)
            deltas = [
                call async for chunk in stream if chunk.choices for call in chunk.choices[0].delta.tool_calls or []
            ]
            functions = [delta.function for delta in deltas if delta.function]
            arguments = "".join(function.arguments or "" for function in functions)
            call_id = next(delta.id for delta in deltas if delta.id)
            messages: list[ChatCompletionMessageParam] = [
                *HI,
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}}
                    ],
                },
                {"role": "tool", "tool_call_id": call_id, "content": "rain"},
            ]
            after = await client.chat.completions.create(model="llama3", messages=messages, tools=TOOLS)

        assert [function.name for function in functions if function.name] == ["weather"]
        assert json.loads(arguments) == WEATHER.arguments
        assert after.choices[0].message.content == "Hello"

    async def test_a_form_for_the_answer_reaches_the_node(
        self, gateway: Gateway, node: FakeNode, kind: NodeKind
    ) -> None:
        async with openai_client(gateway) as client:
            await client.chat.completions.create(
                model="llama3",
                messages=HI,
                response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": PARAMETERS}},
            )

        received = node.inferences[0].json
        asked = received["format"] if kind is NodeKind.OLLAMA else received["response_format"]["json_schema"]["schema"]
        assert asked == PARAMETERS

    async def test_embeddings_come_packed_and_as_numbers(self, gateway: Gateway) -> None:
        """The client asks for base64 unless it is told otherwise."""
        async with openai_client(gateway) as client:
            packed = await client.embeddings.create(model="llama3", input=["one", "two"])
            numbers = await client.embeddings.create(model="llama3", input="one", encoding_format="float")

        assert [entry.embedding for entry in packed.data] == [
            pytest.approx(vector("one"), abs=1e-6),
            pytest.approx(vector("two"), abs=1e-6),
        ]
        assert numbers.data[0].embedding == pytest.approx(vector("one"), abs=1e-6)
        assert packed.usage.prompt_tokens == 2

    async def test_models_are_listed_and_looked_up(self, gateway: Gateway) -> None:
        async with openai_client(gateway) as client:
            listed = [model.id async for model in client.models.list()]
            one = await client.models.retrieve(listed[0])
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("nothing/like:this")

        assert [name.removesuffix(":latest") for name in listed] == ["llama3"]
        assert one.id == listed[0]
        assert one.object == "model"

    async def test_errors_are_of_the_clients_own_classes(self, gateway: Gateway, node: FakeNode) -> None:
        async with openai_client(gateway) as client:
            with pytest.raises(openai.NotFoundError, match="Did you mean llama3") as unknown:
                await client.chat.completions.create(model="llama33", messages=HI)
            with pytest.raises(openai.BadRequestError, match="temperature must be a number"):
                await client.chat.completions.create(model="llama3", messages=HI, extra_body={"temperature": "hot"})
            node.script.append(Fault.status(429, retry_after_s=3))
            with pytest.raises(openai.RateLimitError):
                await client.chat.completions.create(model="llama3", messages=HI)
            node.script.append(Fault.status(500))
            with pytest.raises(openai.InternalServerError) as broken:
                await client.chat.completions.create(model="llama3", messages=HI)

        assert unknown.value.code == "404"
        assert unknown.value.param == "model"
        assert broken.value.status_code == 502
        assert broken.value.request_id

    async def test_a_stream_that_breaks_raises(self, gateway: Gateway, node: FakeNode) -> None:
        node.default = Fault.reset_mid_stream(1, Answer(between_s=0.05))
        async with openai_client(gateway) as client:
            stream = await client.chat.completions.create(model="llama3", messages=HI, stream=True)
            with pytest.raises(openai.APIError, match="connection"):
                await _all_of(stream)

    async def test_a_missing_key_is_an_authentication_error(self, gateways: StartGateway, node: FakeNode) -> None:
        gateway = await gateways(node, auth=Auth(required=True))
        async with openai_client(gateway, "sk-wrong") as client:
            with pytest.raises(openai.AuthenticationError, match="not known here"):
                await client.models.list()


async def _all_of(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


@ALL_KINDS
class TestOllama:
    """The package `ollama`."""

    async def test_a_chat_is_answered(self, gateway: Gateway) -> None:
        async with ollama_client(gateway) as client:
            answer = await client.chat("llama3", HI_OLLAMA)

        assert answer.message.content == "Hello"
        assert answer.done
        assert answer.eval_count == 2

    async def test_the_client_without_async_works_too(self, gateway: Gateway) -> None:
        def ask() -> tuple[str | None, str]:
            client = ollama.Client(f"http://127.0.0.1:{gateway.port}", timeout=WAITS_S)
            with client:
                whole = client.chat("llama3", HI_OLLAMA)
                parts = [part.message.content or "" for part in client.chat("llama3", HI_OLLAMA, stream=True)]
                return whole.message.content, "".join(parts)

        assert await asyncio.to_thread(ask) == ("Hello", "Hello")

    async def test_a_stream_comes_in_parts_and_ends_with_counts(self, gateway: Gateway) -> None:
        async with ollama_client(gateway) as client:
            parts = [part async for part in await client.chat("llama3", HI_OLLAMA, stream=True)]

        assert [part.message.content for part in parts if part.message.content] == ["Hel", "lo"]
        assert [part.done for part in parts].count(True) == 1
        assert parts[-1].eval_count == 2
        assert parts[-1].done_reason == "stop"

    async def test_signs_of_life_do_not_disturb_it(self, gateway: Gateway, node: FakeNode) -> None:
        node.default = Answer(first_token_s=0.8)
        async with ollama_client(gateway) as client:
            chat = [part.message.content or "" async for part in await client.chat("llama3", HI_OLLAMA, stream=True)]
            text = [part.response or "" async for part in await client.generate("llama3", "hi", stream=True)]

        assert ("".join(chat), "".join(text)) == ("Hello", "Hello")

    async def test_text_is_generated(self, gateway: Gateway) -> None:
        async with ollama_client(gateway) as client:
            whole = await client.generate("llama3", "hi")
            parts = [part.response or "" async for part in await client.generate("llama3", "hi", stream=True)]

        assert whole.response == "".join(parts) == "Hello"

    async def test_a_model_is_loaded_by_asking_nothing(self, gateway: Gateway) -> None:
        async with ollama_client(gateway) as client:
            loaded = await client.generate("llama3")

        assert loaded.done
        assert loaded.done_reason == "load"

    async def test_embeddings_are_made(self, gateway: Gateway) -> None:
        async with ollama_client(gateway) as client:
            several = await client.embed("llama3", ["one", "two"])
            older = await client.embeddings("llama3", "one")

        assert list(map(list, several.embeddings)) == [
            pytest.approx(vector("one"), abs=1e-6),
            pytest.approx(vector("two"), abs=1e-6),
        ]
        assert list(older.embedding) == pytest.approx(vector("one"), abs=1e-6)

    async def test_tools_are_called(self, gateway: Gateway, node: FakeNode) -> None:
        node.default = Answer(tokens=(), tool_calls=(WEATHER,))
        async with ollama_client(gateway) as client:
            whole = await client.chat("llama3", HI_OLLAMA, tools=list(map(dict, TOOLS)))
            parts = [
                part async for part in await client.chat("llama3", HI_OLLAMA, tools=list(map(dict, TOOLS)), stream=True)
            ]

        streamed = [call for part in parts for call in part.message.tool_calls or []]
        for calls in (whole.message.tool_calls, streamed):
            (call,) = calls or []
            assert call.function.name == "weather"
            assert call.function.arguments == WEATHER.arguments

    async def test_models_are_listed_shown_and_seen_running(self, gateway: Gateway) -> None:
        async with ollama_client(gateway) as client:
            (model,) = (await client.list()).models
            shown = await client.show(model.model or "")
            running = await client.ps()

        assert (model.model or "").removesuffix(":latest") == "llama3"
        assert shown.details is not None
        assert all(entry.model == model.model for entry in running.models)

    async def test_an_unknown_model_is_its_own_error(self, gateway: Gateway) -> None:
        async with ollama_client(gateway) as client:
            with pytest.raises(ollama.ResponseError, match="Did you mean llama3") as unknown:
                await client.chat("llama33", HI_OLLAMA)
            with pytest.raises(ollama.ResponseError) as not_shown:
                await client.show("llama33")

        assert unknown.value.status_code == not_shown.value.status_code == 404

    async def test_a_stream_that_breaks_raises(self, gateway: Gateway, node: FakeNode) -> None:
        node.default = Fault.reset_mid_stream(1, Answer(between_s=0.05))
        async with ollama_client(gateway) as client:
            stream = await client.chat("llama3", HI_OLLAMA, stream=True)
            with pytest.raises(ollama.ResponseError, match="connection"):
                await _all_of(stream)


@pytest.mark.parametrize("kind", [NodeKind.OLLAMA])
async def test_a_model_is_pulled_copied_and_deleted(gateway: Gateway, node: FakeNode) -> None:
    async with ollama_client(gateway) as client:
        progress = [part async for part in await client.pull("qwen3", stream=True)]
        whole = await client.pull("phi4")
        await client.copy("qwen3", "mine")
        await client.delete("qwen3")

    assert progress[-1].status == whole.status == "success"
    assert any(part.completed for part in progress)
    assert sorted(node.models) == ["llama3:latest", "mine:latest", "phi4:latest"]


@OTHERS
async def test_a_pool_that_keeps_no_models_says_so(gateway: Gateway) -> None:
    async with ollama_client(gateway) as client:
        with pytest.raises(ollama.ResponseError, match="No node of this pool keeps models") as refused:
            await client.pull("qwen3")

    assert refused.value.status_code == 400
