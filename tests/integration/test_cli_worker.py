"""`sutazai worker` in a process of its own, beside a gateway."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from tests.conftest import Dial, StartGateway, StartNode
from tests.redis_servers import eventually

from sutazai.core.node import NodeKind
from sutazai.testing.node import FakeNode
from sutazai.testing.script import Answer

START_S = 20.0


async def started(config: Path) -> asyncio.subprocess.Process:
    """A worker that takes tasks."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sutazai", "worker", "--config", str(config), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    async with asyncio.timeout(START_S):
        line = b""
        while b"takes tasks" not in line:
            line = await process.stderr.readline()
            assert line, "the worker did not start"
    return process


async def test_a_worker_does_a_task_through_the_gateway_and_ends_when_asked(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, data_dir: Path, tmp_path: Path
) -> None:
    node: FakeNode = await fake_nodes(NodeKind.OPENAI, ("m",))
    node.script.append(Answer(tokens=("Good ", "day.")))
    gateway = await gateways(node)
    config = tmp_path / "sutazai.toml"
    config.write_text(
        f'discovery.ollama = false\ndatabase.data_dir = "{data_dir}"\nserver.port = {gateway.port}\n'
        'logs.format = "json"\nlogs.level = "error"\n'
    )
    worker = await started(config)
    wire = await dial(gateway.port)
    try:
        wire.post("/v1/tasks", {"agent": "chat", "input": {"messages": [{"role": "user", "content": "hello"}]}})
        task = (await wire.answer()).json

        async def has_ended() -> bool:
            wire.get(f"/v1/tasks/{task['id']}")
            task.update((await wire.answer()).json)
            return task["ended_at"] is not None

        await eventually(has_ended)
        worker.send_signal(signal.SIGTERM)
        async with asyncio.timeout(START_S):
            code = await worker.wait()
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()

    assert task["status"] == "completed"
    assert "Good day." in str(task["result"])
    assert task["tokens"] > 0
    assert code == 0
