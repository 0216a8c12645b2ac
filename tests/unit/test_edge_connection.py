"""A client's connection by itself: however its bytes are cut, the answers are the same, and limits hold."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sutazai.core.errors import BadRequest
from sutazai.core.identity import ApiKey, Role, Scope
from sutazai.core.request import Head, Priority, Request
from sutazai.edge import direct
from sutazai.edge.auth import Gatekeeper
from sutazai.edge.connection import ClientConnection
from sutazai.edge.incoming import Incoming
from sutazai.edge.server import Server
from sutazai.gateway.accounts import Accounts
from sutazai.ports.inference import Reply
from sutazai.settings.model import Server as Limits
from sutazai.telemetry.metrics import Metrics

TURNS = 3
"""Turns of the event loop without a byte after which nothing more comes."""
LIMITS = Limits(max_head_bytes=2048, max_body_bytes=4096, max_buffered_bytes=8192)


class NothingLeft:
    """The call of a request that was answered at once."""

    def cancel(self) -> None:
        """Nothing to end."""

    def pause(self) -> None:
        """Nothing comes."""

    def resume(self) -> None:
        """Nothing comes."""


class Echo:
    """Answers every request at once, with its prompt."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.priorities: list[Priority] = []

    def start(self, request: Request, reply: Reply) -> NothingLeft:
        prompt: str = msgspec.json.decode(request.body)["prompt"]
        self.prompts.append(prompt)
        self.priorities.append(request.priority)
        reply.head(Head(200, b"application/json", None, "echo", "the only one"))
        reply.chunk(prompt.encode())
        reply.end(None)
        return NothingLeft()


class Forgetful:
    """A ledger that keeps nothing."""

    def note(self, *_: object, **__: object) -> None:
        """Forget it."""


class Socket(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.paused = False
        self.ended = False

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if not self.ended:
            self.written += data

    def is_closing(self) -> bool:
        return self.ended

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.ended = True

    def abort(self) -> None:
        self.ended = True


@dataclass(slots=True)
class Bench:
    """A server without a network, and a connection to it."""

    server: Server
    echo: Echo
    connection: ClientConnection
    socket: Socket

    async def feed(self, parts: Iterable[bytes]) -> bytes:
        """Give it these reads, wait for its answers, and return them."""
        for part in parts:
            if not self.socket.paused and not self.socket.ended:
                self.connection.data_received(part)
            await self.settle()
        return bytes(self.socket.written)

    async def settle(self) -> None:
        """Let answers under way be finished."""
        quiet = written = 0
        while quiet < TURNS:
            await asyncio.sleep(0)
            is_busy = self.connection.cycle is not None or len(self.socket.written) != written
            quiet = 0 if is_busy else quiet + 1
            written = len(self.socket.written)


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """An application that tells the path."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


async def repeat(incoming: Incoming, body: bytes) -> direct.Reply:
    """A handler that tells what was sent, and with which key; `no` is refused."""
    if body == b"no":
        raise BadRequest("It was no.")
    return direct.Reply(202, [(b"content-type", b"text/plain")], incoming.headers.get(b"key", b"") + body)


@asynccontextmanager
async def bench(limits: Limits = LIMITS, keys: Sequence[ApiKey] = (), **gate: Any) -> AsyncIterator[Bench]:
    gatekeeper = Gatekeeper(**{"required": False} | gate)
    gatekeeper.learn(keys)
    echo = Echo()
    server = Server(
        echo,
        hello,
        direct={(b"POST", b"/repeat"): repeat},
        gatekeeper=gatekeeper,
        accounts=Accounts(Metrics(), Forgetful(), None),
        limits=limits,
        keep_alive_s=lambda: 10.0,
        place_of=lambda _request_id: None,
    )
    connection, socket = ClientConnection(server), Socket()
    connection.connection_made(socket)
    yield Bench(server, echo, connection, socket)
    connection.connection_lost(None)

    assert server.buffered_bytes == 0
    assert not server.in_flight
    assert server.connections == 0


def posted(prompt: str, *headers: str, version: str = "1.1", expects: bool = False) -> bytes:
    body = msgspec.json.encode({"model": "m", "prompt": prompt, "stream": False})
    extra = "Expect: 100-continue\r\n" if expects else ""
    lines = "".join(f"{header}\r\n" for header in headers)
    head = f"POST /api/generate HTTP/{version}\r\nHost: localhost\r\n{extra}{lines}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def handed(body: str, path: str = "/repeat", *headers: str) -> bytes:
    """To the address that has a handler."""
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{lines}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def chunked(prompt: str, cuts: Sequence[int]) -> bytes:
    body = msgspec.json.encode({"model": "m", "prompt": prompt, "stream": False})
    head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in cut(body, cuts)) + b"0\r\n\r\n"


def gotten(path: str, method: str = "GET", *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """The data in pieces; empty ones are left out, as a socket never reads them."""
    bounds = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(bounds) if a < b]


def statuses(written: bytes) -> list[int]:
    """Status of each answer, by its framing; a remainder that is no answer fails."""
    found: list[int] = []
    while written:
        head, separator, written = written.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 "), head
        assert separator
        found.append(int(head[9:12]))
        for line in head.split(b"\r\n"):
            if line.startswith(b"content-length: "):
                length = int(line[16:])
                assert len(written) >= length
                written = written[length:]
    return found


def plain(written: bytes) -> bytes:
    """Answers without what differs from one to the next: ids and dates."""
    lines = written.split(b"\r\n")
    return b"\r\n".join(line for line in lines if not line.startswith((b"x-request-id:", b"date:")))


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
PROMPTS = st.text(st.characters(codec="ascii", categories=("L", "N")), max_size=12)
CUTS = st.lists(st.integers(0, 4096), max_size=12)
REQUESTS = st.one_of(
    st.builds(posted, PROMPTS),
    st.builds(posted, PROMPTS, expects=st.just(True)),
    st.builds(chunked, PROMPTS, CUTS),
    st.builds(handed, PROMPTS | st.just("no"), st.sampled_from(["/repeat", "/%72epeat", "/repeated"])),
    st.builds(lambda body, key: handed(body, "/repeat", f"Key: {key}"), PROMPTS, st.sampled_from("ab")),
    st.sampled_from(["/healthz", "/metrics", "/v1/chat/completions"]).map(gotten),
    st.just(gotten("/api/generate", "GET")),
    st.just(posted("x").replace(b"POST", b"PUT", 1)),
    st.just(posted("x").replace(b'{"', b'["', 1)),
    st.just(gotten("/healthz", "GET", "Origin: https://elsewhere.example")),
)
LAST = st.one_of(
    REQUESTS,
    st.just(posted("x", "Connection: close")),
    st.just(posted("x", version="1.0")),
    st.just(posted("x", "Connection: keep-alive", version="1.0")),
    st.just(b"GARBAGE\r\n\r\n"),
    st.just(b"GET / HTTP/1.1\r\n\r\n"),
)


@given(st.lists(REQUESTS, max_size=4), LAST, CUTS)
@example([posted("b" * 2500)], posted("c"), [len(posted("b" * 2500)) + 40])
@example([posted("a")], posted("b", expects=True), [])
@settings(deadline=None, max_examples=200)
async def test_the_answers_do_not_depend_on_how_the_bytes_are_cut(
    requests: list[bytes], last: bytes, places: list[int]
) -> None:
    sent = b"".join([*requests, last])
    async with bench() as whole, bench() as pieces:
        expected = await whole.feed([sent])
        found = await pieces.feed(cut(sent, places))

        assert plain(found).replace(CONTINUE, b"") == plain(expected).replace(CONTINUE, b"")
        assert pieces.echo.prompts == whole.echo.prompts
        assert len([status for status in statuses(found) if status != 100]) == len(requests) + 1


@given(st.lists(st.tuples(REQUESTS, CUTS), min_size=2, max_size=5))
@example([(posted("first"), []), (posted("second"), [7]), (posted("the third"), [190]), (posted("x"), [])])
@settings(deadline=None, max_examples=200)
async def test_a_request_is_answered_as_it_would_be_on_a_new_connection(sent: list[tuple[bytes, list[int]]]) -> None:
    """What a connection remembers of earlier requests changes nothing."""
    expected = b""
    for request, _ in sent:
        async with bench() as alone:
            expected += plain(await alone.feed([request])).replace(CONTINUE, b"")
    async with bench() as kept:
        found = await kept.feed([piece for request, places in sent for piece in cut(request, places)])

    assert plain(found).replace(CONTINUE, b"") == expected


@given(
    st.integers(0, len(posted("same")) - 1),
    st.binary(max_size=4),
    st.integers(0, 3),
    st.sampled_from([posted("same"), handed("same", "/repeat", "Key: a")]),
)
@settings(deadline=None, max_examples=300)
async def test_a_head_that_is_almost_the_one_before_is_read_anew(
    place: int, wrong: bytes, gone: int, request: bytes
) -> None:
    changed = request[:place] + wrong + request[place + gone :]
    async with bench() as alone:
        expected = plain(await alone.feed([changed]))
    async with bench() as kept:
        first = plain(await kept.feed([request]))
        found = plain(await kept.feed([changed]))

    assert found == first + expected


@pytest.mark.parametrize(
    "request_",
    [posted("prompt"), posted("x", expects=True), chunked("prompt", [1, 2, 9]), gotten("/healthz")],
    ids=["length", "expect", "chunked", "get"],
)
async def test_a_request_may_be_cut_at_every_byte(request_: bytes) -> None:
    async with bench() as whole:
        expected = plain(await whole.feed([request_]))
    for place in range(1, len(request_)):
        async with bench() as pieces:
            found = plain(await pieces.feed([request_[:place], request_[place:]]))

        assert found == expected, place


async def test_what_a_handler_answers_and_refuses_is_framed_as_all_else_is() -> None:
    async with bench() as one:
        written = await one.feed([handed("yes"), handed("no"), handed("yes", "/%72epeat"), handed("yes", "/repeated")])

        assert statuses(written) == [202, 400, 202, 200]
        assert (written.count(b"\r\n\r\nyes"), written.count(b"It was no."), written.count(b"/repeated")) == (2, 1, 1)


async def test_a_hundred_requests_at_once_are_answered_in_order() -> None:
    async with bench() as one:
        written = await one.feed([b"".join(posted(f"<{number}>") for number in range(100))])

        assert statuses(written) == [200] * 100
        assert one.echo.prompts == [f"<{number}>" for number in range(100)]


async def test_thousands_of_wrong_requests_at_once_are_answered_one_by_one() -> None:
    async with bench() as one:
        written = await one.feed([gotten("/api/generate") * 3000])

        assert statuses(written) == [405] * 3000


async def test_an_answer_to_head_has_no_body() -> None:
    async with bench() as one:
        written = await one.feed([gotten("/api/generate", "HEAD"), gotten("/healthz", "HEAD"), posted("after")])

        heads = written.split(b"\r\n\r\n")
        assert [head[:12] for head in heads] == [b"HTTP/1.1 405", b"HTTP/1.1 200", b"HTTP/1.1 200", b"after"]


async def test_an_expectation_is_met_in_turn() -> None:
    """A `100 Continue` in front of the answer to an earlier request would be taken for that answer."""
    async with bench() as one:
        written = await one.feed([posted("first") + posted("second", expects=True)])

        assert statuses(written) in ([200, 200], [200, 100, 200])


async def test_http_1_0_is_not_told_to_continue() -> None:
    async with bench() as one:
        written = await one.feed([posted("x", version="1.0", expects=True)])

        assert statuses(written) == [200]


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "null", "http://a:b:c", "\xff", "https://"])
async def test_an_origin_that_is_no_address_is_refused(origin: str) -> None:
    async with bench() as one:
        written = await one.feed([gotten("/healthz2", "GET", f"Origin: {origin}")])

        assert statuses(written) == [403]


async def test_what_follows_the_last_request_does_not_spoil_its_answer() -> None:
    async with bench() as one:
        written = await one.feed([posted("last", "Connection: close") + b"more"])

        assert statuses(written) == [200]
        assert one.socket.ended


async def test_the_body_of_a_client_without_a_key_is_not_kept() -> None:
    async with bench(required=True) as one:
        head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        written = await one.feed([head, b"3\r\nabc\r\n"])

        assert statuses(written) == [401]
        assert one.server.buffered_bytes == 0


@pytest.mark.parametrize(
    ("begun", "limit_s"),
    [
        (b"POST /api/gen", LIMITS.head_timeout_s),
        (b"\r\n", LIMITS.head_timeout_s),
        (posted("x")[:-1], LIMITS.body_timeout_s),
    ],
    ids=["head", "nothing but a line", "body"],
)
@pytest.mark.parametrize("is_first", [True, False])
async def test_a_request_that_is_not_completed_in_time_is_refused(begun: bytes, limit_s: float, is_first: bool) -> None:
    async with bench() as one:
        before = b"" if is_first else await one.feed([posted("x")])
        await one.feed([begun])
        began_at = one.server.loop.time()

        one.connection.check(began_at + limit_s - 0.1)
        assert bytes(one.socket.written) == before

        one.connection.check(began_at + limit_s + 0.1)
        assert statuses(bytes(one.socket.written[len(before) :])) == [408]
        assert one.socket.ended


@pytest.mark.parametrize("is_first", [True, False])
async def test_an_idle_connection_is_closed_without_a_word(is_first: bool) -> None:
    async with bench() as one:
        before = b"" if is_first else await one.feed([posted("x")])
        idle_at = one.server.loop.time()

        one.connection.check(idle_at + LIMITS.keep_alive_s - 0.1)
        assert not one.socket.is_closing()

        one.connection.check(idle_at + LIMITS.keep_alive_s + 0.1)
        assert one.socket.is_closing()
        assert bytes(one.socket.written) == before


@pytest.mark.parametrize(
    ("scopes", "gets"),
    [(frozenset(Scope), Priority.HIGH), (frozenset({Scope.INFERENCE}), Priority.NORMAL)],
)
async def test_only_a_key_that_may_administrate_goes_before_others(scopes: frozenset[Scope], gets: Priority) -> None:
    record = ApiKey(
        id="k",
        name="ops",
        tenant="t",
        role=Role.ADMIN,
        digest=hashlib.sha256(b"secret").digest(),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        scopes=scopes,
    )
    async with bench(keys=[record]) as one:
        await one.feed([posted("x", "Authorization: Bearer secret", "x-sutazai-priority: high")])

        assert one.echo.priorities == [gets]
