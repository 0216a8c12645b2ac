"""Ollama loads a model once, whatever its clients ask for; and bytes that need no change are not changed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import pytest

from sutazai.core.node import NodeKind
from sutazai.settings.model import HealthSettings, ModelSettings
from sutazai.testing import Answer, Fault

if TYPE_CHECKING:
    from tests.conftest import Dial, StartGateway, StartNode

GENERATE = "/api/generate"
ASKED = {"model": "llama3", "prompt": "hello", "stream": False}
BUCKETS = (4096, 8192, 16384, 32768, 65536, 131072)
SELDOM = HealthSettings(interval_s=60.0)
"""Probes would tell what is loaded; these tests also hold between two of them."""
OFTEN = HealthSettings(interval_s=0.02)


def with_context(tokens: int) -> dict[str, object]:
    return ASKED | {"options": {"num_ctx": tokens}}


@pytest.mark.parametrize("health", [SELDOM, OFTEN], ids=["between probes", "with probes"])
async def test_many_context_lengths_load_a_model_once_for_each_bucket_it_grows_into(
    health: HealthSettings, gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(slots=4)
    gateway = await gateways(node, health=health)
    wire = await dial(gateway.port)
    grown: list[int] = []
    for tokens in [2048, 100, 4096, 5000, 4000, 8000, 8192, 3, 9000, 16384, 12000, 2048]:
        wire.post(GENERATE, with_context(tokens))
        assert (await wire.answer()).status == 200
        grown.append(node.loaded["llama3:latest"])
        await asyncio.sleep(0)

    assert grown == sorted(grown)
    assert set(grown) == {4096, 8192, 16384}
    assert node.loads == 3


@pytest.mark.parametrize("health", [SELDOM, OFTEN], ids=["between probes", "with probes"])
async def test_many_clients_at_once_do_not_make_a_model_load_back_and_forth(
    health: HealthSettings, gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """One that asks for more is followed by others that ask for less, or for nothing, while the load goes on."""
    node = await fake_nodes(slots=2, load_s=0.05)
    node.default = Answer(first_token_s=0.01)
    node.load("llama3", 4096)
    gateway = await gateways(node, health=health)
    wires = [await dial(gateway.port) for _ in range(12)]
    for number, wire in enumerate(wires):
        wire.post(GENERATE, with_context(8000) if number == 1 else with_context(1000) if number % 3 == 0 else ASKED)
        await asyncio.sleep(0.02)
    got = [await wire.answer() for wire in wires]

    assert {answer.status for answer in got} == {200}
    assert node.loaded == {"llama3:latest": 8192}
    assert node.loads == 2


async def test_an_openai_client_does_not_shrink_what_an_ollama_client_had_loaded(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    gateway = await gateways(node, health=SELDOM)
    wire = await dial(gateway.port)
    wire.post(GENERATE, with_context(8192))
    await wire.answer()
    for _ in range(3):
        wire.post("/v1/chat/completions", {"model": "llama3", "messages": [{"role": "user", "content": "hi"}]})
        assert (await wire.answer()).status == 200

    assert node.loads == 1
    assert [received.json["options"]["num_ctx"] for received in node.inferences] == [8192] * 4


async def test_options_that_would_load_the_model_anew_are_dropped_and_the_fixed_ones_set(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    gateway = await gateways(node, models={"llama3": ModelSettings(load_options={"num_gpu": 99})})
    wire = await dial(gateway.port)
    for options in ({"num_gpu": 1, "temperature": 0.5}, {"num_thread": 3, "use_mmap": False}, {}):
        wire.post(GENERATE, ASKED | {"options": options})
        assert (await wire.answer()).status == 200

    assert node.loads == 1
    assert [received.json["options"] for received in node.inferences] == [
        {"temperature": 0.5, "num_gpu": 99},
        {"num_gpu": 99},
        {"num_gpu": 99},
    ]


@pytest.mark.parametrize(
    ("kind", "path", "more"),
    [
        (NodeKind.OLLAMA, "/api/chat", {"messages": [{"role": "user", "content": "\\u00e9"}], "keep_alive": "1h"}),
        (NodeKind.OLLAMA, "/api/generate", {"prompt": "hello", "stream": False, "options": {"temperature": 0.50}}),
        (NodeKind.OLLAMA, "/api/embed", {"input": ["a", "b"]}),
        (NodeKind.OLLAMA, "/api/embeddings", {"prompt": "a"}),
        (NodeKind.OPENAI, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "odd": None}),
        (NodeKind.OPENAI, "/v1/completions", {"prompt": "hello", "stream": True, "max_tokens": 5}),
        (NodeKind.OPENAI, "/v1/embeddings", {"input": "a", "encoding_format": "base64"}),
        (NodeKind.LLAMACPP, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "stream": True}),
        (NodeKind.LLAMACPP, "/v1/embeddings", {"input": "a"}),
    ],
)
async def test_bytes_that_need_no_change_reach_the_node_as_they_are(
    kind: NodeKind,
    path: str,
    more: dict[str, object],
    gateways: StartGateway,
    fake_nodes: StartNode,
    dial: Dial,
) -> None:
    """Odd spacing, key order and unknown fields too."""
    node = await fake_nodes(kind)
    gateway = await gateways(node)
    wire = await dial(gateway.port)
    body = msgspec.json.format(msgspec.json.encode(more | {"model": "llama3"}), indent=3)
    wire.post(path, body)
    answer = await wire.answer()

    assert answer.status == 200
    assert node.inferences[0].body == body


async def test_bytes_pass_untouched_again_once_the_default_length_was_seen(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(context_tokens=2048)
    gateway = await gateways(node, health=OFTEN)
    wire = await dial(gateway.port)
    body = msgspec.json.encode(ASKED) + b" "
    wire.post(GENERATE, body)
    await wire.answer()
    (state,) = gateway.fleet.states()
    while not state.loaded:
        await asyncio.sleep(0.01)
    wire.post(GENERATE, body)
    await wire.answer()

    assert [received.body for received in node.inferences] == [body, body]
    assert node.loads == 1


async def test_a_model_that_was_loaded_before_is_left_as_it_is(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """Somebody loaded it with a length of their own; nobody's request takes it away."""
    node = await fake_nodes()
    node.load("llama3", 12_345)
    gateway = await gateways(node)
    wire = await dial(gateway.port)
    for body in (ASKED, with_context(4096), with_context(12_000)):
        wire.post(GENERATE, body)
        assert (await wire.answer()).status == 200

    assert node.loads == 1
    assert node.loaded == {"llama3:latest": 12_345}


async def test_a_length_that_could_not_be_loaded_is_asked_of_nobody_else(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """One client that asks for more than fits must not make every other request fail."""
    node = await fake_nodes()
    node.script.append(Fault.status(500))
    gateway = await gateways(node, health=SELDOM)
    wire = await dial(gateway.port)
    wire.post(GENERATE, with_context(131_072))
    assert (await wire.answer()).status == 502
    wire.post(GENERATE, ASKED)
    await wire.answer()

    assert "options" not in node.inferences[1].json
