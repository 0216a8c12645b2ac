"""The gateway as an HTTP/1.1 server: framing, pipelining, keep-alive."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.conftest import Dial, StartGateway, StartNode


async def test_smoke(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    gateway = await gateways(await fake_nodes())
    wire = await dial(gateway.port)
    wire.post("/api/generate", {"model": "llama3", "prompt": "hi", "stream": False})
    answer = await wire.answer()

    assert answer.status == 200
    assert answer.json["response"] == "Hello"
