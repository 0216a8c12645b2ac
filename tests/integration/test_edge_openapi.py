"""The gateway does what its own description says, whatever is sent to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import uvloop
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from sutazai.bootstrap import open_gateway
from sutazai.core.node import NodeKind
from sutazai.edge.openapi import document
from sutazai.settings.model import Discovery, Logs, NodeSettings, Server, Settings
from sutazai.testing import FakeNode
from sutazai.testing.plain_agents import plain_agents

KNOWN = ("llama3", "qwen3", "phi4")
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    allow_header_conformance,
    unsupported_method,
]
START_S = 20.0
CALL_S = 10.0
described = schemathesis.openapi.from_dict(document())


@pytest.fixture(scope="module")
def base_url(data_dir: Path) -> Iterator[str]:
    """A gateway with a node of each kind, on an event loop of its own: the caller of these tests blocks."""
    urls: list[str] = []
    started, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            kinds = zip(NodeKind, KNOWN, strict=True)
            nodes = [await stack.enter_async_context(FakeNode(kind, (name,), slots=64)) for kind, name in kinds]
            used = Settings(
                server=Server(port=0),
                nodes=tuple(NodeSettings(url=node.url, kind=node.kind.value) for node in nodes),
                discovery=Discovery(ollama=False),
                logs=Logs(access=False),
            )
            opened = await stack.enter_async_context(
                open_gateway(
                    used, data_dir=data_dir, settings_path=None, environ={}, with_engine=False, agents=plain_agents()
                )
            )
            urls.append(f"http://127.0.0.1:{opened.port}")
            started.set()
            await stop.wait()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        thread = threading.Thread(target=lambda: runner.run(serve()), name="gateway")
        thread.start()
        assert started.wait(START_S)
        yield urls[0]
        runner.get_loop().call_soon_threadsafe(stop.set)
        thread.join(START_S)


@described.parametrize()
@settings(
    deadline=None,
    max_examples=100,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@pytest.mark.deadline(90)
def test_every_address_does_as_described(case: Any, base_url: str) -> None:
    _name_a_known_model(case)
    case.call_and_validate(base_url=base_url, checks=CHECKS, timeout=CALL_S)


def _name_a_known_model(case: Any) -> None:
    """Every other request is for a model or an agent that is there, so that answers are seen too."""
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("model"), str) and case.path != "/api/delete":
        size = len(body["model"])
        if size % 2:
            body["model"] = KNOWN[size % 3]
    if isinstance(body, dict) and isinstance(body.get("agent"), str) and len(body["agent"]) % 2:
        body["agent"] = "anything"
