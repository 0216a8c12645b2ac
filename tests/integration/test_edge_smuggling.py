"""
Requests that mean two things: one answer each, alone and behind the proxies that people put in front.

A proxy and a server that read the same bytes differently let a client slip a request past the proxy, or take the
answer to somebody else's. So whatever is odd is refused, the connection ends, and nothing of it reaches a node.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import pytest

from sutazai.settings.model import Server
from sutazai.testing import Answer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Dial, StartGateway, StartNode, Wire

    from sutazai.testing import FakeNode, Received

LIMITS = Server(head_timeout_s=0.4, body_timeout_s=0.4, keep_alive_s=0.4, max_head_bytes=8192, max_body_bytes=65536)
FRONTS = ("nginx", "haproxy")
StartProxy: TypeAlias = Callable[[str, int], Awaitable[int]]
READY_S = 10.0
ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Bytes that a client sends on a connection of its own; CASE in them becomes its number."""

    name: str
    sent: bytes
    is_refused: bool = True
    """False: it is odd but means one thing, so it gets its one answer."""


def body(word: str) -> bytes:
    return json.dumps({"model": "llama3", "prompt": f"{word} CASE", "stream": False}).encode()


def post(
    *headers: bytes, sent: bytes | None = None, target: bytes = b"/api/generate", version: bytes = b"1.1"
) -> bytes:
    lines = [b"POST %b HTTP/%b" % (target, version), b"Host: localhost", *headers, b"", b""]
    return b"\r\n".join(lines) + (CARRIER if sent is None else sent)


def in_chunks(data: bytes, *, end: bytes = b"0\r\n\r\n", extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data) + end


CARRIER = body("carrier")
SMUGGLED = post(b"Content-Length: %d" % (len(body("smuggled")) - 1), sent=body("smuggled"))
LENGTH = b"Content-Length: %d" % len(CARRIER)
BOTH = CARRIER + SMUGGLED
CHUNKED = b"Transfer-Encoding: chunked"
HIDDEN = in_chunks(CARRIER) + SMUGGLED
"""For one reader of a length all of it is a body, for one of chunks there is a second request."""

SHAPES = [
    Shape("length and chunks", post(b"Content-Length: %d" % len(HIDDEN), CHUNKED, sent=HIDDEN)),
    Shape("chunks and length", post(CHUNKED, b"Content-Length: 4", sent=in_chunks(BOTH))),
    Shape(
        "two codings", post(CHUNKED, b"Transfer-Encoding: xchunked", b"Content-Length: %d" % len(HIDDEN), sent=HIDDEN)
    ),
    Shape("two codings in one line", post(b"Transfer-Encoding: chunked, identity", sent=HIDDEN)),
    Shape("identity then chunked", post(b"Transfer-Encoding: identity, chunked", sent=HIDDEN)),
    Shape("chunked twice", post(b"Transfer-Encoding: chunked, chunked", sent=HIDDEN)),
    Shape("chunked in two lines", post(CHUNKED, CHUNKED, sent=HIDDEN)),
    Shape("gzip then chunked", post(b"Transfer-Encoding: gzip, chunked", sent=HIDDEN)),
    Shape("unknown coding", post(b"Transfer-Encoding: xchunked", sent=HIDDEN)),
    Shape("quoted coding", post(b'Transfer-Encoding: "chunked"', sent=HIDDEN)),
    Shape("empty coding", post(b"Transfer-Encoding:", LENGTH, sent=BOTH)),
    Shape("coding after a vertical tab", post(b"Transfer-Encoding: \x0bchunked", LENGTH, sent=HIDDEN)),
    Shape("space before the colon of the coding", post(b"Transfer-Encoding : chunked", LENGTH, sent=HIDDEN)),
    Shape("tab before the colon of the coding", post(b"Transfer-Encoding\t: chunked", LENGTH, sent=HIDDEN)),
    Shape("folded coding", post(b"Transfer-Encoding:\r\n chunked", LENGTH, sent=HIDDEN)),
    Shape("folded header", post(b"X-One: a\r\n b", LENGTH)),
    Shape(
        "folded first header", b"POST /api/generate HTTP/1.1\r\n X: y\r\nHost: a\r\n" + LENGTH + b"\r\n\r\n" + CARRIER
    ),
    Shape("coding with an underscore", post(b"Transfer_Encoding: chunked", LENGTH), is_refused=False),
    Shape("tab before the coding", post(b"Transfer-Encoding:\tchunked", sent=in_chunks(CARRIER)), is_refused=False),
    Shape("coding in capitals", post(b"TRANSFER-ENCODING: CHUNKED", sent=in_chunks(CARRIER)), is_refused=False),
    Shape("two lengths", post(LENGTH, b"Content-Length: %d" % len(BOTH), sent=BOTH)),
    Shape("one length twice", post(LENGTH, LENGTH, sent=CARRIER)),
    Shape("two lengths in one line", post(b"Content-Length: %d, %d" % (len(CARRIER), len(CARRIER)))),
    Shape("length with a plus", post(b"Content-Length: +%d" % len(CARRIER))),
    Shape("length with a minus", post(b"Content-Length: -1")),
    Shape("length in hexadecimal", post(b"Content-Length: 0x%x" % len(CARRIER))),
    Shape("length with a space in it", post(b"Content-Length: %d 5" % len(CARRIER))),
    Shape("length with an underscore", post(b"Content-Length: 1_0")),
    Shape("length with a point", post(b"Content-Length: %d.0" % len(CARRIER))),
    Shape("length in other digits", post("Content-Length: \u0665\u0660".encode())),
    Shape("empty length", post(b"Content-Length:")),
    Shape("length past 64 bits", post(b"Content-Length: 18446744073709551617")),
    Shape("length of two gigabytes", post(b"Content-Length: 2147483648")),
    Shape("length with much space", post(b"Content-Length:   %d  " % len(CARRIER)), is_refused=False),
    Shape("bare line feeds", post(LENGTH).replace(b"\r\n", b"\n")),
    Shape("bare line feed in the head", post(b"X: a\nY: b", LENGTH)),
    Shape("bare line feeds at the end", post(LENGTH + b"\n\n", sent=BOTH)),
    Shape("bare carriage return in the head", post(b"X: a\rTransfer-Encoding: chunked", LENGTH)),
    Shape("bare carriage return at the end", post(LENGTH + b"\r\r\n", sent=BOTH)),
    Shape("NUL in a value", post(b"X: a\x00b", LENGTH)),
    Shape("NUL in a name", post(b"X\x00: a", LENGTH)),
    Shape("control character in a value", post(b"X: a\x01b", LENGTH)),
    Shape("space in a name", post(b"X Y: a", LENGTH)),
    Shape("empty name", post(b": a", LENGTH)),
    Shape("header without a colon", post(b"Transfer-Encoding", LENGTH)),
    Shape("brackets in a name", post(b"Content-Length[0]: 5", LENGTH)),
    Shape("line feed in an extension", post(CHUNKED, sent=in_chunks(CARRIER, extension=b";a\nb"))),
    Shape("carriage return in an extension", post(CHUNKED, sent=in_chunks(CARRIER, extension=b";a\rb"))),
    Shape("chunk ended by a line feed", post(CHUNKED, sent=b"%x\n%b\n0\n\n" % (len(CARRIER), CARRIER))),
    Shape("huge chunk", post(CHUNKED, sent=b"7fffffff\r\n" + CARRIER)),
    Shape("chunk past 64 bits", post(CHUNKED, sent=b"10000000000000005\r\n" + CARRIER + b"\r\n0\r\n\r\n")),
    Shape("negative chunk", post(CHUNKED, sent=b"-%x\r\n" % len(CARRIER) + CARRIER + b"\r\n0\r\n\r\n")),
    Shape("chunk with 0x", post(CHUNKED, sent=b"0x%x\r\n" % len(CARRIER) + CARRIER + b"\r\n0\r\n\r\n")),
    Shape("space before a chunk", post(CHUNKED, sent=b" " + in_chunks(CARRIER))),
    Shape("chunk that is too short", post(CHUNKED, sent=b"5\r\n" + CARRIER + b"\r\n0\r\n\r\n")),
    Shape("no last line", post(CHUNKED, sent=in_chunks(CARRIER, end=b"0\r\n"))),
    Shape("an extension", post(CHUNKED, sent=in_chunks(CARRIER, extension=b";a=b")), is_refused=False),
    Shape("a chunk with zeros before it", post(CHUNKED, sent=b"00" + in_chunks(CARRIER)), is_refused=False),
    Shape(
        "trailers that would decide",
        post(CHUNKED, sent=in_chunks(CARRIER, end=b"0\r\nHost: evil.example\r\nAuthorization: Bearer x\r\n\r\n")),
        is_refused=False,
    ),
    Shape(
        "trailers that would frame",
        post(CHUNKED, sent=in_chunks(CARRIER, end=b"0\r\nX: y\r\nX: z\r\n\r\n")),
        is_refused=False,
    ),
    Shape("coding in HTTP/1.0", post(CHUNKED, b"Content-Length: %d" % len(HIDDEN), sent=HIDDEN, version=b"1.0")),
    Shape("chunks in HTTP/1.0", post(CHUNKED, sent=HIDDEN, version=b"1.0")),
    Shape("HTTP/1.2", post(LENGTH, version=b"1.2")),
    Shape("HTTP/2.0 in words", post(LENGTH, version=b"2.0")),
    Shape("HTTP/1.1 with a zero", post(LENGTH, version=b"01.1")),
    Shape("another protocol", post(LENGTH).replace(b"HTTP/1.1", b"HTCPCP/1.1", 1)),
    Shape("preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)),
    Shape("HTTP/0.9", b"GET /api/tags\r\n"),
    Shape("a handshake of TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)),
    Shape("two hosts", post(b"Host: other", LENGTH)),
    Shape("one host twice", post(b"Host: localhost", LENGTH)),
    Shape("no host", post(LENGTH).replace(b"Host: localhost\r\n", b"")),
    Shape("foreign host", post(LENGTH).replace(b"Host: localhost", b"Host: evil.example")),
    Shape("absolute address", post(LENGTH, target=b"http://localhost/api/generate")),
    Shape("tunnel", b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n" + SMUGGLED),
    Shape("asterisk", b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    Shape("unknown method", post(LENGTH).replace(b"POST", b"SMUGGLE", 1)),
    Shape("method in small letters", post(LENGTH).replace(b"POST", b"post", 1)),
    Shape("fragment", post(LENGTH, target=b"/api/generate#x")),
    Shape("NUL in the address", post(LENGTH, target=b"/api/gene\x00rate")),
    Shape("control character in the address", post(LENGTH, target=b"/api/generate\x7f")),
    Shape("other bytes in the address", post(LENGTH, target=b"/api/generate\xff")),
    Shape("space in the address", post(LENGTH, target=b"/api/generate /")),
    Shape("tab before the version", post(LENGTH, target=b"/api/generate\t")),
    Shape("address that climbs", post(LENGTH, target=b"/x/../api/generate")),
    Shape("address with encoded dots", post(LENGTH, target=b"/x/%2e%2e/api/generate")),
    Shape("two slashes", post(LENGTH, target=b"//api/generate")),
    Shape("long address", post(LENGTH, target=b"/" + b"x" * 9000)),
    Shape("too many headers", post(*(b"X-%d: a" % number for number in range(101)), LENGTH)),
    Shape("large header", post(b"X: " + b"x" * 9000, LENGTH)),
    Shape("endless header", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 65536),
    Shape("many small headers", post(*(b"X-%d: %b" % (number, b"x" * 100) for number in range(99)), LENGTH)),
    Shape("large body", post(b"Content-Length: 70000", sent=b" " * 70000)),
    Shape("large body in chunks", post(CHUNKED, sent=b"1000\r\n" * 20 + in_chunks(b" " * 70000))),
    Shape("upgrade to HTTP/2", post(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", LENGTH, sent=BOTH)),
    Shape("upgrade to a web socket", post(b"Connection: upgrade", b"Upgrade: websocket", LENGTH, sent=BOTH)),
    Shape("upgrade that nobody asks for", post(b"Upgrade: websocket", LENGTH), is_refused=False),
    Shape("an expectation of another kind", post(b"Expect: 200-ok", LENGTH)),
    Shape("gzip", post(b"Content-Encoding: gzip", LENGTH)),
    Shape("body of another method", post(LENGTH).replace(b"POST", b"GET", 1)),
    Shape("head that never ends", b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n"),
    Shape("body that never ends", post(b"Content-Length: %d" % (len(CARRIER) + 1))),
]


@pytest.fixture
async def echo(fake_nodes: StartNode) -> FakeNode:
    """A node that answers with the prompt."""
    node = await fake_nodes(slots=64)
    node.default = _echoed
    return node


def _echoed(received: Received) -> Answer:
    return Answer(tokens=(received.json["prompt"],))


def answers(got: bytes) -> list[int]:
    """The status of every answer in these bytes, wherever it stands; `100 Continue` is none."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", got) if status != b"100"]


async def exchange(dial: Dial, port: int, shape: Shape, number: int) -> list[int]:
    """Send it on a connection of its own, and wait until the connection ends."""
    wire = await dial(port)
    wire.send(shape.sent.replace(b"CASE", b"%04d" % number))
    async with asyncio.timeout(ANSWER_S):
        return answers(await wire.rest())


async def ask(wire: Wire, word: str) -> str:
    """What the node answers to a request beyond reproach."""
    wire.post("/api/generate", {"model": "llama3", "prompt": word, "stream": False})
    async with asyncio.timeout(ANSWER_S):
        answer = await wire.answer()
    assert answer.status == 200
    said: str = answer.json["response"]
    return said


def seen_by(node: FakeNode, number: int) -> list[str]:
    """The prompts of one case that the node has seen."""
    prompts = [received.json["prompt"] for received in node.inferences]
    return [prompt for prompt in prompts if prompt.endswith(f" {number:04d}")]


async def test_every_shape_gets_one_answer_and_smuggles_nothing(
    gateways: StartGateway, echo: FakeNode, dial: Dial
) -> None:
    gateway = await gateways(echo, server=LIMITS)

    found = await asyncio.gather(*(exchange(dial, gateway.port, shape, n) for n, shape in enumerate(SHAPES)))

    for number, (shape, statuses) in enumerate(zip(SHAPES, found, strict=True)):
        assert len(statuses) <= 1, shape.name
        if shape.is_refused:
            assert all(400 <= status < 500 or status in {501, 505} for status in statuses), (shape.name, statuses)
            assert not seen_by(echo, number), shape.name
        else:
            assert statuses == [200], shape.name
            assert seen_by(echo, number) == [f"carrier {number:04d}"], shape.name
    assert await ask(await dial(gateway.port), "still there") == "still there"


async def test_every_shape_is_told_what_is_wrong_with_it(gateways: StartGateway, echo: FakeNode, dial: Dial) -> None:
    """The gateway says what it did not like, instead of only closing."""
    gateway = await gateways(echo, server=LIMITS)

    found = await asyncio.gather(*(exchange(dial, gateway.port, shape, n) for n, shape in enumerate(SHAPES)))

    silent = [shape.name for shape, statuses in zip(SHAPES, found, strict=True) if not statuses]
    assert not silent


@pytest.mark.parametrize("pieces", [2, 7])
async def test_a_shape_in_pieces_fares_no_better(
    gateways: StartGateway, echo: FakeNode, dial: Dial, pieces: int
) -> None:
    gateway = await gateways(echo, server=LIMITS)

    async def trickled(number: int, shape: Shape) -> list[int]:
        wire = await dial(gateway.port)
        sent = shape.sent.replace(b"CASE", b"%04d" % number)
        step = len(sent) // pieces + 1
        for start in range(0, len(sent), step):
            wire.send(sent[start : start + step])
            await asyncio.sleep(0)
        async with asyncio.timeout(ANSWER_S):
            return answers(await wire.rest())

    found = await asyncio.gather(*(trickled(number, shape) for number, shape in enumerate(SHAPES)))

    for number, (shape, statuses) in enumerate(zip(SHAPES, found, strict=True)):
        assert len(statuses) <= 1, shape.name
        assert len(seen_by(echo, number)) == (0 if shape.is_refused else 1), shape.name


@pytest.mark.parametrize("front", FRONTS)
async def test_behind_a_proxy_no_request_is_slipped_past_it(
    gateways: StartGateway, echo: FakeNode, dial: Dial, proxies: StartProxy, front: str
) -> None:
    gateway = await gateways(echo, server=Server(head_timeout_s=0.4, body_timeout_s=0.4))
    port = await proxies(front, gateway.port)

    async def attacked(number: int, shape: Shape) -> tuple[list[int], str]:
        statuses = await exchange(dial, port, shape, number)
        return statuses, await ask(await dial(port), f"victim {number}")

    found = await asyncio.gather(*(attacked(number, shape) for number, shape in enumerate(SHAPES)))

    for number, (shape, (statuses, said)) in enumerate(zip(SHAPES, found, strict=True)):
        assert said == f"victim {number}", shape.name
        assert len(seen_by(echo, number)) <= len(statuses), shape.name


@pytest.fixture
async def proxies(tmp_path: Path) -> AsyncIterator[StartProxy]:
    """A function that starts a proxy in front of a port of this machine and returns its own port."""
    running: list[asyncio.subprocess.Process] = []

    async def start(front: str, port: int) -> int:
        program = shutil.which(front, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
        if program is None:
            if os.environ.get("CI") == "true":
                pytest.fail(f"{front} is missing")
            pytest.skip(f"needs {front}")
        own_port = _free_port()
        config = tmp_path / f"{front}.conf"
        config.write_text(CONFIGS[front].format(listen=own_port, gateway=port, folder=tmp_path))
        arguments = {"nginx": ("-e", "stderr", "-p", str(tmp_path), "-c"), "haproxy": ("-db", "-f")}[front]
        process = await asyncio.create_subprocess_exec(
            program, *arguments, str(config), stderr=asyncio.subprocess.DEVNULL
        )
        running.append(process)
        await _listens(own_port)
        return own_port

    yield start
    for process in running:
        process.terminate()
        await process.wait()


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
            except ConnectionRefusedError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return


CONFIGS = {
    "nginx": """
daemon off;
master_process off;
pid {folder}/nginx.pid;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_header_timeout 1s;
    client_body_timeout 1s;
    keepalive_timeout 1s;
    large_client_header_buffers 4 16k;
    underscores_in_headers on;
    ignore_invalid_headers off;
    upstream gateway {{ server 127.0.0.1:{gateway}; keepalive 8; }}
    server {{
        listen 127.0.0.1:{listen};
        location / {{
            proxy_pass http://gateway;
            proxy_http_version 1.1;
            proxy_set_header Host localhost;
            proxy_set_header Connection "";
            proxy_request_buffering off;
            proxy_buffering off;
        }}
    }}
}}
""",
    "haproxy": """
global
    maxconn 512
defaults
    mode http
    timeout connect 2s
    timeout client 1s
    timeout server 10s
    timeout http-request 1s
    timeout http-keep-alive 1s
    http-reuse always
frontend clients
    bind 127.0.0.1:{listen}
    default_backend gateways
backend gateways
    server gateway 127.0.0.1:{gateway}
""",
}
