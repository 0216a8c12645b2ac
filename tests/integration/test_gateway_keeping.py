"""Models on all nodes at once: fetched with one progress, removed, given a second name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from sutazai.core.node import NodeKind
from sutazai.settings.model import HealthSettings, NodeSettings
from sutazai.testing import FakeNode, Fault, Received

if TYPE_CHECKING:
    from tests.conftest import Dial, StartGateway, StartNode, Wire

SELDOM = HealthSettings(interval_s=60.0)


def named(nodes: Sequence[FakeNode]) -> list[NodeSettings]:
    return [
        NodeSettings(url=node.url, kind=node.kind.value, name=name) for name, node in zip("abcdef", nodes, strict=False)
    ]


async def pulled(wire: Wire, model: str) -> list[dict[str, Any]]:
    """The progress of a pull, to its end."""
    wire.post("/api/pull", {"model": model})
    answer = await wire.answer()
    assert answer.status == 200
    return [msgspec.json.decode(line) for line in answer.body.splitlines()]


def remove(wire: Wire, model: str) -> None:
    body = msgspec.json.encode({"model": model})
    wire.send(b"DELETE /api/delete HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def pulls(node: FakeNode) -> list[Received]:
    return [seen for seen in node.requests if seen.path == "/api/pull"]


async def test_a_pull_fetches_on_every_node_with_one_progress(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    nodes = [await fake_nodes(pull_s=0.05 * number) for number in range(3)]
    gateway = await gateways(*named(nodes), health=SELDOM)
    wire = await dial(gateway.port)
    records = await pulled(wire, "qwen3")

    assert records[-1] == {"status": "success"}
    assert all("qwen3:latest" in node.models for node in nodes)
    layers = [record for record in records if "digest" in record]
    complete = {record["digest"]: record for record in layers}
    assert complete
    assert all(record["completed"] == record["total"] for record in complete.values())
    assert all(record["completed"] <= record["total"] for record in layers)
    assert set(records[-2]["nodes"]) == {"a", "b", "c"}


async def test_the_progress_of_a_layer_is_the_sum_of_all_nodes(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    one, three = [await fake_nodes()], [await fake_nodes() for _ in range(3)]
    totals = []
    for nodes in (one, three):
        gateway = await gateways(*named(nodes))
        records = await pulled(await dial(gateway.port), "qwen3")
        totals.append({record["digest"]: record["total"] for record in records if "digest" in record})

    assert totals[1] == {digest: 3 * total for digest, total in totals[0].items()}


async def test_a_node_that_cannot_fetch_is_named_and_the_others_finish(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    nodes = [await fake_nodes(), await fake_nodes(registry=["other"]), await fake_nodes(pull_s=0.1)]
    gateway = await gateways(*named(nodes))
    wire = await dial(gateway.port)
    records = await pulled(wire, "qwen3")

    assert records[-1] == {
        "error": "b: pull model manifest: file does not exist",
        "nodes": {"b": "pull model manifest: file does not exist"},
    }
    assert ["qwen3:latest" in node.models for node in nodes] == [True, False, True]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (Fault.nonsense_mid_stream(0), "not understood"),
        (Fault.unfinished(0), "stopped before the end"),
        (Fault.reset_mid_stream(0), "reset the connection"),
        (Fault.status(500), "this fault was asked for"),
    ],
    ids=["nonsense", "unfinished", "reset", "500"],
)
async def test_a_pull_that_breaks_on_one_node_ends_all_the_same(
    fault: Fault, why: str, gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    nodes = [await fake_nodes(), await fake_nodes()]
    gateway = await gateways(*named(nodes), health=SELDOM)
    nodes[1].probe_fault = fault
    records = await pulled(await dial(gateway.port), "qwen3")

    assert list(records[-1]["nodes"]) == ["b"]
    assert why in records[-1]["error"]


async def test_what_was_fetched_can_be_asked_for_at_once(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """And what was removed cannot, although the next probe is far."""
    node = await fake_nodes()
    gateway = await gateways(node, health=SELDOM)
    wire = await dial(gateway.port)
    await pulled(wire, "qwen3")
    wire.post("/api/generate", {"model": "qwen3", "prompt": "hi", "stream": False})
    assert (await wire.answer()).status == 200
    remove(wire, "qwen3")
    assert (await wire.answer()).status == 200
    wire.post("/api/generate", {"model": "qwen3", "prompt": "hi", "stream": False})

    assert (await wire.answer()).status == 404


async def test_a_client_that_leaves_stops_every_pull(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    nodes = [await fake_nodes(pull_s=60.0) for _ in range(3)]
    gateway = await gateways(*named(nodes))
    wire = await dial(gateway.port)
    wire.post("/api/pull", {"model": "qwen3"})
    await wire.head()
    await wire.chunk()
    async with asyncio.timeout(5.0):
        while not all(map(pulls, nodes)):
            await asyncio.sleep(0.01)
    wire.writer.close()
    async with asyncio.timeout(1.0):
        while not all(seen.aborted for node in nodes for seen in pulls(node)):
            await asyncio.sleep(0.01)

    assert all("qwen3:latest" not in node.models for node in nodes)


async def test_a_pull_without_a_stream_is_one_answer(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    gateway = await gateways(await fake_nodes(), await fake_nodes(registry=["other"]))
    wire = await dial(gateway.port)
    wire.post("/api/pull", {"model": "other", "stream": False})
    good = await wire.answer()
    wire.post("/api/pull", {"model": "qwen3", "stream": False})
    bad = await wire.answer()

    assert (good.status, good.json) == (200, {"status": "success"})
    assert bad.status == 502
    assert "file does not exist" in bad.json["error"]


async def test_a_model_is_removed_wherever_it_is(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    nodes = [await fake_nodes(models=("llama3", "qwen3")), await fake_nodes(), await fake_nodes(models=("qwen3",))]
    gateway = await gateways(*named(nodes))
    wire = await dial(gateway.port)
    remove(wire, "qwen3")

    assert (await wire.answer()).status == 200
    assert [node.models for node in nodes] == [("llama3:latest",), ("llama3:latest",), ()]
    assert not any(seen.path == "/api/delete" for seen in nodes[1].requests)


async def test_a_model_gets_its_second_name_wherever_it_is(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    nodes = [await fake_nodes(), await fake_nodes(models=("qwen3",))]
    gateway = await gateways(*named(nodes))
    wire = await dial(gateway.port)
    wire.post("/api/copy", {"source": "llama3", "destination": "gpt-4"})

    assert (await wire.answer()).status == 200
    assert [node.models for node in nodes] == [("llama3:latest", "gpt-4:latest"), ("qwen3:latest",)]


async def test_a_node_that_cannot_remove_is_named(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    nodes = [await fake_nodes(), await fake_nodes()]
    gateway = await gateways(*named(nodes), health=SELDOM)
    nodes[1].probe_fault = Fault.status(500, b'{"error":"the disk is read-only"}')
    wire = await dial(gateway.port)
    remove(wire, "llama3")
    answer = await wire.answer()

    assert answer.status == 502
    assert answer.json["error"] == "b: the disk is read-only"
    assert nodes[0].models == ()


async def test_unknown_models_are_not_removed(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    gateway = await gateways(await fake_nodes())
    wire = await dial(gateway.port)
    remove(wire, "lama3")
    answer = await wire.answer()

    assert answer.status == 404
    assert "llama3" in answer.json["error"]


async def test_a_pool_without_ollama_keeps_no_models_and_says_so(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    gateway = await gateways(await fake_nodes(NodeKind.OPENAI))
    wire = await dial(gateway.port)
    wire.post("/api/pull", {"model": "qwen3"})
    answer = await wire.answer()

    assert answer.status == 400
    assert "only Ollama nodes can fetch" in answer.json["error"]
