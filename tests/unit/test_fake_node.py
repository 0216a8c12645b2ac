"""The fake node is what it claims to be: its APIs as official clients see them, its faults, its lines."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import statistics
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeAlias

import msgspec
import ollama
import openai
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.node import NodeKind
from sutazai.testing import Answer, FakeNode, Fault, Received, ToolCall
from sutazai.testing.steps import End, Head, Part, Step

StartNode: TypeAlias = Callable[..., Awaitable[FakeNode]]
ALL_KINDS = pytest.mark.parametrize("kind", list(NodeKind))
WEATHER = ToolCall(name="weather", arguments={"city": "Oslo", "days": 2})


class Client:
    """A raw HTTP client: bytes out, bytes in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, path: str, body: object, *, headers: str = "") -> None:
        """Send a request with a JSON body."""
        encoded = msgspec.json.encode(body)
        head = f"POST {path} HTTP/1.1\r\nHost: node\r\nContent-Length: {len(encoded)}\r\n{headers}\r\n"
        self.writer.write(head.encode() + encoded)

    def ask(self, **fields: object) -> None:
        """Send a streamed chat in Ollama's form."""
        self.send("/api/chat", {"model": "llama3", "messages": [{"role": "user", "content": "hello"}]} | fields)

    async def head(self) -> bytes:
        """The next head."""
        return await self.reader.readuntil(b"\r\n\r\n")

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body; empty at its end."""
        size = int(await self.reader.readline(), 16)
        data = await self.reader.readexactly(size)
        await self.reader.readexactly(2)
        return data

    async def body(self) -> bytes:
        """A chunked answer, head and all, put together again."""
        await self.head()
        parts = [part async for part in self.chunks()]
        return b"".join(parts)

    async def chunks(self) -> AsyncIterator[bytes]:
        """What is left of a chunked body."""
        while part := await self.chunk():
            yield part

    async def whole(self) -> Any:
        """A JSON answer in one piece."""
        head = (await self.head()).decode()
        length = next(line for line in head.split("\r\n") if line.startswith("Content-Length"))
        return json.loads(await self.reader.readexactly(int(length.partition(":")[2])))


@asynccontextmanager
async def client_of(node: FakeNode) -> AsyncIterator[Client]:
    """A connection to the node."""
    reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


@asynccontextmanager
async def ollama_client(node: FakeNode) -> AsyncIterator[ollama.AsyncClient]:
    """Ollama's own client, closed afterwards."""
    async with ollama.AsyncClient(host=node.url) as client:
        yield client


@asynccontextmanager
async def openai_client(node: FakeNode, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's own client without retries, closed afterwards."""
    async with openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key=key, max_retries=0) as client:
        yield client


async def get(node: FakeNode, path: str) -> Any:
    """A JSON document."""
    async with client_of(node) as client:
        client.writer.write(f"GET {path} HTTP/1.1\r\nHost: node\r\n\r\n".encode())
        return await client.whole()


HELLO: Any = [{"role": "user", "content": "hello there"}]


class TestOllama:
    """Through Ollama's own client."""

    async def test_a_chat_is_answered_with_all_tokens_and_counts(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        async with ollama_client(node) as client:
            answer = await client.chat("llama3", HELLO)

        assert answer.message.content == "Hello"
        assert (answer.prompt_eval_count, answer.eval_count, answer.done_reason) == (2, 2, "stop")

    async def test_a_streamed_chat_comes_token_by_token(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.default = Answer(tokens=("a", "b", "c"), thinking=("hm",))
        async with ollama_client(node) as client:
            parts = [part async for part in await client.chat("llama3", HELLO, stream=True)]

        assert [part.message.content for part in parts] == ["", "a", "b", "c", ""]
        assert parts[0].message.thinking == "hm"
        assert [part.done for part in parts] == [False] * 4 + [True]
        assert parts[-1].eval_count == 4

    async def test_a_completion_is_cut_at_the_clients_limit(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.default = Answer(tokens=("a", "b", "c"))
        async with ollama_client(node) as client:
            answer = await client.generate("llama3", "one two three", options={"num_predict": 2})

        assert (answer.response, answer.done_reason) == ("ab", "length")
        assert (answer.prompt_eval_count, answer.eval_count) == (3, 2)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_scripted_tool_call_arrives(self, fake_nodes: StartNode, stream: bool) -> None:
        node = await fake_nodes()
        node.script.append(Answer(tokens=(), tool_calls=(WEATHER,)))
        async with ollama_client(node) as client:
            if stream:
                parts = [part async for part in await client.chat("llama3", HELLO, stream=True)]
            else:
                parts = [await client.chat("llama3", HELLO)]
        calls = [call for part in parts for call in part.message.tool_calls or ()]

        assert [(call.function.name, call.function.arguments) for call in calls] == [
            ("weather", {"city": "Oslo", "days": 2})
        ]

    async def test_a_completion_has_no_place_for_tool_calls(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.default = Answer(tool_calls=(WEATHER,))
        async with ollama_client(node) as client:
            answer = await client.generate("llama3", "x")

        assert answer.response == "Hello"

    async def test_logprobs_come_only_when_asked_for(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        async with ollama_client(node) as client:
            with_them = await client.chat("llama3", HELLO, logprobs=True)
            without = await client.chat("llama3", HELLO)

        assert [entry.token for entry in with_them.logprobs or ()] == ["Hel", "lo"]
        assert without.logprobs is None

    async def test_equal_texts_have_equal_embeddings(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        async with ollama_client(node) as client:
            many = (await client.embed("llama3", ["x", "y", "x"])).embeddings
            old = (await client.embeddings("llama3", "x")).embedding

        assert many[0] == many[2] == old != many[1]
        assert len(old) == 8
        assert sum(number * number for number in old) == pytest.approx(1)

    async def test_a_pull_tells_its_progress_and_adds_the_model(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(models=())
        async with ollama_client(node) as client:
            records = [record async for record in await client.pull("phi3", stream=True)]
            names = [model.model for model in (await client.list()).models]
        completed = [record.completed or 0 for record in records if record.total]

        assert (records[0].status, records[-1].status) == ("pulling manifest", "success")
        assert completed == sorted(completed)
        assert completed[-1] == next(record.total for record in records if record.total)
        assert names == ["phi3:latest"]

    async def test_a_model_that_is_in_no_registry_cannot_be_pulled(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(registry=("phi3",))
        async with ollama_client(node) as client:
            await client.pull("phi3")
            with pytest.raises(ollama.ResponseError, match="file does not exist"):
                await client.pull("phi4")
            with pytest.raises(ollama.ResponseError, match="file does not exist"):
                [_ async for _ in await client.pull("phi4", stream=True)]

        assert node.models == ("llama3:latest", "phi3:latest")

    async def test_models_are_copied_shown_and_deleted(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        async with ollama_client(node) as client:
            await client.copy("llama3", "mine:v1")
            shown = await client.show("mine:v1")
            await client.delete("llama3")

        assert shown.capabilities == ["completion", "tools"]
        assert node.models == ("mine:v1",)

    async def test_a_model_that_is_not_there_is_not_found(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        async with ollama_client(node) as client:
            for ask in (
                client.chat("phi3", HELLO),
                client.show("phi3"),
                client.embed("phi3", "x"),
                client.delete("phi3"),
            ):
                with pytest.raises(ollama.ResponseError, match="model 'phi3' not found") as caught:
                    await ask

                assert caught.value.status_code == 404

    async def test_an_empty_prompt_loads_the_model_and_no_keep_alive_drops_it(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        async with ollama_client(node) as client:
            loaded = await client.generate("llama3", "")
            in_memory = await client.ps()
            dropped = await client.generate("llama3", "", keep_alive=0)

        assert (loaded.done_reason, dropped.done_reason) == ("load", "unload")
        assert [(model.model, model.context_length) for model in in_memory.models] == [("llama3:latest", 4096)]
        assert node.loaded == {}

    async def test_a_body_that_is_no_json_is_refused(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        async with client_of(node) as client:
            client.writer.write(b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{]")
            head = await client.head()

        assert head.startswith(b"HTTP/1.1 400 ")


class TestOpenAi:
    """Through OpenAI's own client, on each kind of node."""

    @ALL_KINDS
    async def test_a_chat_is_answered_with_all_tokens_and_counts(self, fake_nodes: StartNode, kind: NodeKind) -> None:
        node = await fake_nodes(kind)
        async with openai_client(node) as client:
            answer = await client.chat.completions.create(model="llama3", messages=HELLO)

        assert answer.choices[0].message.content == "Hello"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
            2,
            2,
            4,
        )

    @ALL_KINDS
    async def test_a_streamed_chat_ends_with_the_usage_that_was_asked_for(
        self, fake_nodes: StartNode, kind: NodeKind
    ) -> None:
        node = await fake_nodes(kind)
        async with openai_client(node) as client:
            stream = await client.chat.completions.create(
                model="llama3", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)

        assert text == "Hello"
        assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 2

    @ALL_KINDS
    async def test_a_stream_tells_no_usage_unasked(self, fake_nodes: StartNode, kind: NodeKind) -> None:
        node = await fake_nodes(kind)
        async with openai_client(node) as client:
            stream = await client.chat.completions.create(model="llama3", messages=HELLO, stream=True)
            chunks = [chunk async for chunk in stream]

        assert all(chunk.usage is None for chunk in chunks)

    @ALL_KINDS
    async def test_a_streamed_tool_call_can_be_put_together(self, fake_nodes: StartNode, kind: NodeKind) -> None:
        node = await fake_nodes(kind)
        node.default = Answer(tokens=(), tool_calls=(WEATHER,))
        async with openai_client(node) as client:
            stream = await client.chat.completions.create(model="llama3", messages=HELLO, stream=True)
            choices = [choice async for chunk in stream for choice in chunk.choices]
            whole = await client.chat.completions.create(model="llama3", messages=HELLO)
        pieces = [call.function for choice in choices for call in choice.delta.tool_calls or () if call.function]
        calls = whole.choices[0].message.tool_calls

        assert "".join(piece.name or "" for piece in pieces) == "weather"
        assert json.loads("".join(piece.arguments or "" for piece in pieces)) == WEATHER.arguments
        assert choices[-1].finish_reason == whole.choices[0].finish_reason == "tool_calls"
        assert calls is not None
        assert calls[0].type == "function"
        assert json.loads(calls[0].function.arguments) == WEATHER.arguments

    async def test_two_choices_stream_side_by_side(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(NodeKind.OPENAI)
        async with openai_client(node) as client:
            stream = await client.chat.completions.create(model="llama3", messages=HELLO, stream=True, n=2)
            choices = [choice async for chunk in stream for choice in chunk.choices]
        texts = ["".join(c.delta.content or "" for c in choices if c.index == index) for index in (0, 1)]

        assert texts == ["Hello", "Hello"]
        assert node.requests[0].tokens_sent == 2

    async def test_logprobs_come_only_when_asked_for(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(NodeKind.OPENAI)
        async with openai_client(node) as client:
            chat = await client.chat.completions.create(model="llama3", messages=HELLO, logprobs=True)
            plain = await client.chat.completions.create(model="llama3", messages=HELLO)
            text = await client.completions.create(model="llama3", prompt="x", logprobs=1)

        assert chat.choices[0].logprobs is not None
        assert [entry.token for entry in chat.choices[0].logprobs.content or ()] == ["Hel", "lo"]
        assert plain.choices[0].logprobs is None
        assert text.choices[0].logprobs is not None
        assert text.choices[0].logprobs.text_offset == [0, 3]

    @ALL_KINDS
    async def test_completions_come_whole_and_streamed(self, fake_nodes: StartNode, kind: NodeKind) -> None:
        node = await fake_nodes(kind)
        async with openai_client(node) as client:
            whole = await client.completions.create(model="llama3", prompt="one two", max_tokens=1)
            stream = await client.completions.create(model="llama3", prompt="one two", stream=True)
            text = "".join([chunk.choices[0].text async for chunk in stream])

        assert (whole.choices[0].text, whole.choices[0].finish_reason, text) == ("Hel", "length", "Hello")

    @ALL_KINDS
    async def test_embeddings_are_the_same_as_floats_and_as_base64(self, fake_nodes: StartNode, kind: NodeKind) -> None:
        node = await fake_nodes(kind)
        async with openai_client(node) as client:
            packed = await client.embeddings.create(model="llama3", input=["x", "y"])
            floats = await client.embeddings.create(model="llama3", input=["x", "y"], encoding_format="float")
        sent = [received.json.get("encoding_format") for received in node.requests]

        assert sent == ["base64", "float"]
        assert [entry.embedding for entry in packed.data] == [entry.embedding for entry in floats.data]

    async def test_base64_embeddings_are_little_endian_floats(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(NodeKind.OPENAI)
        async with client_of(node) as client:
            client.send("/v1/embeddings", {"model": "llama3", "input": "x", "encoding_format": "base64"})
            answer = await client.whole()
        numbers = struct.unpack("<8f", base64.b64decode(answer["data"][0]["embedding"]))

        assert sum(number * number for number in numbers) == pytest.approx(1)

    @pytest.mark.parametrize("kind", [NodeKind.OLLAMA, NodeKind.OPENAI])
    async def test_a_model_that_is_not_there_is_not_found(self, fake_nodes: StartNode, kind: NodeKind) -> None:
        node = await fake_nodes(kind)
        async with openai_client(node) as client:
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="phi3", messages=HELLO)

    async def test_llamacpp_answers_with_its_own_model_whatever_was_asked_for(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(NodeKind.LLAMACPP)
        async with openai_client(node) as client:
            answer = await client.chat.completions.create(model="phi3", messages=HELLO)

        assert answer.model == "llama3"

    @ALL_KINDS
    async def test_models_are_listed(self, fake_nodes: StartNode, kind: NodeKind) -> None:
        node = await fake_nodes(kind, ("a:1", "b:2"))
        async with openai_client(node) as client:
            names = [model.id async for model in client.models.list()]

        assert names == ["a:1", "b:2"]

    @ALL_KINDS
    async def test_a_key_is_asked_for(self, fake_nodes: StartNode, kind: NodeKind) -> None:
        node = await fake_nodes(kind, api_key="secret")
        async with openai_client(node) as stranger, openai_client(node, "secret") as friend:
            with pytest.raises(openai.AuthenticationError):
                await stranger.chat.completions.create(model="llama3", messages=HELLO)
            answer = await friend.chat.completions.create(model="llama3", messages=HELLO)

        assert answer.choices[0].message.content == "Hello"


class TestStatus:
    """What servers tell of their load."""

    async def test_vllm_counts_running_and_waiting_requests(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(NodeKind.OPENAI, slots=1)
        node.default = Fault.stall_before_head()
        async with client_of(node) as first, client_of(node) as second, client_of(node) as probe:
            first.send("/v1/chat/completions", {"model": "llama3", "messages": HELLO})
            second.send("/v1/chat/completions", {"model": "llama3", "messages": HELLO})
            await node.until(lambda: node.waiting == 1)
            probe.writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            text = (await probe.reader.read()).decode()

        assert 'vllm:num_requests_running{engine="0",model_name="llama3"} 1' in text
        assert 'vllm:num_requests_waiting{engine="0",model_name="llama3"} 1' in text

    async def test_llamacpp_tells_its_slots_and_which_are_busy(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(NodeKind.LLAMACPP, slots=3)
        node.default = Fault.stall_mid_stream(after=1)
        async with client_of(node) as client:
            client.send("/v1/chat/completions", {"messages": HELLO, "stream": True})
            await node.until(lambda: node.active == 1)
            props, slots = await get(node, "/props"), await get(node, "/slots")

        assert props["total_slots"] == 3
        assert [slot["is_processing"] for slot in slots] == [True, False, False]
        assert await get(node, "/health") == {"status": "ok"}

    async def test_probes_leave_the_script_alone_and_have_a_fault_of_their_own(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.script.append(Answer(tokens=("scripted",)))
        node.probe_fault = Fault.status(500)
        async with client_of(node) as client, ollama_client(node) as official:
            client.writer.write(b"GET /api/tags HTTP/1.1\r\nHost: x\r\n\r\n")
            head = await client.head()
            answer = await official.chat("llama3", HELLO)

        assert head.startswith(b"HTTP/1.1 500 ")
        assert answer.message.content == "scripted"
        assert len(node.requests) == 2
        assert len(node.inferences) == 1


class TestWire:
    """How connections are treated."""

    async def test_each_token_is_a_chunk_of_its_own(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        async with client_of(node) as client:
            client.ask()
            head = await client.head()
            chunks = [json.loads(chunk) async for chunk in client.chunks()]

        assert b"Content-Type: application/x-ndjson\r\n" in head
        assert [chunk["message"]["content"] for chunk in chunks] == ["Hel", "lo", ""]

    async def test_tokens_do_not_wait_for_the_clients_acknowledgement(self, fake_nodes: StartNode) -> None:
        """With Nagle's algorithm most streams would take 40 ms and more."""
        node = await fake_nodes()
        took_s = []
        async with client_of(node) as client:
            for _ in range(15):
                begun = asyncio.get_running_loop().time()
                client.ask()
                await client.body()
                took_s.append(asyncio.get_running_loop().time() - begun)

        assert statistics.median(took_s) < 0.03

    async def test_a_connection_serves_one_request_after_the_other(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        async with client_of(node) as client:
            client.ask()
            client.ask()
            bodies = [await client.body(), await client.body()]

        assert all(body.count(b"\n") == 3 for body in bodies)
        assert [received.connection for received in node.requests] == [1, 1]

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_client_that_asks_for_it_gets_its_connection_closed(
        self, fake_nodes: StartNode, stream: bool
    ) -> None:
        node = await fake_nodes()
        async with client_of(node) as client:
            client.send(
                "/api/chat",
                {"model": "llama3", "messages": HELLO, "stream": stream},
                headers="Connection: close\r\n",
            )
            answer = await client.reader.read()

        assert b"\r\nConnection: close\r\n" in answer
        assert answer.endswith(b"0\r\n\r\n" if stream else b"}")

    async def test_llamacpp_closes_after_a_stream_though_it_promised_not_to(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(NodeKind.LLAMACPP)
        async with client_of(node) as client:
            client.send("/v1/chat/completions", {"messages": HELLO, "stream": True})
            answer = await client.reader.read()

        assert b"\r\nKeep-Alive: timeout=5, max=100\r\n" in answer
        assert b"Connection: close" not in answer
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    async def test_llamacpp_keeps_the_connection_after_an_answer_in_one_piece(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(NodeKind.LLAMACPP)
        async with client_of(node) as client:
            for _ in range(2):
                client.send("/v1/chat/completions", {"messages": HELLO})
                await client.whole()

        assert node.connections_made == 1

    async def test_vllm_sends_the_head_of_a_stream_before_it_has_a_slot(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(NodeKind.OPENAI)
        node.default = Fault.stall_mid_stream(after=0)
        async with client_of(node) as client:
            client.send("/v1/chat/completions", {"model": "llama3", "messages": HELLO, "stream": True})
            head = await client.head()

        assert b"text/event-stream" in head

    async def test_what_is_not_http_is_refused(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        async with client_of(node) as client:
            client.writer.write(b"hello?\r\n\r\n")
            answer = await client.reader.read()

        assert answer.startswith(b"HTTP/1.1 400 ")
        assert node.requests == []

    async def test_a_client_that_waits_for_100_continue_gets_it(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        async with client_of(node) as client:
            client.writer.write(
                b"POST /api/show HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 18\r\n\r\n"
            )
            interim = await client.head()
            client.writer.write(b'{"model":"llama3"}')
            answer = await client.whole()

        assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert answer["details"]["family"] == "llama"

    async def test_a_client_that_does_not_read_is_not_flooded(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.default = Answer(tokens=("x" * 100_000,) * 1000)
        async with client_of(node) as client:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.ask()
            await node.until(lambda: node.requests != [] and node.requests[0].tokens_sent > 0)
            sent = node.requests[0].tokens_sent
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            body = await client.body()

        assert sent < 500
        assert body.count(b"\n") == 1001

    def test_it_runs_on_uvloop_too(self) -> None:
        async def serve() -> tuple[bytes, bool]:
            async with FakeNode() as node, client_of(node) as client:
                node.script += [Answer(), Fault.reset_mid_stream(after=1)]
                client.ask()
                body = await client.body()
                client.ask()
                with pytest.raises(ConnectionError):
                    await client.body()
                return body, node.requests[1].finished

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            body, finished = runner.run(serve())

        assert body.count(b"\n") == 3
        assert not finished


class TestFaults:
    """Each really happens, as a client sees it."""

    async def test_a_reset_before_the_head(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.script.append(Fault.reset_before_head())
        async with client_of(node) as client:
            client.ask()
            with pytest.raises(ConnectionResetError):
                await client.reader.read()

        assert not node.requests[0].aborted
        assert not node.requests[0].finished

    async def test_a_close_before_the_head(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.script.append(Fault.close_before_head())
        async with client_of(node) as client:
            client.ask()

            assert await client.reader.read() == b""

    async def test_an_error_status_that_tells_when_to_come_back(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.script.append(Fault.status(503, b'{"error":"busy"}', retry_after_s=7))
        async with client_of(node) as client:
            client.ask()
            head = await client.head()
            body = await client.reader.readexactly(16)

        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"\r\nRetry-After: 7\r\n" in head
        assert body == b'{"error":"busy"}'
        assert node.peak_active == 0

    @ALL_KINDS
    async def test_a_reset_mid_stream(self, fake_nodes: StartNode, kind: NodeKind) -> None:
        node = await fake_nodes(kind)
        node.script.append(Fault.reset_mid_stream(after=2, answer=Answer(tokens=("a", "b", "c"))))
        async with client_of(node) as client:
            client.send("/v1/completions", {"model": "llama3", "prompt": "x", "stream": True})
            await client.head()
            seen = [await client.chunk(), await client.chunk()]
            with pytest.raises(ConnectionResetError):
                await client.reader.read()

        assert [json.loads(chunk[6:])["choices"][0]["text"] for chunk in seen] == ["a", "b"]
        assert node.requests[0].tokens_sent == 2
        assert node.active == 0

    async def test_a_body_that_ends_too_early(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.script += [Fault.truncate(after=1), Fault.truncate(after=1)]
        async with client_of(node) as client:
            client.ask()
            await client.head()
            await client.chunk()

            assert await client.reader.read() == b""
        async with client_of(node) as client:
            client.ask(stream=False)
            with pytest.raises(asyncio.IncompleteReadError) as caught:
                await client.whole()

        assert 0 < len(caught.value.partial) < (caught.value.expected or 0)

    async def test_a_stream_that_ends_without_its_last_event(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.script.append(Fault.unfinished(after=1))
        async with client_of(node) as client:
            client.ask()
            body = await client.body()

        assert body.count(b"\n") == 1
        assert b'"done":false' in body

    @pytest.mark.parametrize(
        ("path", "event"),
        [
            ("/api/chat", {"error": "out of memory"}),
            (
                "/v1/chat/completions",
                {"error": {"message": "out of memory", "type": "server_error", "code": 500}},
            ),
        ],
    )
    async def test_an_error_told_inside_the_stream(self, fake_nodes: StartNode, path: str, event: object) -> None:
        node = await fake_nodes()
        node.script.append(Fault.error_mid_stream(after=1, message="out of memory"))
        async with client_of(node) as client:
            client.send(path, {"model": "llama3", "messages": HELLO, "stream": True})
            last = (await client.body()).strip().splitlines()[-1]

        assert json.loads(last.removeprefix(b"data: ")) == event

    async def test_an_event_that_is_no_json(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.script.append(Fault.nonsense_mid_stream(after=1))
        async with client_of(node) as client:
            client.ask()
            lines = (await client.body()).splitlines()

        assert lines[1] == b"{no json"
        assert len(lines) == 4

    async def test_bytes_that_are_no_http(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.script.append(Fault.garbage())
        async with client_of(node) as client:
            client.ask()
            answer = await client.reader.read()

        assert answer
        assert not answer.startswith(b"HTTP")

    async def test_a_chunk_that_is_none(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.script.append(Fault.garbage_mid_stream(after=1))
        async with client_of(node) as client:
            client.ask()
            await client.head()
            await client.chunk()
            with pytest.raises(ValueError, match="zz"):
                await client.chunk()

    @pytest.mark.parametrize("by_bytes", [5, -5])
    async def test_a_length_that_is_wrong(self, fake_nodes: StartNode, by_bytes: int) -> None:
        node = await fake_nodes()
        node.script.append(Fault.wrong_length(by_bytes))
        async with client_of(node) as client:
            client.ask()
            head = (await client.head()).decode()
            lines = [await client.reader.readline() for _ in range(3)]
        told = int(head.partition("Content-Length: ")[2].partition("\r\n")[0])

        assert told == sum(map(len, lines)) + by_bytes

    async def test_a_head_that_comes_byte_by_byte(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.script.append(Fault.slow_head(byte_s=0.001))
        async with client_of(node) as client:
            client.ask()
            first = await client.reader.read(100)
            body = await client.body()

        assert first == b"H"
        assert body.count(b"\n") == 3

    async def test_a_head_that_is_too_big(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.script.append(Fault.big_head(size_bytes=50_000))
        async with client_of(node) as client:
            client.ask()
            head = await client.head()

        assert len(head) > 50_000

    async def test_a_connection_that_closes_when_idle(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.script.append(Fault.close_idle(after_s=0.02))
        async with client_of(node) as client:
            client.ask()
            body = await client.body()
            rest = await client.reader.read()

        assert body.count(b"\n") == 3
        assert rest == b""
        assert node.requests[0].finished

    async def test_a_request_in_time_keeps_the_idle_connection(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.script.append(Fault.close_idle(after_s=0.3))
        node.default = Answer(first_token_s=0.4)
        async with client_of(node) as client:
            client.ask()
            await client.body()
            client.ask()
            body = await client.body()

        assert body.count(b"\n") == 3

    @pytest.mark.parametrize("fault", [Fault.stall_before_head(), Fault.stall_mid_stream(after=1)])
    async def test_a_stall_lasts_until_the_client_gives_up(self, fake_nodes: StartNode, fault: Fault) -> None:
        node = await fake_nodes()
        node.script.append(fault)
        async with client_of(node) as client:
            client.ask()
            await node.until(lambda: node.active == 1)
            with pytest.raises(TimeoutError):
                await node.wait_idle(within_s=0.05)
        await node.wait_idle()

        assert node.requests[0].aborted
        assert node.active == 0

    async def test_a_function_may_choose_by_the_request(self, fake_nodes: StartNode) -> None:
        def choose(received: Received) -> Answer | Fault:
            return Fault.status(500) if received.json["messages"] == [] else Answer(tokens=("fine",))

        node = await fake_nodes()
        node.default = choose
        async with ollama_client(node) as client:
            with pytest.raises(ollama.ResponseError):
                await client.chat("llama3", [])
            answer = await client.chat("llama3", HELLO)

        assert answer.message.content == "fine"

    async def test_a_function_that_fails_is_told_when_the_node_closes(self) -> None:
        def choose(_: Received) -> Answer:
            raise LookupError("no such answer")

        node = FakeNode()
        node.default = choose
        await node.start()
        async with client_of(node) as client:
            client.ask()
            with pytest.raises(ConnectionResetError):
                await client.reader.read()
        with pytest.raises(ExceptionGroup) as caught:
            await node.close()

        assert caught.group_contains(LookupError, match="no such answer")

    @given(parts=st.lists(st.binary(min_size=1, max_size=40), max_size=8), size_bytes=st.integers(1, 50))
    def test_odd_pieces_hold_the_same_bytes(self, parts: list[bytes], size_bytes: int) -> None:
        steps: list[Step] = [Head(200, "x"), *(Part(part, is_token=True) for part in parts), End()]
        bent = list(Fault.odd_pieces(size_bytes).bend(iter(steps)))
        pieces = [step.data for step in bent if isinstance(step, Part)]

        assert b"".join(pieces) == b"".join(parts)
        assert all(len(piece) == size_bytes for piece in pieces[:-1])

    @given(count=st.integers(0, 6), after=st.integers(0, 8))
    def test_a_cut_never_lets_more_tokens_through_nor_the_end(self, count: int, after: int) -> None:
        steps: list[Step] = [
            Head(200, "x"),
            Part(b"role"),
            *[Part(b"t", is_token=True)] * count,
            Part(b"last"),
            End(),
        ]
        bent = list(Fault.reset_mid_stream(after).bend(iter(steps)))

        assert sum(isinstance(step, Part) and step.is_token for step in bent) == min(count, after)
        assert End() not in bent


class TestHangUps:
    """A client that leaves is noticed."""

    @pytest.mark.parametrize("graceful", [False, True])
    async def test_a_client_that_hangs_up_is_noticed_at_once(self, fake_nodes: StartNode, graceful: bool) -> None:
        node = await fake_nodes()
        node.default = Answer(tokens=("a", "b"), between_s=60)
        async with client_of(node) as client:
            client.ask()
            await client.head()
            if graceful:
                client.writer.close()
            else:
                client.writer.transport.abort()
            await node.until(lambda: node.requests[0].aborted, within_s=0.2)

        assert (node.active, node.in_flight) == (0, 0)
        assert node.requests[0].tokens_sent == 1

    async def test_a_client_that_hangs_up_in_the_line_frees_its_place(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(slots=1)
        node.default = Fault.stall_before_head()
        async with client_of(node) as first:
            first.ask()
            async with client_of(node) as second:
                second.ask()
                await node.until(lambda: node.waiting == 1)
            await node.until(lambda: node.waiting == 0)

            assert node.active == 1

    async def test_a_finished_request_is_not_aborted_by_a_later_hang_up(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        async with client_of(node) as client:
            client.ask()
            await client.body()
        await node.until(lambda: node.connections == 0)

        assert node.requests[0].finished
        assert not node.requests[0].aborted


class TestSlots:
    """Who works and who waits."""

    @ALL_KINDS
    async def test_further_requests_wait_in_order(self, fake_nodes: StartNode, kind: NodeKind) -> None:
        node = await fake_nodes(kind, slots=2)
        node.default = Answer(tokens=("a", "b"), between_s=60)

        def begun() -> list[int]:
            return [received.tokens_sent for received in node.requests]

        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(client_of(node)) for _ in range(4)]
            for number, client in enumerate(clients, start=1):
                client.send("/v1/completions", {"model": "llama3", "prompt": "x", "stream": True})
                await node.wait_for(number)
            at_first = (begun(), node.active, node.waiting)
            clients[1].writer.transport.abort()
            await node.until(lambda: begun() == [1, 1, 1, 0])
            clients[0].writer.transport.abort()
            await node.until(lambda: begun() == [1, 1, 1, 1])

        assert at_first == ([1, 1, 0, 0], 2, 2)
        assert (node.peak_active, node.peak_in_flight) == (2, 4)

    async def test_hundreds_may_wait_without_delay_between_them(self, fake_nodes: StartNode) -> None:
        """A line as long as this must not nest one answer in the other."""
        node = await fake_nodes(slots=1)
        node.script.append(Answer(first_token_s=0.1))
        async with client_of(node) as client:
            clients = [await asyncio.open_connection("127.0.0.1", node.port) for _ in range(400)]
            client.ask(stream=False)
            for reader, writer in clients:
                Client(reader, writer).ask(stream=False)
            await node.until(lambda: node.waiting == 400)
            answers = [await Client(*streams).whole() for streams in clients]
            for _, writer in clients:
                writer.transport.abort()

        assert len(answers) == 400
        assert node.peak_active == 1

    async def test_another_context_length_loads_the_model_anew(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        async with ollama_client(node) as client:
            for num_ctx in (8192, 8192, 2048):
                await client.chat("llama3", HELLO, options={"num_ctx": num_ctx})
            before = (dict(node.loaded), node.loads)
            await client.chat("llama3", HELLO)

        assert before == ({"llama3:latest": 2048}, 2)
        assert (dict(node.loaded), node.loads) == ({"llama3:latest": 4096}, 3)

    async def test_a_reload_waits_until_the_model_is_idle(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.load("llama3", 4096)
        node.script.append(Fault.stall_before_head())
        async with client_of(node) as first, client_of(node) as second:
            first.ask()
            await node.until(lambda: node.active == 1)
            second.ask(options={"num_ctx": 8192})
            await node.until(lambda: node.waiting == 1)
            during = dict(node.loaded)
            first.writer.transport.abort()
            await second.body()

        assert during == {"llama3:latest": 4096}
        assert node.loaded == {"llama3:latest": 8192}

    async def test_a_load_takes_its_time_and_all_wait_for_it(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(load_s=0.1)
        async with client_of(node) as first, client_of(node) as second:
            begun = asyncio.get_running_loop().time()
            first.ask()
            second.ask()
            await node.until(lambda: node.waiting == 2)
            await first.body()
            took_s = asyncio.get_running_loop().time() - begun
            await second.body()

        assert took_s > 0.09
        assert node.loads == 1

    async def test_the_idle_model_that_was_used_longest_ago_makes_room(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(models=("a", "b", "c"), max_loaded=2)
        async with ollama_client(node) as client:
            for model in ("a", "b", "a", "c"):
                await client.generate(model, "x")

        assert set(node.loaded) == {"a:latest", "c:latest"}

    async def test_each_loaded_model_has_slots_of_its_own(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(models=("llama3", "phi3"), slots=1)
        node.default = Fault.stall_before_head()
        async with client_of(node) as first, client_of(node) as second:
            first.ask()
            second.ask(model="phi3")

            await node.until(lambda: node.active == 2)

    async def test_keep_alive_0_drops_the_model_after_the_answer(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        async with ollama_client(node) as client:
            await client.chat("llama3", HELLO, keep_alive=0)

        assert node.loaded == {}
        assert node.loads == 1


class TestLife:
    """A node that dies, comes back, or falls silent."""

    async def test_a_stopped_node_refuses_and_comes_back_on_the_same_port(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        port = node.port
        async with client_of(node) as client:
            client.ask()
            await client.body()
            await node.stop()
            with pytest.raises(ConnectionError):
                await client.reader.readexactly(1)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        memory = dict(node.loaded)
        await node.start()
        async with client_of(node) as client:
            client.ask()
            body = await client.body()

        assert node.port == port
        assert memory == {}
        assert body.count(b"\n") == 3

    async def test_a_node_that_dies_amid_its_work_forgets_it(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes(slots=1, load_s=60)
        async with client_of(node) as first, client_of(node) as second:
            first.ask()
            second.ask()
            await node.until(lambda: node.waiting == 2)
            await node.stop()

        assert (node.active, node.waiting, node.in_flight) == (0, 0, 0)
        assert not any(received.aborted for received in node.requests)

    async def test_a_frozen_node_accepts_and_answers_only_when_thawed(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()
        node.freeze()
        async with client_of(node) as client:
            client.ask()
            await node.wait_for(1)
            with pytest.raises(TimeoutError):
                await node.until(lambda: node.requests[0].status != 0, within_s=0.05)
            node.thaw()
            body = await client.body()

        assert body.count(b"\n") == 3

    async def test_what_is_waited_for_in_vain_is_told(self, fake_nodes: StartNode) -> None:
        node = await fake_nodes()

        with pytest.raises(TimeoutError, match="the node has 0 requests"):
            await node.wait_for(1, within_s=0.01)


class TestCommand:
    """`python -m sutazai.testing.fake_node`."""

    async def test_it_serves_until_it_is_told_to_stop(self) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "error", "-m", "sutazai.testing.fake_node",
            "--port", "0", "--models", "a,b", "--tokens", "3", "--first-token", "0", "--load", "0",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        async with ollama.AsyncClient(host=line.split()[0]) as client:
            answer = await client.generate("b", "x")
        process.send_signal(signal.SIGTERM)
        _, errors = await process.communicate()

        assert line.endswith("plays ollama with a:latest, b:latest\n")
        assert answer.response == "word1 word2 word3 "
        assert (process.returncode, errors) == (0, b"")
