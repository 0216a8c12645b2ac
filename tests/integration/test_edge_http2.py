"""HTTP/2 clients, through nginx as the documentation configures it: streams stay streams."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import msgspec
import pytest

from sutazai.settings.model import Server
from sutazai.testing import Answer

if TYPE_CHECKING:
    from tests.conftest import StartGateway, StartNode

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "behind-nginx-and-haproxy.md"
NAME = "ai.example.org"
READY_S = 10.0
PROGRAMS = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
CHAT = {"model": "llama3", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
StartNginx: TypeAlias = Callable[[int], Awaitable[str]]


def program(name: str) -> str:
    """The path of a program; skips where it is missing, in CI fails."""
    found = shutil.which(name, path=PROGRAMS)
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is missing")
        pytest.skip(f"needs {name}")
    return found


@pytest.fixture
async def certificate(tmp_path: Path) -> Path:
    """Signed by itself; the key lies beside it."""
    path = tmp_path / "cert.pem"
    names = ("-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}")
    made = await asyncio.create_subprocess_exec(
        program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-days", "1", "-keyout", str(path.with_suffix(".key")), "-out", str(path), *names,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert await made.wait() == 0
    return path


@pytest.fixture
async def nginx(certificate: Path, tmp_path: Path) -> AsyncIterator[StartNginx]:
    """A function that starts nginx, as the page says, before a gateway; gives the option of curl that leads there."""
    binary = program("nginx")
    running: list[asyncio.subprocess.Process] = []

    async def start(gateway: int) -> str:
        port = _free_port()
        config = tmp_path / "nginx.conf"
        config.write_text(_config(tmp_path, certificate, port=port, gateway=gateway))
        running.append(
            await asyncio.create_subprocess_exec(
                binary, "-e", "stderr", "-p", str(tmp_path), "-c", str(config), stderr=asyncio.subprocess.DEVNULL
            )
        )
        await _listens(port)
        return f"{NAME}:443:127.0.0.1:{port}"

    yield start
    for process in running:
        process.terminate()
        await process.wait()


def _config(folder: Path, certificate: Path, *, port: int, gateway: int) -> str:
    """The page's own example, with the addresses and files of this test."""
    [site] = re.findall(r"^```nginx\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    site = re.sub(r"ssl_certificate \S+;", f"ssl_certificate {certificate};", site)
    site = re.sub(r"ssl_certificate_key \S+;", f"ssl_certificate_key {certificate.with_suffix('.key')};", site)
    site = site.replace("listen 443 ", f"listen 127.0.0.1:{port} ").replace("127.0.0.1:10010", f"127.0.0.1:{gateway}")
    places = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    return (
        f"daemon off;\nmaster_process off;\npid {folder}/pid;\nevents {{}}\n"
        f"http {{\naccess_log off;\nclient_body_temp_path {folder}/body;\n{places}{site}}}\n"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _listens(port: int) -> None:
    async with asyncio.timeout(READY_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return


async def curl(leads_to: str, path: str, *options: str) -> asyncio.subprocess.Process:
    """curl over HTTP/2 alone, telling at its end the version that was spoken and the status."""
    return await asyncio.create_subprocess_exec(
        program("curl"), "--http2", "-sNk", "--connect-to", leads_to, "-w", "\n%{http_version} %{http_code}", *options,
        f"https://{NAME}{path}", stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def test_an_http2_client_gets_each_event_as_it_comes(
    gateways: StartGateway, fake_nodes: StartNode, nginx: StartNginx
) -> None:
    """The last token is half a second away when the first is read."""
    node = await fake_nodes()
    node.default = Answer(tokens=("one ", "two ", "three "), between_s=0.5)
    leads_to = await nginx((await gateways(node, server=Server(allowed_hosts=(NAME,)))).port)
    process = await curl(leads_to, "/v1/chat/completions", "-d", msgspec.json.encode(CHAT).decode())
    assert process.stdout is not None
    came_at: dict[bytes, float] = {}
    async for line in process.stdout:
        for word in (b"one", b"two", b"three", b"[DONE]"):
            if word in line:
                came_at.setdefault(word, time.monotonic())
        last = line

    assert last == b"2 200"
    assert came_at[b"two"] - came_at[b"one"] > 0.3
    assert came_at[b"three"] - came_at[b"two"] > 0.3
    assert await process.wait() == 0


async def test_an_http2_client_that_leaves_frees_the_node(
    gateways: StartGateway, fake_nodes: StartNode, nginx: StartNginx
) -> None:
    node = await fake_nodes()
    node.default = Answer(tokens=("one ", "two "), between_s=20.0)
    leads_to = await nginx((await gateways(node, server=Server(allowed_hosts=(NAME,)))).port)
    process = await curl(leads_to, "/v1/chat/completions", "-d", msgspec.json.encode(CHAT).decode())
    assert process.stdout is not None
    while b"one" not in await process.stdout.readline():
        pass
    process.kill()
    await process.wait()
    await node.until(lambda: node.inferences[0].aborted)

    assert node.in_flight == 0


async def test_many_http2_streams_share_a_connection(
    gateways: StartGateway, fake_nodes: StartNode, nginx: StartNginx
) -> None:
    """Thirty streams at once of one client; each is answered whole."""
    node = await fake_nodes(slots=64)
    node.default = Answer(tokens=("one ", "two "), first_token_s=0.2)
    leads_to = await nginx((await gateways(node, server=Server(allowed_hosts=(NAME,)))).port)
    body = msgspec.json.encode(CHAT).decode()
    others = [f"https://{NAME}/v1/chat/completions?{number}" for number in range(29)]
    process = await curl(leads_to, "/v1/chat/completions", "-Z", "--parallel-max", "30", "-d", body, *others)
    out, _ = await process.communicate()

    assert out.count(b"2 200") == 30
    assert out.count(b"data: [DONE]") == 30
    assert node.peak_in_flight > 1


async def test_an_answer_through_nginx_is_compressed_by_the_gateway(
    gateways: StartGateway, fake_nodes: StartNode, nginx: StartNginx
) -> None:
    leads_to = await nginx((await gateways(await fake_nodes(), server=Server(allowed_hosts=(NAME,)))).port)
    process = await curl(leads_to, "/openapi.json", "-i", "-H", "Accept-Encoding: br")
    out, _ = await process.communicate()

    assert out.endswith(b"2 200")
    assert b"content-encoding: br\r\n" in out
