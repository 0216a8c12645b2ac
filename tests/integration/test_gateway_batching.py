"""Requests that share calls, through the whole gateway: over fake nodes, and on the real embedded engine."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from sutazai.core.node import NodeKind
from sutazai.settings.model import Batching, Cache, Engine, NodeSettings
from sutazai.testing import Answer, FakeNode, Fault
from sutazai.testing.machine import vector

if TYPE_CHECKING:
    from tests.conftest import Answered, Dial, StartGateway, StartNode, Wire

EMBEDDINGS, EMBED, COMPLETIONS = "/v1/embeddings", "/api/embed", "/v1/completions"
MODEL = "llama3"
TRIAL = "sutazai-trial"
NO_CACHE = Cache(enabled=False)
"""The same text may be asked again."""
has_engine = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None and os.environ.get("CI") != "true",
    reason="the wheel xllamacpp is not installed",
)


async def _all(dial: Dial, port: int, path: str, bodies: list[dict[str, object]]) -> list[Answered]:
    """The answers to all of these, asked at once."""
    wires = [await dial(port) for _ in bodies]
    for wire, body in zip(wires, bodies, strict=True):
        wire.post(path, {"model": MODEL} | body)
    return [await wire.answer() for wire in wires]


def _inputs(node: FakeNode, field: str = "input") -> list[list[object]]:
    """What each call to the node carried."""
    given = [msgspec.json.decode(received.body)[field] for received in node.inferences]
    return [one if isinstance(one, list) else [one] for one in given]


def _slow() -> Answer:
    return Answer(first_token_s=0.2)


@pytest.mark.parametrize("kind", [NodeKind.OPENAI, NodeKind.LLAMACPP, NodeKind.OLLAMA])
async def test_embeddings_that_are_asked_at_once_share_a_call_and_each_gets_its_own(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, kind: NodeKind
) -> None:
    node = await fake_nodes(kind)
    node.default = _slow()
    gateway = await gateways(node, cache=NO_CACHE)
    texts = [f"text {number}" for number in range(9)]

    got = await _all(dial, gateway.port, EMBEDDINGS, [{"input": text} for text in texts])

    found = [answer.json["data"] for answer in got]
    assert [[entry["index"] for entry in data] for data in found] == [[0]] * 9
    assert [data[0]["embedding"] for data in found] == [pytest.approx(vector(text)) for text in texts]
    assert [answer.json["usage"]["prompt_tokens"] for answer in got] == [2] * 9
    assert sorted(map(len, _inputs(node))) == [1, 8]
    assert any("one of 8 in a batch" in answer.headers["x-sutazai-reason"] for answer in got)


@pytest.mark.parametrize("kind", [NodeKind.OPENAI, NodeKind.OLLAMA])
async def test_an_ollama_client_shares_too(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, kind: NodeKind
) -> None:
    node = await fake_nodes(kind)
    node.default = _slow()
    gateway = await gateways(node, cache=NO_CACHE)
    asked: list[Any] = ["a", ["b", "c"], "d e"]

    got = await _all(dial, gateway.port, EMBED, [{"input": one} for one in asked])

    texts = [["a"], ["b", "c"], ["d e"]]
    assert [answer.json["embeddings"] for answer in got] == [
        [pytest.approx(vector(text)) for text in of_one] for of_one in texts
    ]
    assert len(_inputs(node)) == 2


async def test_completions_share_a_call_where_every_node_takes_lists(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    node.default = Answer(tokens=("hello", " there"), first_token_s=0.2)
    gateway = await gateways(node, cache=NO_CACHE)

    got = await _all(dial, gateway.port, COMPLETIONS, [{"prompt": text} for text in ("a", "b", "c")])

    assert [answer.json["choices"][0]["text"] for answer in got] == ["hello there"] * 3
    assert len({answer.json["id"] for answer in got}) == 3
    assert sorted(map(len, _inputs(node, "prompt"))) == [1, 2]


async def test_completions_are_asked_one_by_one_where_an_ollama_node_has_the_model(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.OLLAMA)
    node.default = _slow()
    gateway = await gateways(NodeSettings(url=node.url, kind="ollama", slots=8), cache=NO_CACHE)

    got = await _all(dial, gateway.port, COMPLETIONS, [{"prompt": text} for text in ("a", "b", "c")])

    assert [answer.status for answer in got] == [200, 200, 200]
    assert len(node.inferences) == 3


async def test_an_error_that_is_no_fault_of_an_input_is_everybodys_after_one_call(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    node.default = Fault.status(404)
    gateway = await gateways(node, cache=NO_CACHE)

    got = await _all(dial, gateway.port, EMBEDDINGS, [{"input": text} for text in "abcdef"])

    assert {answer.status for answer in got} == {404}
    assert len(node.inferences) <= 3


async def test_switched_off_nothing_is_shared(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    gateway = await gateways(node, cache=NO_CACHE, batching=Batching(max_requests=1))

    await _all(dial, gateway.port, EMBEDDINGS, [{"input": text} for text in "abcdef"])

    assert _inputs(node) == [[text] for text in "abcdef"]


async def test_one_that_leaves_a_shared_call_takes_nothing_from_the_others(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    node.default = Answer(first_token_s=0.15)
    gateway = await gateways(node, cache=NO_CACHE, batching=Batching(max_wait_s=0.01))
    first, *others = [await dial(gateway.port) for _ in range(4)]
    first.post(EMBEDDINGS, {"model": MODEL, "input": "first"})
    for number, wire in enumerate(others):
        wire.post(EMBEDDINGS, {"model": MODEL, "input": f"text {number}"})
    while len(node.inferences) < 2:
        await asyncio.sleep(0.005)
    others[0].writer.close()

    got = [(await wire.answer()).json["data"][0]["embedding"] for wire in others[1:]]

    assert got == [pytest.approx(vector(f"text {number}")) for number in (1, 2)]


# the real engine


async def _with_engine(gateways: StartGateway) -> int:
    engine = Engine(enabled="always", slots=2, context_tokens=512, threads=1)
    return (await gateways(with_engine=True, engine=engine, cache=NO_CACHE)).port


async def _asked(wire: Wire, path: str, **fields: object) -> Any:
    wire.post(path, {"model": TRIAL, **fields})
    return (await wire.answer()).json


async def test_a_deadline_holds_beside_callers_who_are_more_patient(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    node.default = Answer(first_token_s=3.0)
    gateway = await gateways(node, cache=NO_CACHE, batching=Batching(max_wait_s=0.02))
    first, patient, hurried = [await dial(gateway.port) for _ in range(3)]
    first.post(EMBEDDINGS, {"model": MODEL, "input": "first"})
    await asyncio.sleep(0.1)

    patient.post(EMBEDDINGS, {"model": MODEL, "input": "patient"})
    hurried.post(EMBEDDINGS, {"model": MODEL, "input": "hurried"}, "x-sutazai-deadline-s: 0.2")
    async with asyncio.timeout(2.0):
        told = await hurried.answer()

    assert told.status == 504
    assert "at the deadline of the request, 0.2 s after it came" in told.json["error"]["message"]
    assert (await patient.answer()).status == 200


@has_engine
@pytest.mark.deadline(120)
async def test_the_real_engine_gives_the_same_vectors_together_as_alone(gateways: StartGateway, dial: Dial) -> None:
    port = await _with_engine(gateways)
    texts = [" tiny trial model" * count for count in range(1, 25)]
    wire = await dial(port)
    alone = [(await _asked(wire, EMBEDDINGS, input=text))["data"][0]["embedding"] for text in texts]

    together = await _all(dial, port, EMBEDDINGS, [{"model": TRIAL, "input": text} for text in texts])

    reasons = [answer.headers["x-sutazai-reason"] for answer in together]
    assert sum("in a batch" in reason for reason in reasons) > len(texts) / 2
    for answer, same in zip(together, alone, strict=True):
        assert answer.json["data"][0]["embedding"] == pytest.approx(same, abs=1e-3)


@has_engine
@pytest.mark.deadline(120)
async def test_one_text_too_long_for_the_real_engine_spoils_nobody_else(gateways: StartGateway, dial: Dial) -> None:
    port = await _with_engine(gateways)
    texts = [f"tiny model {number}" for number in range(8)]
    texts[5] = "tiny " * 3000

    got = await _all(dial, port, EMBEDDINGS, [{"model": TRIAL, "input": text} for text in texts])

    assert [answer.status for answer in got] == [200] * 5 + [502] + [200] * 2
    assert "too large" in got[5].json["error"]["message"]


@has_engine
@pytest.mark.deadline(120)
async def test_completions_of_the_real_engine_come_apart_with_their_own_tokens(
    gateways: StartGateway, dial: Dial
) -> None:
    port = await _with_engine(gateways)
    prompts = ["Hello", "a tiny", "the gateway", "a queue and a"] * 2
    wire = await dial(port)
    settings: dict[str, object] = {"model": TRIAL, "max_tokens": 6, "temperature": 0}
    alone = [await _asked(wire, COMPLETIONS, prompt=prompt, **settings) for prompt in prompts]

    together = await _all(dial, port, COMPLETIONS, [settings | {"prompt": prompt} for prompt in prompts])

    assert any("in a batch" in answer.headers["x-sutazai-reason"] for answer in together)
    for answer, same in zip(together, alone, strict=True):
        assert answer.json["choices"][0]["text"] == same["choices"][0]["text"]
        assert answer.json["usage"]["prompt_tokens"] == same["usage"]["prompt_tokens"]
        assert answer.json["usage"]["completion_tokens"] == same["usage"]["completion_tokens"]
