"""A batch job goes on where it was when its workers are killed."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import msgspec
import openai
import pytest

from sutazai.core.node import NodeKind
from sutazai.settings.model import Objects
from sutazai.testing import Answer

if TYPE_CHECKING:
    from pathlib import Path

    from openai.types import Batch
    from tests.conftest import StartGateway, StartNode

LINES = 200
KILLED_AT = (20, 110)
"""Lines that the node was asked when the worker of then is killed."""
LOOK_S = 0.05
UNDER_WAY = 64
"""At most so many lines of one worker were asked and not kept: four chunks, four lines each under way, and as many
that wait for their checkpoint, with some room."""

pytestmark = pytest.mark.deadline(120)


def line(number: int) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": f"line {number}"}]}
    form = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
    return msgspec.json.encode(form)


async def started(stack: AsyncExitStack, config: Path) -> asyncio.subprocess.Process:
    """`sutazai worker`, killed at the latest with the stack."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sutazai", "worker", "--config", str(config), stderr=asyncio.subprocess.DEVNULL
    )
    stack.push_async_callback(killed, process)
    return process


async def killed(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


async def ended(client: openai.AsyncOpenAI, batch: Batch) -> Batch:
    while batch.status in {"validating", "in_progress", "finalizing"}:
        await asyncio.sleep(LOOK_S)
        batch = await client.batches.retrieve(batch.id)
    return batch


async def test_every_line_is_answered_once_though_workers_are_killed(
    gateways: StartGateway, fake_nodes: StartNode, data_dir: Path, tmp_path: Path
) -> None:
    node = await fake_nodes(NodeKind.OPENAI, ("m",), slots=16)
    node.default = Answer(first_token_s=0.05)
    gateway = await gateways(node, objects=Objects(url=str(tmp_path / "objects")))
    config = tmp_path / "worker.toml"
    config.write_text(
        f'server.port = {gateway.port}\ndiscovery.ollama = false\ndatabase.data_dir = "{data_dir}"\n'
        f'objects.url = "{tmp_path / "objects"}"\n'
    )
    async with AsyncExitStack() as stack:
        url = f"http://127.0.0.1:{gateway.port}/v1"
        client = await stack.enter_async_context(openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0))
        file = await client.files.create(file=("lines.jsonl", b"\n".join(map(line, range(LINES)))), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        for asked in KILLED_AT:
            worker = await started(stack, config)
            while len(node.inferences) < asked:
                await asyncio.sleep(LOOK_S)
            await killed(worker)
        await started(stack, config)

        batch = await ended(client, batch)

        assert (batch.status, batch.error_file_id) == ("completed", None)
        output = (await client.files.content(batch.output_file_id or "")).content
        told: list[Any] = [msgspec.json.decode(one) for one in output.splitlines()]
        assert [one["custom_id"] for one in told] == [str(number) for number in range(LINES)]
        assert LINES <= len(node.inferences) <= LINES + len(KILLED_AT) * UNDER_WAY
