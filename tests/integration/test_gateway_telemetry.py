"""What the gateway tells of known traffic: numbers that add up, labels that clients cannot choose, a line for each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sutazai.core.node import NodeKind
from sutazai.settings.model import Logs, NodeSettings, Retry
from sutazai.testing import Answer, FakeNode, Fault

if TYPE_CHECKING:
    from tests.conftest import Dial, StartGateway, StartNode, Wire

CHAT = "/v1/chat/completions"
ASKED = {"model": "llama3", "messages": [{"role": "user", "content": "one two three"}]}


def named(node: FakeNode, name: str = "a") -> NodeSettings:
    return NodeSettings(url=node.url, kind=node.kind.value, name=name)


LABELS = ("node", "gen_ai_request_model", "status", "gen_ai_token_type", "kind")


async def counted(wire: Wire, name: str) -> dict[tuple[str, ...], float]:
    """The samples of one metric by the values of their labels, in the order of `LABELS`."""
    wire.get("/metrics")
    page = (await wire.answer()).body.decode()
    return {
        tuple(sample.labels[label] for label in LABELS if label in sample.labels): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name
    }


@pytest.mark.parametrize("kind", NodeKind)
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_the_counts_of_known_traffic_add_up(
    kind: NodeKind, stream: bool, gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(kind)
    node.default = Answer(tokens=("a", "b", "c", "d"), prompt_tokens=7)
    gateway = await gateways(named(node))
    wire = await dial(gateway.port)
    asked = ASKED | {"stream": stream, "stream_options": {"include_usage": True} if stream else None}
    for _ in range(20):
        wire.post(CHAT, asked)
        assert (await wire.answer()).status == 200

    assert await counted(wire, "sutazai_requests_total") == {("a", "llama3", "200"): 20}
    assert await counted(wire, "gen_ai_server_token_usage_total") == {
        ("a", "llama3", "input"): 140,
        ("a", "llama3", "output"): 80,
    }
    for name in ("time_to_first_token", "request_duration"):
        assert await counted(wire, f"gen_ai_server_{name}_seconds_count") == {("a", "llama3"): 20}
    assert await wire.gauge("sutazai_in_flight") == 0


async def test_a_stream_that_tells_no_usage_is_counted_by_its_pieces(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    node.default = Answer(tokens=("a", "b", "c"), between_s=0.01, tells_usage=False)
    gateway = await gateways(named(node))
    wire = await dial(gateway.port)
    wire.post(CHAT, ASKED | {"stream": True})
    await wire.answer()
    tokens = await counted(wire, "gen_ai_server_token_usage_total")

    assert 3 <= tokens["a", "llama3", "output"] <= 7


async def test_failures_are_counted_by_what_the_client_got_and_by_what_the_node_did(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    gateway = await gateways(named(node), retry=Retry(attempts=1))
    wire = await dial(gateway.port)
    for fault in (Fault.status(503), Fault.status(503), Fault.status(400), Fault.truncate(1)):
        node.script.append(fault)
        wire.post(CHAT, ASKED)
        await wire.answer()
    requests = await counted(wire, "sutazai_requests_total")
    faults = await counted(wire, "sutazai_node_faults_total")

    assert {labels[2]: count for labels, count in requests.items()} == {"503": 2, "400": 1, "502": 1}
    assert faults == {("a", "NodeRejected"): 3, ("a", "NodeUnreachable"): 1}


async def test_a_client_that_leaves_is_counted_as_gone(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    node.default = Fault.stall_mid_stream(1)
    gateway = await gateways(named(node))
    leaving, wire = await dial(gateway.port), await dial(gateway.port)
    leaving.post(CHAT, ASKED | {"stream": True})
    await leaving.head()
    leaving.writer.close()
    await node.wait_idle()

    assert await counted(wire, "sutazai_requests_total") == {("a", "llama3", "499"): 1}


async def test_names_that_clients_make_up_never_become_labels(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    gateway = await gateways(named(await fake_nodes(NodeKind.OPENAI)))
    wire = await dial(gateway.port)
    for number in range(50):
        wire.post(CHAT, ASKED | {"model": f"made-up-{number}"})
        assert (await wire.answer()).status == 404
    wire.get("/metrics")
    page = (await wire.answer()).body

    assert b"made-up" not in page
    assert await counted(wire, "sutazai_requests_total") == {("", "", "404"): 50}


async def test_nodes_and_the_line_are_told_as_they_are_now(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    node.default = Fault.stall_before_head()
    gateway = await gateways(NodeSettings(url=node.url, kind="openai", name="a", slots=2))
    wire = await dial(gateway.port)
    for _ in range(5):
        (await dial(gateway.port)).post(CHAT, ASKED)
    while await wire.gauge("sutazai_in_flight") < 5:
        pass

    assert await counted(wire, "sutazai_node_in_flight") == {("a",): 3}
    assert await counted(wire, "sutazai_node_slots") == {("a",): 2}
    assert await counted(wire, "sutazai_node_up") == {("a",): 1}
    assert await wire.gauge("sutazai_waiting") == 2


async def test_every_request_has_its_line_with_the_id_that_its_client_got(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, capsys: pytest.CaptureFixture[str]
) -> None:
    node = await fake_nodes()
    gateway = await gateways(named(node), logs=Logs(access=True, format="json"))
    wire = await dial(gateway.port)
    told: dict[str, int] = {}
    for path, body in (
        ("/api/generate", {"model": "llama3", "prompt": "hi", "stream": False}),
        (CHAT, ASKED | {"stream": True}),
        (CHAT, ASKED | {"model": "nobody-has-this"}),
        (CHAT, b"{not json"),
    ):
        wire.post(path, body)
        answer = await wire.answer()
        told[answer.headers["x-request-id"]] = answer.status
    lines: list[dict[str, object]] = []
    while len(lines) < 4:
        wire.get("/healthz")
        await wire.answer()
        lines += [json.loads(line) for line in capsys.readouterr().err.splitlines() if '"event":"request"' in line]

    assert {str(line["request_id"]): line["status"] for line in lines} == told
    assert [line.get("model") for line in lines] == ["llama3", "llama3", "nobody-has-this", None]
    assert [line.get("node") for line in lines] == ["a", "a", None, None]
    assert [bool(line.get("error")) for line in lines] == [False, False, True, True]
