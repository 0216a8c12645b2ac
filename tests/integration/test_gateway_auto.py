"""`model: "auto"` and fallback chains, over HTTP and real nodes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from sutazai.core.node import NodeKind
from sutazai.settings.model import Auto, AutoRule, Breaker, ModelSettings, Retry
from sutazai.testing import Fault

if TYPE_CHECKING:
    from tests.conftest import Dial, StartGateway, StartNode

CHAT = "/v1/chat/completions"
AUTO = Auto(simple_queries=("small",), complex_analysis=("large", "small"), code_generation=("coder", "large"))
QUICK = Retry(attempts=1)


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": text}], **more}


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("What is the capital of Chile?", "small"),
        ("Compare both treaties and weigh the evidence for each of them in detail.", "large"),
        ("Write a Python function that reverses a string.", "coder"),
    ],
)
async def test_each_kind_of_request_goes_to_its_model(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, text: str, model: str
) -> None:
    node = await fake_nodes(NodeKind.OLLAMA, ("small", "large", "coder"))
    gateway = await gateways(node, auto=AUTO)
    wire = await dial(gateway.port)

    for path, asked in ((CHAT, chat(text)), ("/api/chat", chat(text, stream=False))):
        wire.post(path, asked)
        answer = await wire.answer()

        assert answer.status == 200
        assert answer.headers["x-sutazai-model"] == model
        assert answer.headers["x-sutazai-reason"].split(":")[0] in {
            "simple_queries",
            "complex_analysis",
            "code_generation",
        }
        assert answer.json["model"].removesuffix(":latest") == model


async def test_a_stream_is_answered_by_the_chosen_model_too(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.LLAMACPP, ("small", "coder"))
    gateway = await gateways(node, auto=AUTO)
    wire = await dial(gateway.port)

    wire.post(CHAT, chat("Implement quicksort in Rust.", stream=True))
    answer = await wire.answer()

    assert answer.headers["x-sutazai-model"] == "coder"
    assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_a_broken_model_is_left_for_the_next_of_the_chain(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    broken, sound = await fake_nodes(NodeKind.OPENAI, ("coder",)), await fake_nodes(NodeKind.OPENAI, ("large",))
    broken.default = Fault.status(500)
    gateway = await gateways(broken, sound, auto=AUTO, retry=QUICK, breaker=Breaker(minimum_requests=100))
    wire = await dial(gateway.port)

    wire.post(CHAT, chat("Write a bash script that renames files."))
    answer = await wire.answer()

    assert answer.status == 200
    assert answer.headers["x-sutazai-model"] == "large"
    assert "coder failed" in answer.headers["x-sutazai-reason"]


async def test_a_named_model_falls_back_where_the_settings_say_so(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.OPENAI, ("small",))
    gateway = await gateways(node, models={"large": ModelSettings(fallback=("small",))})
    wire = await dial(gateway.port)

    wire.post(CHAT, chat("hi") | {"model": "large"})
    answer = await wire.answer()

    assert (answer.status, answer.headers["x-sutazai-model"]) == (200, "small")


async def test_a_rule_of_the_settings_decides_first(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    node = await fake_nodes(NodeKind.OPENAI, ("small", "large"))
    rule = AutoRule(contains="capital", kind="complex_analysis")
    gateway = await gateways(node, auto=Auto(simple_queries=("small",), complex_analysis=("large",), rules=(rule,)))
    wire = await dial(gateway.port)

    wire.post(CHAT, chat("What is the capital of Chile?"))

    assert (await wire.answer()).headers["x-sutazai-model"] == "large"


async def test_the_list_of_models_names_auto_only_where_it_can_come_to_something(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.OPENAI, ("small",))
    with_it, without = await gateways(node, auto=AUTO), await gateways(node)

    async def listed(port: int) -> list[str]:
        wire = await dial(port)
        wire.get("/v1/models")
        return [model["id"] for model in (await wire.answer()).json["data"]]

    assert await listed(with_it.port) == ["auto", "small"]
    assert await listed(without.port) == ["small"]


async def test_without_any_of_its_models_auto_names_the_settings(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    gateway = await gateways(await fake_nodes(NodeKind.OPENAI, ("other",)))
    wire = await dial(gateway.port)

    wire.post(CHAT, chat("hi"))
    answer = await wire.answer()

    assert answer.status == 400
    assert "[auto]" in answer.json["error"]["message"]


async def test_usage_is_counted_for_the_model_that_answered(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    gateway = await gateways(await fake_nodes(NodeKind.OPENAI, ("small",)), auto=AUTO)
    wire = await dial(gateway.port)

    wire.post(CHAT, chat("hi"))
    await wire.answer()
    async with asyncio.timeout(5):
        wire.get("/metrics")
        page = (await wire.answer()).body.decode()

    assert 'model="small"' in page
    assert 'model="auto"' not in page
