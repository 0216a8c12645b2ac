"""OpenAI's own client for JavaScript, against pools of every kind of node."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from sutazai.core.node import NodeKind
from sutazai.settings.model import Objects, Timeouts
from sutazai.testing import Answer, ToolCall
from sutazai.testing.machine import vector

if TYPE_CHECKING:
    from tests.conftest import StartGateway, StartNode

SOURCE = Path(__file__).with_name("js")
INSTALL_S = 120
RUN_S = 20.0
WEATHER = ToolCall(name="weather", arguments={"city": "Oslo", "days": 2})


@pytest.fixture(scope="session")
def scripts() -> Path:
    """The scripts beside the packages of their lock file, which are fetched once for each state of that file."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        if os.environ.get("CI") == "true":
            pytest.fail("node and npm are missing")
        pytest.skip("needs node and npm")
    lock = (SOURCE / "package-lock.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "sutazai-tests" / f"js-{hashlib.sha256(lock).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)  # other workers wait for the one that fetches
        if not (folder / "complete").exists():
            _install(npm, folder)
        for source in SOURCE.glob("*.mjs"):
            (folder / source.name).write_bytes(source.read_bytes())
    return folder


def _install(npm: str, folder: Path) -> None:
    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(SOURCE / name, folder)
    done = subprocess.run(
        [npm, "ci", "--ignore-scripts"], cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, check=False
    )
    if done.returncode == 0:
        (folder / "complete").touch()
    elif os.environ.get("CI") == "true":
        pytest.fail(f"npm ci failed:\n{done.stderr[-2000:]}")
    else:
        pytest.skip("the packages of tests/e2e/js could not be fetched")


async def talked(script: Path, port: int, model: str) -> dict[str, Any]:
    """What the script saw of a gateway."""
    process = await asyncio.create_subprocess_exec(
        "node",
        str(script),
        f"http://127.0.0.1:{port}/v1",
        model,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(RUN_S):
        told, complaints = await process.communicate()
    assert process.returncode == 0, complaints.decode()
    return msgspec.json.decode(told, type=dict[str, Any])


@pytest.mark.deadline(150)
@pytest.mark.parametrize("kind", list(NodeKind))
async def test_the_client_for_javascript_gets_all_that_it_asks_for(
    scripts: Path, gateways: StartGateway, fake_nodes: StartNode, kind: NodeKind
) -> None:
    node = await fake_nodes(kind)
    node.default = lambda received: (
        Answer(tokens=(), tool_calls=(WEATHER,)) if received.json.get("tools") else Answer(first_token_s=0.5)
    )
    gateway = await gateways(node, timeouts=Timeouts(keep_alive_s=0.2))

    saw = await talked(scripts / "talk.mjs", gateway.port, "llama3")

    assert saw["chat"] == "Hello"
    assert saw["stream"] == ["Hel", "lo"]
    assert saw["usage"]["completion_tokens"] == 2
    assert saw["completion"] == "Hello"
    assert saw["embedding"] == pytest.approx(vector("one"), abs=1e-6)
    assert saw["tool"] == {"name": "weather", "arguments": dict(WEATHER.arguments)}
    assert saw["streamedTool"] == {"name": "weather", "arguments": dict(WEATHER.arguments)}
    assert [name.removesuffix(":latest") for name in saw["models"]] == ["llama3"]
    assert saw["unknown"]["status"] == 404
    assert saw["unknown"]["type"] == "NotFoundError"
    assert "is on no node" in saw["unknown"]["message"]


@pytest.mark.deadline(150)
async def test_the_client_for_javascript_has_a_file_of_lines_answered(
    scripts: Path, gateways: StartGateway, fake_nodes: StartNode, tmp_path: Path
) -> None:
    node = await fake_nodes(NodeKind.OPENAI, ("m",))
    gateway = await gateways(node, with_worker=True, objects=Objects(url=str(tmp_path)))

    saw = await talked(scripts / "batch.mjs", gateway.port, "m")

    assert saw["batch"]["metadata"] == {"job": "test"}
    assert saw["batch"]["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    (output,) = saw["output"]
    assert output["custom_id"] == "line-0"
    assert output["response"]["body"]["choices"][0]["message"]["content"] == "Hello"
    (error,) = saw["errors"]
    assert (error["custom_id"], error["response"]["status_code"]) == ("line-1", 404)
    (embeddings,) = saw["embeddings"]
    vectors = [one["embedding"] for one in embeddings["response"]["body"]["data"]]
    assert vectors == [pytest.approx(vector(text), abs=1e-6) for text in ("one", "two")]
    (wrong,) = saw["wrong"]
    assert (wrong["code"], wrong["line"], wrong["param"]) == ("invalid_request", 2, "body")
    assert saw["are_listed"]
