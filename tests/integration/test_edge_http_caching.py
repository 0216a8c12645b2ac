"""What caches may keep, what is compressed, and the start page, through a real gateway."""

from __future__ import annotations

import gzip
import re
import time
from typing import TYPE_CHECKING, Any

import brotli  # type: ignore[import-untyped]
import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sutazai.adapters.postgres.stores import open_stores
from sutazai.core.identity import Role
from sutazai.core.node import NodeKind
from sutazai.edge.freshness import has_tag, tag_of
from sutazai.edge.openapi import document
from sutazai.edge.public import USUAL_HOST, address_of
from sutazai.settings.model import Auth, Database, Server
from sutazai.testing import Answer, Fault

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.conftest import Answered, Dial, StartGateway, StartNode, Wire

    from sutazai.adapters.postgres.stores import Stores

PRIVATE = {"/v1/models", "/api/tags"}
CHAT = {"model": "llama3", "messages": [{"role": "user", "content": "hi"}]}
ALL_CODINGS = "Accept-Encoding: gzip, deflate, br, zstd"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "llama3", "prompt": "hi"},
    "/api/generate": {"model": "llama3", "prompt": "hi", "stream": False},
    "/v1/embeddings": {"model": "llama3", "input": "hi"},
    "/api/embed": {"model": "llama3", "input": "hi"},
    "/api/embeddings": {"model": "llama3", "prompt": "hi"},
    "/v1/sessions": {"model": "llama3"},
}


@pytest.fixture
async def stores(data_dir: Path) -> AsyncIterator[Stores]:
    """The same database as the gateway's."""
    async with open_stores(Database(), data_dir) as opened:
        yield opened


@pytest.fixture
async def wire(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> Wire:
    """A connection to a gateway with one node."""
    return await dial((await gateways(await fake_nodes())).port)


async def got(wire: Wire, path: str, *headers: str, method: str = "GET", has_body: bool = True) -> Answered:
    wire.get(path, *headers, method=method)
    return await wire.answer(has_body=has_body and method != "HEAD")


def plain(answer: Answered) -> bytes:
    """The body, out of whatever coding it came in."""
    coding = answer.headers.get("content-encoding", "")
    readers: dict[Any, Callable[[], bytes]] = {
        "zstd": lambda: zstandard.ZstdDecompressor().decompress(answer.body),
        "br": lambda: brotli.decompress(answer.body),
        "gzip": lambda: gzip.decompress(answer.body),
        "": lambda: answer.body,
    }
    return readers[coding]()


# what caches may keep


def operations() -> list[tuple[str, str]]:
    return [(path, method) for path, methods in document()["paths"].items() for method in methods]


@pytest.mark.deadline(120)
@pytest.mark.parametrize("with_key", [True, False], ids=["key", "no key"])
async def test_only_what_is_the_same_for_everybody_is_public(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, stores: Stores, with_key: bool
) -> None:
    """Every address of the description, well asked and badly."""
    _, key = await stores.keys.create(name=f"c{time.monotonic_ns()}", tenant="tests", role=Role.ADMIN)
    gateway = await gateways(await fake_nodes(), auth=Auth(required=True))
    headers = [f"Authorization: Bearer {key}"] if with_key else []
    seen = set()
    for path, method in operations():
        address = re.sub(r"\{\w+\}", "llama3", path)
        for body in (BODIES.get(path, CHAT), {"wrong": True}):
            wire = await dial(gateway.port)
            if method in {"post", "put"}:
                wire.post(address, body, *headers)
            else:
                wire.get(address, *headers, method=method.upper())
            answer = await wire.answer()
            kept = answer.headers["cache-control"]
            seen.add((path, answer.status))
            if path == "/openapi.json" and answer.status == 200:
                assert kept == "public, max-age=300, stale-while-revalidate=60"
            elif path in PRIVATE and answer.status == 200:
                assert kept == "private, no-cache", path
                assert "Authorization" in answer.headers["vary"]
            else:
                assert kept == "no-store", (path, answer.status)

    if with_key:
        assert {path for path, status in seen if status in {200, 201}} >= PRIVATE | {"/v1/chat/completions", "/metrics"}
    else:
        assert {path for path, status in seen if status == 200} == {"/", "/openapi.json", "/healthz", "/readyz"}


async def test_an_inference_answer_and_its_errors_are_never_kept(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    node.script.extend([Answer(), Answer(), Fault.status(500), Fault.status(400)])
    wire = await dial((await gateways(node)).port)
    for fields in ({}, {"stream": True}, {}, {"model": "nobody"}):
        wire.post("/v1/chat/completions", CHAT | fields)
        assert (await wire.answer()).headers["cache-control"] == "no-store"


async def test_the_description_is_good_for_five_minutes(wire: Wire) -> None:
    answer = await got(wire, "/openapi.json")

    assert answer.headers["cache-control"] == "public, max-age=300, stale-while-revalidate=60"
    assert answer.headers["vary"] == "Accept, Authorization, accept-encoding"
    assert answer.json == msgspec.json.decode(msgspec.json.encode(document()))


@pytest.mark.parametrize("path", ["/openapi.json", "/v1/models", "/api/tags"])
async def test_who_has_it_is_not_sent_it_again(wire: Wire, path: str) -> None:
    tag = (await got(wire, path)).headers["etag"]
    for given_tag in (tag, tag.removeprefix("W/"), f'"other", {tag}', "*"):
        again = await got(wire, path, f"If-None-Match: {given_tag}", ALL_CODINGS, has_body=False)
        assert again.status == 304, given_tag
        assert again.headers["etag"] == tag
        assert "content-length" not in again.headers
        assert again.headers["cache-control"]
    changed = await got(wire, path, 'If-None-Match: W/"other"')

    assert changed.status == 200
    assert (await got(wire, "/healthz")).json == {"status": "ok"}


async def test_a_list_that_changed_has_another_tag(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    one = await dial((await gateways(await fake_nodes())).port)
    two = await dial((await gateways(await fake_nodes(NodeKind.OLLAMA, ("llama3", "phi4")))).port)
    tag = (await got(one, "/v1/models")).headers["etag"]

    assert (await got(two, "/v1/models", f"If-None-Match: {tag}")).status == 200


@given(st.binary(), st.lists(st.from_regex(r'(W/)?"[a-z]*"', fullmatch=True)))
def test_a_tag_is_found_among_others_whether_weak_or_not(body: bytes, others: list[str]) -> None:
    tag = tag_of(body)

    assert has_tag(", ".join([*others, tag]), tag)
    assert has_tag(",".join([tag.removeprefix("W/"), *others]), tag)
    assert not has_tag(", ".join(others), tag)
    assert tag_of(body + b" ") != tag


# compression


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
async def test_a_large_answer_is_compressed_on_both_lanes_and_is_the_same(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, coding: str
) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    node.default = Answer(tokens=tuple(f"word {number} " for number in range(500)))
    wire = await dial((await gateways(node)).port)
    wire.post("/v1/chat/completions", CHAT)
    whole = await wire.answer()
    wire.post("/v1/chat/completions", CHAT, f"Accept-Encoding: {coding}")
    small = await wire.answer()
    page, small_page = await got(wire, "/openapi.json"), await got(wire, "/openapi.json", f"Accept-Encoding: {coding}")

    assert "content-encoding" not in whole.headers
    assert small.headers["content-encoding"] == small_page.headers["content-encoding"] == coding
    assert "accept-encoding" in small.headers["vary"]
    assert len(small.body) < len(whole.body) / 2
    contents = [msgspec.json.decode(plain(one))["choices"] for one in (whole, small)]
    assert contents[0] == contents[1]
    assert plain(small_page) == page.body
    assert small_page.headers["etag"] == page.headers["etag"]


@pytest.mark.parametrize("kind", list(NodeKind))
async def test_a_stream_is_never_compressed(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, kind: NodeKind
) -> None:
    node = await fake_nodes(kind)
    wire = await dial((await gateways(node, server=Server(compress_from_bytes=0))).port)
    for path, body in (("/v1/chat/completions", CHAT | {"stream": True}), ("/api/chat", CHAT)):
        wire.post(path, body, ALL_CODINGS)
        answer = await wire.answer()
        assert answer.status == 200
        assert "content-encoding" not in answer.headers


async def test_a_small_answer_is_sent_as_it_is(wire: Wire) -> None:
    wire.post("/v1/chat/completions", CHAT, ALL_CODINGS)
    answer = await wire.answer()

    assert answer.json["choices"]
    assert "content-encoding" not in answer.headers


async def test_a_head_has_no_body_and_says_what_a_get_would_be_kept_as(wire: Wire) -> None:
    head = await got(wire, "/openapi.json", ALL_CODINGS, method="HEAD")
    page = await got(wire, "/openapi.json")

    assert head.headers["etag"] == page.headers["etag"]
    assert head.headers["content-length"] == str(len(page.body))


# the start page


async def page_of(wire: Wire, *headers: str) -> Answered:
    return await got(wire, "/", "Accept: text/html,application/xhtml+xml;q=0.9", *headers)


async def test_a_browser_gets_a_page_and_a_program_gets_a_line(wire: Wire) -> None:
    page, line = await page_of(wire), await got(wire, "/", "Accept: */*")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["cache-control"].startswith("public, max-age=300")
    assert line.body == b"Ollama is running, behind SutazAI\n"
    assert line.headers["cache-control"] == "no-store"
    assert "accept" in page.headers["vary"].lower()
    assert (await got(wire, "/", method="HEAD")).status == 200


async def test_all_that_the_page_needs_is_here_and_may_be_kept_for_a_year(wire: Wire) -> None:
    page = (await page_of(wire)).body.decode()
    links = set(re.findall(r'(?:href|src)="([^"]+)"', page))
    assets = {link for link in links if link.startswith("/assets/")}

    assert "{{" not in page
    assert len(assets) == 2
    for link in links:
        answer = await got(wire, link)
        assert answer.status == 200, link
        if link in assets:
            assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
            assert answer.headers["content-type"].split(";")[0] in {"text/css", "image/svg+xml"}
            assert answer.headers["x-content-type-options"] == "nosniff"
    assert (await got(wire, "/assets/start.css")).status == 404
    assert (await got(wire, "/assets/..%2fpublic.py")).status == 404


async def test_the_page_runs_no_script_and_loads_nothing_from_elsewhere(wire: Wire) -> None:
    page = await page_of(wire)
    policy = page.headers["content-security-policy"]

    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "unsafe" not in policy
    assert b"<script" not in page.body
    assert b"style=" not in page.body
    assert not re.search(rb'(?:href|src)="(?!/)', page.body)


async def test_the_page_shows_the_address_by_which_it_was_asked(wire: Wire) -> None:
    wire.send(b"GET / HTTP/1.1\r\nHost: ai.example.org\r\nAccept: text/html\r\nX-Forwarded-Proto: https\r\n\r\n")
    body = (await wire.answer()).body

    assert b"https://ai.example.org/v1/chat/completions" in body
    assert USUAL_HOST.encode() not in body


@pytest.mark.parametrize("host", ['"><script>', "a b", "", "x" * 300, "a:99999999", "[::1", "evil.org/path", "a@b"])
def test_a_host_that_cannot_be_shown_is_not(host: str) -> None:
    assert address_of({"host": host}) == f"http://{USUAL_HOST}"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:10010", "[::1]:8080", "ai.example.org", "my_host"])
def test_a_host_that_can_be_shown_is(host: str) -> None:
    assert address_of({"host": host}) == f"http://{host}"
    assert address_of({"host": host, "x-forwarded-proto": "https"}) == f"https://{host}"
    assert address_of({"host": host, "x-forwarded-proto": "javascript"}) == f"http://{host}"


async def test_the_page_needs_no_key_and_tells_no_secret(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, stores: Stores
) -> None:
    _, key = await stores.keys.create(name=f"p{time.monotonic_ns()}", tenant="tests", role=Role.USER)
    wire = await dial((await gateways(await fake_nodes(), auth=Auth(required=True))).port)
    without, with_key = await page_of(wire), await page_of(wire, f"Authorization: Bearer {key}")

    assert without.status == 200
    assert without.body == with_key.body
    assert (await got(wire, "/openapi.json")).status == 200
    assert (await got(wire, "/v1/models")).status == 401
