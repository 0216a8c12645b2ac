"""Answers that do not stream, from llama.cpp: the same as it gives itself, and given up as soon as the client is."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import socket
import urllib.request
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from sutazai.adapters.llamacpp.spec import TRIAL_MODEL, EngineSpec
from sutazai.adapters.llamacpp.supervisor import EngineSupervisor
from sutazai.adapters.openai import OpenAINode
from sutazai.core.errors import BadRequest, NodeRejected, NodeUnreachable, SutazaiError
from sutazai.core.node import Node, NodeKind
from sutazai.core.request import Endpoint, Head, Request, Usage
from sutazai.settings.secret import Secret
from sutazai.testing.fake_node import Answer, FakeNode, Fault, ToolCall
from sutazai.testing.tiny_gguf import TRIAL_CORPUS, write_random

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    StartNode = Callable[..., Awaitable[FakeNode]]

real = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None and "CI" not in os.environ,
    reason="the wheel xllamacpp is not installed",
)

LIMIT_S = 20.0
PROMISE_S = 1.0
"""How soon a node is free once its client has left."""
TRIAL = EngineSpec(
    model_path=TRIAL_MODEL,
    name="sutazai-trial",
    slots=2,
    context_tokens=1024,
    threads=1,
    max_rss_bytes=1 << 40,
)
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
PING = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}}
HELLO = [{"role": "user", "content": "Hello"}]
CHAT = {"model": "sutazai-trial", "messages": HELLO, "temperature": 0, "max_tokens": 60}
COMPLETION = {"model": "sutazai-trial", "prompt": "I am a", "temperature": 0, "max_tokens": 3}


class Caller:
    """A reply that keeps what it is told. Awaited, it gives a whole answer, or raises the error."""

    def __init__(self) -> None:
        self._done: asyncio.Future[tuple[Head, bytes, Usage | None]] = asyncio.get_running_loop().create_future()
        self._head: Head | None = None
        self._parts: list[bytes] = []

    async def answer(self) -> tuple[Head, bytes, Usage | None]:
        """The answer, however it came."""
        async with asyncio.timeout(LIMIT_S):
            return await self._done

    @property
    def was_told(self) -> bool:
        """Whether anything of the answer has come."""
        return self._done.done() or self._head is not None

    def head(self, head: Head) -> None:
        self._head = head

    def chunk(self, data: bytes) -> None:
        self._parts.append(data)

    def end(self, usage: Usage | None) -> None:
        assert self._head is not None
        self._done.set_result((self._head, b"".join(self._parts), usage))

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        self._done.set_result((head, body, usage))

    def fail(self, error: SutazaiError) -> None:
        self._done.set_exception(error)


def _request(endpoint: Endpoint, body: object, *, stream: bool = False) -> Request:
    return Request("r1", endpoint, "sutazai-trial", stream, json.dumps(body).encode(), "local", "", 0.0)


async def _ask(client: OpenAINode, endpoint: Endpoint, body: object, *, stream: bool = False) -> Any:
    caller = Caller()
    client.start(_request(endpoint, body, stream=stream), caller)
    head, answer, _ = await caller.answer()
    assert stream or head.content_type == b"application/json; charset=utf-8"
    return answer if stream else json.loads(answer)


@asynccontextmanager
async def _client(node: Node, api_key: str | None = None) -> AsyncIterator[OpenAINode]:
    client = OpenAINode(node, api_key=api_key, connect_s=2.0)
    try:
        yield client
    finally:
        await client.close()


class Engine:
    """The embedded engine: through our client, and without it."""

    def __init__(self, node: Node, key: Secret, client: OpenAINode) -> None:
        self._url = node.url
        self._key = key
        self.client = client

    async def direct(self, path: str, body: object = None) -> Any:
        """What llama.cpp itself answers. Raises `HTTPError`."""
        return await asyncio.to_thread(self._direct, path, body)

    async def busy_slots(self) -> int:
        """Slots that it works in."""
        return sum(slot["is_processing"] for slot in await self.direct("/slots"))

    async def until_busy(self, slots: int) -> None:
        """Return when it works in exactly that many."""
        while await self.busy_slots() != slots:
            await asyncio.sleep(0.005)

    def ask_and_leave_open(self, path: str, body: object) -> socket.socket:
        """Ask llama.cpp itself and read nothing."""
        address = urlsplit(self._url)
        payload = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: engine\r\nAuthorization: Bearer {self._key.reveal()}\r\n"
        asked = socket.create_connection((address.hostname, address.port), timeout=LIMIT_S)
        asked.sendall(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        return asked

    def _direct(self, path: str, body: object) -> Any:
        payload = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self._key.reveal()}", "Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, payload, headers)  # noqa: S310  our own loopback server
        with urllib.request.urlopen(request, timeout=LIMIT_S) as reply:  # noqa: S310
            return json.loads(reply.read())


@asynccontextmanager
async def _engine(spec: EngineSpec = TRIAL) -> AsyncIterator[Engine]:
    supervisor = EngineSupervisor(
        spec, started=lambda *_: None, stopped=lambda *_: None, is_idle=lambda: True, drain_s=0.2
    )
    node, key = await supervisor.start()
    try:
        async with _client(node, key.reveal()) as client:
            yield Engine(node, key, client)
    finally:
        await supervisor.stop()


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
    """A model that needs seconds for a long answer."""
    path: Path = tmp_path_factory.mktemp("models") / "slow.gguf"
    write_random(path, "slow", layers=12, embd=512, heads=8, kv_heads=2, ffn=1408)
    return replace(TRIAL, model_path=path, name="slow")


def _shape(value: object) -> object:
    """A value without what differs each time: its keys, and the kind of each value."""
    if isinstance(value, dict):
        return {name: _shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shape(inner) for inner in value]
    return "number" if isinstance(value, int | float) else type(value).__name__


def _said(answer: Any) -> Any:
    """The choices without the ids of calls, which are random."""
    for choice in answer["choices"]:
        for call in choice.get("message", {}).get("tool_calls", ()):
            assert call.pop("id")
    return answer["choices"]


@real
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_tokens": 3},
        {"stream": False, "stream_options": None},
        {"logprobs": True, "top_logprobs": 2},
        {"n": 2},
        {"stop": ["tiny"]},
        {"stop": ["Hello"]},
        {"response_format": {"type": "json_object"}},
        {"tools": [ADD]},
        {"tools": [ADD, PING], "tool_choice": "required"},
        {"tools": [ADD], "tool_choice": "required", "max_tokens": 40},
        {"tools": [PING], "tool_choice": "required", "messages": [*HELLO, {"role": "user", "content": "Ping"}]},
        {"tools": [PING], "logprobs": True, "top_logprobs": 1},
        {"messages": [*HELLO, {"role": "assistant", "content": "Hello! I"}], "max_tokens": 5},
    ],
    ids=lambda more: ",".join(more) or "plain",
)
async def test_a_chat_is_answered_as_llamacpp_answers_it(more: dict[str, object]) -> None:
    async with _engine() as engine:
        ours = await _ask(engine.client, Endpoint.OPENAI_CHAT, CHAT | more)
        direct = await engine.direct("/v1/chat/completions", CHAT | more)

    assert _shape(ours) == _shape(direct)
    assert _said(ours) == _said(direct)
    assert (ours["object"], ours["model"]) == ("chat.completion", "sutazai-trial")
    assert ours["usage"]["total_tokens"] == direct["usage"]["total_tokens"]


@real
@pytest.mark.parametrize(
    "more",
    [{}, {"logprobs": 2}, {"n": 2}, {"prompt": ["I am a", "You are"]}, {"echo": True}, {"stop": [" trial"]}],
    ids=lambda more: ",".join(more) or "plain",
)
async def test_a_completion_is_answered_as_llamacpp_answers_it(more: dict[str, object]) -> None:
    async with _engine() as engine:
        ours = await _ask(engine.client, Endpoint.OPENAI_COMPLETION, COMPLETION | more)
        direct = await engine.direct("/v1/completions", COMPLETION | more)

    counts = [choice.pop("usage") for choice in ours["choices"] if "usage" in choice]
    if counts:  # llama.cpp tells those of its first choice alone; ours are of all
        told = direct.pop("usage")
        assert told["total_tokens"] == counts[0]["total_tokens"]
        assert ours.pop("usage")["total_tokens"] == sum(count["total_tokens"] for count in counts)
    assert _shape(ours) == _shape(direct)
    assert _said(ours) == _said(direct)
    assert ours["object"] == "text_completion"


@real
@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_that_is_named_is_called(stream: bool) -> None:
    chat = CHAT | {"tools": [ADD, PING], "tool_choice": {"type": "function", "function": {"name": "ping"}}}

    async with _engine() as engine:
        ignored = await engine.direct("/v1/chat/completions", chat)
        answer = await _ask(engine.client, Endpoint.OPENAI_CHAT, chat | {"stream": stream}, stream=stream)

    assert "tool_calls" not in ignored["choices"][0]["message"], "llama.cpp has learnt it; with_forced_tool can go"
    if stream:
        assert b'"name":"ping"' in answer
    else:
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert [call["function"] for call in choice["message"]["tool_calls"]] == [{"name": "ping", "arguments": "{}"}]


@real
async def test_a_refusal_of_llamacpp_keeps_its_status_and_its_words() -> None:
    chat = CHAT | {"messages": [{"role": "user", "content": " tiny" * 1024}]}

    async with _engine() as engine:
        with pytest.raises(NodeRejected, match="exceeds the available context size") as refused:
            await _ask(engine.client, Endpoint.OPENAI_CHAT, chat)

    assert refused.value.status == 400


@real
async def test_ollama_clients_get_answers_that_do_not_stream() -> None:
    options = {"model": "sutazai-trial", "stream": False, "options": {"temperature": 0}}

    async with _engine() as engine:
        chat = await _ask(engine.client, Endpoint.OLLAMA_CHAT, options | {"messages": HELLO})
        generated = await _ask(engine.client, Endpoint.OLLAMA_GENERATE, options | {"prompt": "Hello"})
        raw = {"prompt": "I am a", "raw": True, "options": {"temperature": 0, "num_predict": 3}}
        completed = await _ask(engine.client, Endpoint.OLLAMA_GENERATE, options | raw)
        embedded = await _ask(engine.client, Endpoint.OLLAMA_EMBED, {"model": "sutazai-trial", "input": "tiny"})

    assert chat["message"] == {"role": "assistant", "content": TRIAL_CORPUS[0]}
    assert (chat["done"], chat["done_reason"]) == (True, "stop")
    assert chat["eval_count"] > 10
    assert chat["eval_duration"] > 0
    assert generated["response"] == TRIAL_CORPUS[0]
    assert completed["response"] == " tiny trial model"
    assert completed["done_reason"] == "length"
    assert len(embedded["embeddings"]) == 1


ENDLESS = {"model": "slow", "ignore_eos": True, "max_tokens": 900}
LONG: dict[Endpoint, dict[str, object]] = {
    Endpoint.OPENAI_CHAT: ENDLESS | {"messages": HELLO},
    Endpoint.OPENAI_COMPLETION: ENDLESS | {"prompt": "I am a"},
    Endpoint.OLLAMA_CHAT: {"model": "slow", "stream": False, "messages": HELLO, "options": {"num_predict": 900}},
}


@real
@pytest.mark.parametrize("endpoint", LONG)
async def test_a_caller_who_leaves_frees_the_slot(slow_model: EngineSpec, endpoint: Endpoint) -> None:
    async with _engine(slow_model) as engine:
        caller = Caller()
        call = engine.client.start(_request(endpoint, LONG[endpoint]), caller)
        await engine.until_busy(1)
        call.cancel()

        async with asyncio.timeout(PROMISE_S):
            await engine.until_busy(0)

    assert not caller.was_told


@real
async def test_llamacpp_itself_works_on_for_a_caller_who_left(slow_model: EngineSpec) -> None:
    """Why all this is done; where it fails, llama.cpp has learnt to notice and the detour can go."""
    async with _engine(slow_model) as engine:
        with closing(engine.ask_and_leave_open(Endpoint.OPENAI_CHAT.path, LONG[Endpoint.OPENAI_CHAT])):
            await engine.until_busy(1)

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(PROMISE_S):
                await engine.until_busy(0)


# The same against a fake server, which shows what was sent and can fail.

FAKE: dict[Endpoint, dict[str, object]] = {
    Endpoint.OPENAI_CHAT: {"messages": HELLO},
    Endpoint.OPENAI_COMPLETION: {"prompt": "Hi"},
    Endpoint.OLLAMA_CHAT: {"messages": HELLO, "stream": False},
    Endpoint.OLLAMA_GENERATE: {"prompt": "Hi", "stream": False},
}


def _as_node(fake: FakeNode) -> Node:
    return Node(name="fake", kind=fake.kind, url=fake.url)


@pytest.mark.parametrize("endpoint", FAKE)
async def test_a_node_hears_within_a_second_that_the_caller_left(fake_nodes: StartNode, endpoint: Endpoint) -> None:
    fake = await fake_nodes(NodeKind.LLAMACPP, ("m",))
    fake.default = Answer(tokens=("word ",) * 1000, between_s=0.05)

    async with _client(_as_node(fake)) as client:
        call = client.start(_request(endpoint, {"model": "m", **FAKE[endpoint]}), Caller())
        await fake.wait_for(1)
        await fake.until(lambda: fake.inferences[0].tokens_sent > 0)
        call.cancel()
        await fake.until(lambda: fake.inferences[0].aborted, within_s=PROMISE_S)

    assert fake.inferences[0].json["stream"] is True
    assert fake.inferences[0].headers["connection"] == "close"


@pytest.mark.parametrize("endpoint", FAKE)
async def test_an_answer_that_is_put_together_tells_its_tokens(fake_nodes: StartNode, endpoint: Endpoint) -> None:
    fake = await fake_nodes(NodeKind.LLAMACPP, ("m",))
    fake.default = Fault.odd_pieces(7, Answer(tokens=("Hel", "lo"), prompt_tokens=5))

    async with _client(_as_node(fake)) as client:
        caller = Caller()
        client.start(_request(endpoint, {"model": "m", **FAKE[endpoint]}), caller)
        _, body, usage = await caller.answer()

    assert b"Hello" in body
    assert usage == Usage(5, 2)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (Fault.truncate(1), "cut the connection"),
        (Fault.unfinished(1), "broke off before its end"),
        (Fault.error_mid_stream(1, "the model broke down"), "the model broke down"),
        (Fault.nonsense_mid_stream(1), "could not be read"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
async def test_an_answer_that_breaks_off_is_a_failure_and_none_of_it_is_told(
    fake_nodes: StartNode, fault: Fault, why: str
) -> None:
    fake = await fake_nodes(NodeKind.LLAMACPP, ("m",))
    fake.script += [fault, Answer(tokens=("Fine",))]

    async with _client(_as_node(fake)) as client:
        with pytest.raises(NodeUnreachable, match=why):
            await _ask(client, Endpoint.OPENAI_CHAT, {"model": "m", "messages": HELLO})
        after = await _ask(client, Endpoint.OPENAI_CHAT, {"model": "m", "messages": HELLO})

    assert after["choices"][0]["message"]["content"] == "Fine"


async def test_thoughts_and_calls_are_put_together(fake_nodes: StartNode) -> None:
    fake = await fake_nodes(NodeKind.LLAMACPP, ("m",))
    fake.default = Answer(tokens=(), thinking=("Let ", "me"), tool_calls=(ToolCall(name="add", arguments={"a": 1}),))

    async with _client(_as_node(fake)) as client:
        answer = await _ask(client, Endpoint.OPENAI_CHAT, {"model": "m", "messages": HELLO})

    call = {"id": "call_0", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    message = {"role": "assistant", "content": "", "reasoning_content": "Let me", "tool_calls": [call]}
    assert answer["choices"] == [{"index": 0, "message": message, "finish_reason": "tool_calls"}]


async def test_a_name_that_is_no_tool_is_refused_before_anything_is_sent(fake_nodes: StartNode) -> None:
    fake = await fake_nodes(NodeKind.LLAMACPP, ("m",))
    chat = {"model": "m", "messages": HELLO, "tool_choice": {"type": "function", "function": {"name": "ping"}}}

    async with _client(_as_node(fake)) as client:
        with pytest.raises(BadRequest, match="not among the tools"):
            await _ask(client, Endpoint.OPENAI_CHAT, chat)

    assert fake.inferences == []


@pytest.mark.parametrize(
    "chat",
    [
        {"messages": HELLO, "logprobs": True},
        {"messages": [*HELLO, {"role": "assistant", "content": "He"}]},
    ],
)
async def test_what_a_stream_would_answer_otherwise_is_asked_whole(
    fake_nodes: StartNode, chat: dict[str, object]
) -> None:
    fake = await fake_nodes(NodeKind.LLAMACPP, ("m",))

    async with _client(_as_node(fake)) as client:
        await _ask(client, Endpoint.OPENAI_CHAT, chat)

    assert fake.inferences[0].json == chat


async def test_other_nodes_get_what_the_client_sent(fake_nodes: StartNode) -> None:
    fake = await fake_nodes(NodeKind.OPENAI, ("m",))
    chat = {"model": "m", "messages": HELLO, "tools": [PING], "tool_choice": {"type": "function", "function": {}}}

    async with _client(_as_node(fake)) as client:
        caller = Caller()
        client.start(_request(Endpoint.OPENAI_CHAT, chat), caller)
        await caller.answer()

    assert fake.inferences[0].body == json.dumps(chat).encode()
    assert "connection" not in fake.inferences[0].headers
