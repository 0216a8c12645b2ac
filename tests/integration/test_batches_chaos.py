"""Ten thousand lines are answered once each, whoever is killed meanwhile: gateways, workers and the broker."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import openai
import pytest
from openai.types import Batch
from tests.conftest import StartNode
from tests.postgres_databases import fresh_database
from tests.rabbit_servers import Rabbits, free_port

from sutazai.core.node import NodeKind
from sutazai.testing import FakeNode

LINES = 10_000
KILLED_EVERY = 1_000
"""Lines that the node was asked between two kills."""
LOOK_S = 0.05
START_S = 30.0
UNDER_WAY = 64
"""At most so many lines of one worker were asked and not kept when somebody died: see `test_batches_killed`."""

pytestmark = [pytest.mark.alone, pytest.mark.deadline(240)]


def line(number: int) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": f"line {number}"}]}
    form = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
    return msgspec.json.encode(form)


@dataclass(slots=True)
class Running:
    """A gateway or a worker in a process of its own."""

    role: str
    config: Path
    ready: bytes
    """What it writes once it works."""
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Once it works."""
        before = len(self.said())
        with self.log() as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "sutazai", self.role, "--config", str(self.config), stderr=log
            )
        async with asyncio.timeout(START_S):
            while self.ready not in self.said()[before:]:
                assert self.process.returncode is None, self.said().decode()
                await asyncio.sleep(LOOK_S)

    async def kill(self) -> None:
        """SIGKILL; nothing where it does not run."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def restart(self) -> None:
        """The same after SIGKILL."""
        await self.kill()
        await self.start()

    def log(self) -> BinaryIO:
        """Its standard error, all processes after one another."""
        return Path(f"{self.config}.{self.role}.log").open("ab")

    def said(self) -> bytes:
        """What is in there."""
        with suppress(FileNotFoundError):
            return Path(f"{self.config}.{self.role}.log").read_bytes()
        return b""


@dataclass(slots=True)
class Site:
    """Two gateways, each with a worker that asks models there."""

    gateways: list[Running]
    workers: list[Running]
    ports: list[int]


@pytest.fixture
async def node(fake_nodes: StartNode) -> FakeNode:
    return await fake_nodes(NodeKind.OPENAI, ("m",), slots=64)


@pytest.fixture
async def site(data_dir: Path, tmp_path: Path, node: FakeNode, rabbit_node: Rabbits) -> AsyncIterator[Site]:
    broker = rabbit_node.settings(prefix=uuid.uuid4().hex[:12])
    assert broker.url is not None
    made = Site([], [], [])
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(fresh_database(data_dir))
        for number in range(2):
            port, config = free_port(), tmp_path / f"{number}.toml"
            config.write_text(
                f'server.port = {port}\ndiscovery.ollama = false\nlogs.access = false\nlogs.level = "warning"\n'
                f'database.url = "{url}"\ndatabase.data_dir = "{tmp_path}"\nobjects.url = "{tmp_path / "objects"}"\n'
                f'rabbitmq.url = "{broker.url.reveal()}"\nrabbitmq.prefix = "{broker.prefix}"\nrabbitmq.replicas = 1\n'
                f'[[nodes]]\nurl = "{node.url}"\nkind = "openai"\n'
            )
            made.ports.append(port)
            made.gateways.append(Running("gateway", config, b"/v1, Ollama"))
            made.workers.append(Running("worker", config, b"takes tasks"))
        for one in (*made.gateways, *made.workers):
            stack.push_async_callback(one.kill)
            await one.start()
        yield made


async def found(client: openai.AsyncOpenAI, batch: Batch) -> Batch:
    """The batch job as it is by now, once the gateway and what is behind it are there."""
    while True:
        with suppress(openai.APIConnectionError, openai.InternalServerError):
            return await client.batches.retrieve(batch.id)
        await asyncio.sleep(LOOK_S)


async def test_ten_thousand_lines_live_through_the_death_of_everybody(
    site: Site, node: FakeNode, rabbit_node: Rabbits
) -> None:
    (broker,) = rabbit_node.nodes

    async def restart_broker() -> None:
        await asyncio.to_thread(broker.kill)
        await asyncio.to_thread(rabbit_node.restore)

    kills: list[Callable[[], Awaitable[None]]] = []
    for number in (0, 1, 0):
        kills += [site.workers[number].restart, site.gateways[number].restart, restart_broker]
    urls = [f"http://127.0.0.1:{port}/v1" for port in site.ports]
    async with AsyncExitStack() as stack:
        client, other = [
            await stack.enter_async_context(openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=3))
            for url in urls
        ]
        file = await client.files.create(file=("lines.jsonl", b"\n".join(map(line, range(LINES)))), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        for number, kill in enumerate(kills, 1):
            while len(node.inferences) < number * KILLED_EVERY:
                await asyncio.sleep(LOOK_S)
            await kill()
        while batch.status not in {"completed", "failed", "expired", "cancelled"}:
            await asyncio.sleep(LOOK_S)
            batch = await found(other, batch)

        assert (batch.status, batch.error_file_id, batch.errors) == ("completed", None, None)
        output = (await client.files.content(batch.output_file_id or "")).content
    told: list[Any] = [msgspec.json.decode(one) for one in output.splitlines()]
    assert [one["custom_id"] for one in told] == [str(number) for number in range(LINES)]
    assert len({one["id"] for one in told}) == LINES
    assert {one["response"]["status_code"] for one in told} == {200}
    again = len(node.inferences) - LINES
    sys.stdout.write(f"{again} lines were asked again after {len(kills)} kills.\n")
    assert 0 <= again <= len(kills) * UNDER_WAY
