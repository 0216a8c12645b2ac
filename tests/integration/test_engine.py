"""The embedded engine itself: what it answers, to whom, and how it ends."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
import pytest

from sutazai.adapters.llamacpp.engine import NO_WHEEL, Order, Ready
from sutazai.adapters.llamacpp.process import EngineProcess, launch
from sutazai.adapters.llamacpp.spec import TRIAL_MODEL
from sutazai.adapters.llamacpp.supervisor import ENGINE
from sutazai.testing.tiny_gguf import TRIAL_CORPUS, write_random

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None and "CI" not in os.environ,
    reason="the wheel xllamacpp is not installed",
)

KEY = "let me in"
LIMIT_S = 20.0
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "unit": {"enum": ["m", "km"]}},
            "required": ["a", "unit"],
        },
    },
}
PING = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "count": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "fresh": {"type": "boolean"},
    },
    "required": ["name", "count", "tags", "fresh"],
}


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that needs seconds for a long answer."""
    path = tmp_path_factory.mktemp("models") / "slow.gguf"
    write_random(path, "slow", layers=4, embd=512, heads=8, kv_heads=2, ffn=1408)
    return path


@asynccontextmanager
async def _engine(
    model: Path = TRIAL_MODEL, *, drain_s: float = LIMIT_S, slots: int = 2, batch_tokens: int = 2048
) -> AsyncIterator[tuple[EngineProcess, str]]:
    """A running engine and its address; killed at the end where it still runs."""
    order = Order(
        model_path=str(model),
        name=model.stem,
        slots=slots,
        context_tokens=1024,
        threads=1,
        batch_tokens=batch_tokens,
        api_key=KEY,
        drain_s=drain_s,
    )
    process = await launch(ENGINE)
    try:
        process.order(msgspec.json.encode(order))
        yield process, msgspec.json.decode(await process.first_line(), type=Ready).url
    finally:
        await process.end(0)


def _ask(url: str, path: str, body: object = None, key: str = KEY) -> Any:
    payload = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url + path, payload, headers)  # noqa: S310  our own loopback server
    with urllib.request.urlopen(request, timeout=LIMIT_S) as reply:  # noqa: S310
        return json.loads(reply.read())


async def _chat(url: str, **fields: object) -> Any:
    body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 100} | fields
    return await asyncio.to_thread(_ask, url, "/v1/chat/completions", body)


def _open_stream(url: str, max_tokens: int) -> socket.socket:
    """Ask for an answer of that length and return once its beginning is here, to be read."""
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "max_tokens": max_tokens,
    }
    payload = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: engine\r\nAuthorization: Bearer {KEY}\r\n"
    address = urlsplit(url)
    stream = socket.create_connection((address.hostname, address.port), timeout=LIMIT_S)
    stream.sendall(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
    while b"content" not in (begun := stream.recv(65536, socket.MSG_PEEK)):
        assert begun, "the stream ended before it began"
        time.sleep(0.001)
    return stream


def _rest(stream: socket.socket) -> bytes:
    parts = []
    while part := stream.recv(65536):
        parts.append(part)
    return b"".join(parts)


async def _all_slots_free(url: str) -> None:
    """Return when the engine works on nothing."""
    while any(slot["is_processing"] for slot in await asyncio.to_thread(_ask, url, "/slots")):
        await asyncio.sleep(0.01)


async def test_a_chat_is_answered_with_what_the_trial_model_says() -> None:
    async with _engine() as (_, url):
        reply = await _chat(url)

    assert reply["choices"][0]["message"]["content"] == TRIAL_CORPUS[0]
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["model"] == "sutazai-trial"
    assert reply["usage"]["completion_tokens"] > 10


async def test_a_stream_comes_in_parts_and_ends_with_its_usage() -> None:
    async with _engine() as (_, url):
        with closing(await asyncio.to_thread(_open_stream, url, 5)) as stream:
            rest = await asyncio.to_thread(_rest, stream)

    assert b'"usage":{"completion_tokens":5' in rest
    assert rest.rstrip().endswith(b"data: [DONE]\n\n\r\n0")


async def test_the_same_server_embeds_and_texts_with_common_words_are_closer() -> None:
    texts = ["a tiny trial model", "a tiny model", "queue and gateway"]

    async with _engine() as (_, url):
        reply = await asyncio.to_thread(_ask, url, "/v1/embeddings", {"input": texts})

    near, middle, far = (item["embedding"] for item in reply["data"])
    assert sum(a * b for a, b in zip(near, middle, strict=True)) > 0.8
    assert sum(a * b for a, b in zip(near, far, strict=True)) < 0.2


async def test_texts_embedded_together_are_embedded_as_each_alone() -> None:
    """With llama.cpp's default of a cache for each slot, most of these were wrong."""
    texts = [" tiny trial model" * count for count in (1, 9, 2, 30, 5, 17)]
    texts += [" gateway and queue" * count for count in (4, 1, 21, 8)]

    async with _engine() as (_, url):
        together = await asyncio.to_thread(_ask, url, "/v1/embeddings", {"input": texts})
        alone = [await asyncio.to_thread(_ask, url, "/v1/embeddings", {"input": text}) for text in texts]

    for one, same in zip(together["data"], alone, strict=True):
        assert one["embedding"] == pytest.approx(same["data"][0]["embedding"], abs=1e-3)


async def test_a_slot_has_its_own_share_of_the_context() -> None:
    async with _engine() as (_, url):
        slots = await asyncio.to_thread(_ask, url, "/slots")
        with pytest.raises(urllib.error.HTTPError) as refused:
            await _chat(url, messages=[{"role": "user", "content": " tiny" * 1024}])

    assert [slot["n_ctx"] for slot in slots] == [1024, 1024]
    assert refused.value.code == 400
    refused.value.close()


async def test_an_input_of_the_whole_context_can_be_embedded() -> None:
    async with _engine() as (_, url):
        reply = await asyncio.to_thread(_ask, url, "/v1/embeddings", {"input": " tiny" * 1000})

    assert reply["usage"]["prompt_tokens"] == 1000


@pytest.mark.parametrize("slots", [3, 5])
async def test_a_batch_that_the_slots_do_not_divide_is_made_one_that_they_do(slots: int) -> None:
    """llama.cpp would abort at the start."""
    async with _engine(slots=slots, batch_tokens=256) as (_, url):
        reply = await _chat(url, messages=[{"role": "user", "content": " tiny" * 900}])

    assert reply["usage"]["prompt_tokens"] > 900


async def test_an_embedding_beyond_the_batch_is_refused_and_the_engine_goes_on() -> None:
    async with _engine(batch_tokens=256) as (_, url):
        with pytest.raises(urllib.error.HTTPError) as refused:
            await asyncio.to_thread(_ask, url, "/v1/embeddings", {"input": " tiny" * 1000})
        reply = await asyncio.to_thread(_ask, url, "/v1/embeddings", {"input": " tiny" * 250})

    assert refused.value.code in {400, 500}
    refused.value.close()
    assert reply["usage"]["prompt_tokens"] == 250


async def test_a_completion_tells_how_likely_its_tokens_were() -> None:
    body = {"prompt": "I am a", "max_tokens": 3, "temperature": 0, "logprobs": 1}

    async with _engine() as (_, url):
        reply = await asyncio.to_thread(_ask, url, "/v1/completions", body)

    assert reply["choices"][0]["text"] == " tiny trial model"
    assert all(-0.01 < token["logprob"] <= 0 for token in reply["choices"][0]["logprobs"]["content"])


@pytest.mark.parametrize("temperature", [0, 0.8])
async def test_an_answer_follows_the_schema_that_was_asked_for(temperature: float) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}

    async with _engine() as (_, url):
        reply = await _chat(url, response_format=wanted, temperature=temperature, max_tokens=300)

    thing = json.loads(reply["choices"][0]["message"]["content"])
    assert isinstance(thing["name"], str)
    assert isinstance(thing["count"], int)
    assert isinstance(thing["tags"], list)
    assert isinstance(thing["fresh"], bool)


@pytest.mark.parametrize("temperature", [0, 0.8])
async def test_a_required_tool_is_called_with_arguments_of_its_schema(temperature: float) -> None:
    async with _engine() as (_, url):
        reply = await _chat(url, tools=[ADD], tool_choice="required", temperature=temperature, max_tokens=200)

    (call,) = reply["choices"][0]["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert reply["choices"][0]["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "add"
    assert isinstance(arguments["a"], int)
    assert arguments["unit"] in {"m", "km"}


async def test_a_tool_that_may_be_called_is_left_alone() -> None:
    async with _engine() as (_, url):
        reply = await _chat(url, tools=[ADD, PING])

    assert reply["choices"][0]["message"]["content"] == TRIAL_CORPUS[0]
    assert "tool_calls" not in reply["choices"][0]["message"]


async def test_the_template_shows_the_model_every_role_and_tool() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "ping", "arguments": '{"now": true}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Are you there?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "pong"},
    ]

    async with _engine() as (_, url):
        reply = await asyncio.to_thread(_ask, url, "/apply-template", {"messages": messages, "tools": [PING]})

    for part in (
        "<|im_start|>system\nBe brief.",
        '"name": "ping"',
        "<|im_start|>user\nAre you there?<|im_end|>",
        '<tool_call>\n{"name": "ping", "arguments": {"now": true}}\n</tool_call><|im_end|>',
        "<tool_response>\npong\n</tool_response><|im_end|>",
    ):
        assert part in reply["prompt"]
    assert reply["prompt"].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/v1/models", "/slots", "/metrics"])
async def test_without_the_key_nothing_is_answered(path: str) -> None:
    body = None if path in {"/v1/models", "/slots", "/metrics"} else {"input": "x", "messages": []}

    async with _engine() as (_, url):
        with pytest.raises(urllib.error.HTTPError) as refused:
            await asyncio.to_thread(_ask, url, path, body, "a guess")

    assert refused.value.code == 401
    refused.value.close()


async def test_it_listens_on_loopback_alone_and_lets_no_web_page_in() -> None:
    async with _engine() as (_, url):
        with await asyncio.to_thread(urllib.request.urlopen, url + "/health", None, LIMIT_S) as reply:
            allowed = reply.headers.get("Access-Control-Allow-Origin", "")

    assert urlsplit(url).hostname == "127.0.0.1"
    assert allowed == ""


async def test_a_lost_stream_frees_its_slot(slow_model: Path) -> None:
    async with _engine(slow_model) as (_, url):
        stream = await asyncio.to_thread(_open_stream, url, 900)
        stream.close()

        async with asyncio.timeout(1):
            await _all_slots_free(url)


async def test_after_sigterm_a_stream_is_finished_and_the_status_is_zero(slow_model: Path) -> None:
    async with _engine(slow_model) as (process, url):
        with closing(await asyncio.to_thread(_open_stream, url, 100)) as stream:
            os.kill(process.pid, signal.SIGTERM)
            rest = await asyncio.to_thread(_rest, stream)
            await process.ended.wait()

    assert b"data: [DONE]" in rest
    assert process.returncode == 0


async def test_a_stream_too_long_for_the_drain_is_cut_and_the_status_is_zero(slow_model: Path) -> None:
    async with _engine(slow_model, drain_s=0.2) as (process, url):
        with closing(await asyncio.to_thread(_open_stream, url, 900)) as stream:
            os.kill(process.pid, signal.SIGTERM)
            rest = await asyncio.to_thread(_rest, stream)
            await process.ended.wait()

    assert b"[DONE]" not in rest
    assert process.returncode == 0


async def test_ctrl_c_is_left_to_the_parent() -> None:
    async with _engine() as (process, url):
        os.kill(process.pid, signal.SIGINT)

        assert (await _chat(url))["choices"][0]["message"]["content"] == TRIAL_CORPUS[0]


PARENT = """
import asyncio, sys
from pathlib import Path
from sutazai.adapters.llamacpp.spec import EngineSpec
from sutazai.adapters.llamacpp.supervisor import EngineSupervisor

async def main():
    spec = EngineSpec(model_path=Path(sys.argv[1]), name="slow", slots=1, context_tokens=1024, threads=1,
                      max_rss_bytes=1 << 40)
    engine = EngineSupervisor(spec, started=print, stopped=print, is_idle=bool)
    node, key = await engine.start()
    print(node.url, key.reveal(), flush=True)
    await engine.run()

asyncio.run(main())
"""


async def test_the_engine_dies_with_its_parent_even_in_the_middle_of_an_answer(slow_model: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(slow_model), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    url, key = (await parent.stdout.readline()).decode().split()
    endless = {"prompt": "x", "max_tokens": 1000, "ignore_eos": True}
    answer = asyncio.create_task(asyncio.to_thread(_ask, url, "/v1/completions", endless, key))
    while not any(slot["is_processing"] for slot in await asyncio.to_thread(_ask, url, "/slots", None, key)):
        await asyncio.sleep(0.01)
    parent.kill()
    await parent.wait()

    with pytest.raises((OSError, ValueError)):
        await answer
    async with asyncio.timeout(5):
        while not await asyncio.to_thread(_is_closed, url):
            await asyncio.sleep(0.01)


def _is_closed(url: str) -> bool:
    address = urlsplit(url)
    with suppress(ConnectionRefusedError), socket.create_connection((address.hostname, address.port), 1):
        return False
    return True


async def test_a_wheel_that_cannot_be_loaded_has_its_own_status(tmp_path: Path) -> None:
    (tmp_path / "xllamacpp.py").write_text('raise ImportError("libgomp.so.1: cannot open shared object file")')
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from sutazai.adapters.llamacpp import engine;"
    order = Order(model_path=str(TRIAL_MODEL), name="x", slots=1, context_tokens=256, threads=1, api_key=KEY, drain_s=1)
    process = await launch((sys.executable, "-c", f"{code} sys.exit(engine.main())"))
    process.order(msgspec.json.encode(order))
    await process.ended.wait()

    assert process.returncode == NO_WHEEL
    assert "libgomp.so.1" in process.last_words()
