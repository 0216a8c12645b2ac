"""No address that a stranger names leads into our own networks; those that the operator allows do."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from ipaddress import ip_address

import pytest

from sutazai.adapters.web.guarded import GuardedWeb, open_web
from sutazai.core.errors import BadRequest, Forbidden, NodeTimeout, NodeUnreachable, SutazaiError
from sutazai.policy.web_addresses import Guard

REFUSED = (BadRequest, Forbidden)

HOSTILE_HOSTS = [
    # loopback, as programs write it
    "127.0.0.1",
    "127.0.0.1.",
    "127.1",
    "127.0.1",
    "127.255.255.254",
    "2130706433",
    "0x7f000001",
    "0X7F000001",
    "0x7f.1",
    "0x7f.0x0.0x0.0x1",
    "017700000001",
    "0177.0.0.1",
    "0177.0.0.01",
    "00000177.0.0.1",
    "127.0.0.0x1",
    "0",
    "0.0.0.0",
    "0x0",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[127.0.0.1]",
    "[::1%25lo]",
    "[::127.0.0.1]",
    # addresses of IPv4 within IPv6
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:127.0.0.1]",
    "[::ffff:10.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2002:a9fe:a9fe::1]",
    "[2001:0:7f00:1::]",
    "[2001:4860::5efe:7f00:1]",
    "[2001:4860::200:5efe:a00:1]",
    # private, shared, link-local, metadata
    "10.0.0.1",
    "10.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "192.168.257",
    "100.64.0.1",
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "168.63.129.16",
    "100.100.100.200",
    "192.0.0.192",
    "[fd00:ec2::254]",
    "[fc00::1]",
    "[fe80::1]",
    "[fec0::1]",
    # multicast, reserved, documentation
    "224.0.0.1",
    "239.255.255.250",
    "255.255.255.255",
    "240.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "[ff02::1]",
    "[100::1]",
    "[2001:db8::1]",
    "[5f00::1]",
    # names
    "localhost",
    "LOCALHOST",
    "localhost.",
    "local.test",
    "mixed.test",
    "metadata.test",
    "mapped.test",
    "scoped.test",
    "nat64.test",
    # what is no host, or not the one it seems
    "user@127.0.0.1",
    "user:password@localhost",
    "public.test@127.0.0.1",
    "127.0.0.1\\@public.test",
    "public.test\\.localhost",
    "127.0.0.1%00.public.test",
    "\u0031\u0032\u0037.0.0.1",
    "\u2460\u2461\u2466.0.0.1",
    "localhost\u3002",
    "lo\tcalhost",
    " localhost",
    "1.2.3.4.5",
    "127.0.0.256",
    "0x7f000001ff",
    "127.0x",
    "09.0.0.1",
    "*.localhost",
    "",
    "[",
    "[::1",
    "[::1].public.test",
]
NAMES = {
    "localhost": ["127.0.0.1", "::1"],
    "local.test": ["127.0.0.1"],
    "mixed.test": ["8.8.8.8", "127.0.0.1"],
    "metadata.test": ["169.254.169.254"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "scoped.test": ["fe80::1%lo"],
    "nat64.test": ["64:ff9b::7f00:1"],
    "own.test": ["127.0.0.1"],
    "nowhere.test": [],
}

Say = Callable[[bytes], bytes]


class Canary:
    """A server on loopback that counts who comes, and says what a test wants."""

    def __init__(self) -> None:
        self.port = 0
        self.heads: list[bytes] = []
        self.connections = 0
        self.say: Say = lambda _: ok(b"in")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            writer.write(self.say(head))
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def ok(body: bytes, kind: str = "text/plain; charset=utf-8") -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return head.encode() + body


def redirect(to: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Go\r\nlocation: {to}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode()


@pytest.fixture
async def canary() -> AsyncIterator[Canary]:
    """Listens on every address of this machine, IPv6 too where there is any."""
    canary = Canary()
    server = await asyncio.start_server(canary.serve, "0.0.0.0", 0)
    canary.port = server.sockets[0].getsockname()[1]
    servers = [server]
    if socket.has_ipv6:
        with suppress(OSError):  # this machine has no IPv6
            servers.append(await asyncio.start_server(canary.serve, "::", canary.port))
    yield canary
    for one in servers:
        one.close()
        await one.wait_closed()


async def resolve(name: str, _: int) -> Sequence[str]:
    if name not in NAMES:
        raise OSError(f"{name} is not known")
    return NAMES[name]


@pytest.fixture
async def web() -> AsyncIterator[GuardedWeb]:
    async with open_web(resolve=resolve, limit_s=5.0) as web:
        yield web


@pytest.fixture
async def own_web() -> AsyncIterator[GuardedWeb]:
    """One that may reach `own.test`."""
    async with open_web(resolve=resolve, limit_s=5.0, allowed=("own.test",), max_bytes=1000) as web:
        yield web


async def test_no_hostile_address_reaches_the_canary(web: GuardedWeb, canary: Canary) -> None:
    assert len(HOSTILE_HOSTS) >= 60
    let_through: list[tuple[str, SutazaiError | None]] = []

    for host in HOSTILE_HOSTS:
        for scheme in ("http", "https"):
            for ask in (web.get, lambda url: web.post(url, b"{}", {})):
                try:
                    await ask(f"{scheme}://{host}:{canary.port}/x")
                except REFUSED:
                    continue
                except SutazaiError as error:
                    let_through.append((host, error))
                else:
                    let_through.append((host, None))

    assert let_through == []
    assert canary.connections == 0


@pytest.mark.parametrize(
    "url",
    [
        "file:" + "///etc/passwd",
        "gopher://127.0.0.1/",
        "ftp://public.test/",
        "//127.0.0.1/",
        "127.0.0.1",
        "http:127.0.0.1",
        "http:///127.0.0.1",
        "javascript:alert(1)",
        "http://public.test:0/",
        "http://public.test:99999/",
        "http://public.test:x/",
        "http://public.test/a b",
        "http://public.test/\r\nhost: x",
        "http://public.test/" + "x" * 5000,
        "",
    ],
)
async def test_what_is_no_address_of_the_web_is_refused(web: GuardedWeb, url: str) -> None:
    with pytest.raises(BadRequest):
        await web.get(url)


@pytest.mark.parametrize("host", HOSTILE_HOSTS)
async def test_a_redirect_to_a_hostile_address_is_not_followed(own_web: GuardedWeb, canary: Canary, host: str) -> None:
    canary.say = lambda _: redirect(f"http://{host}:{canary.port}/in".encode("ascii", "ignore").decode())

    with pytest.raises(SutazaiError):
        await own_web.get(f"http://own.test:{canary.port}/")

    assert all(head.startswith(b"GET / ") for head in canary.heads), "only the first address was asked"
    assert canary.connections == 1


async def test_a_name_that_means_another_address_a_moment_later_gains_nothing(canary: Canary) -> None:
    answers = iter([["127.0.0.2"], ["127.0.0.1"], ["127.0.0.1"]])
    asked = 0

    async def rebinding(_name: str, _port: int) -> Sequence[str]:
        nonlocal asked
        asked += 1
        return next(answers)

    async with open_web(resolve=rebinding, limit_s=5.0, allowed=("127.0.0.2/32",)) as web:
        url = f"http://rebinds.test:{canary.port}/"
        assert (await web.get(url)).text == "in"
        assert asked == 1, "what was checked is what was connected to"
        for _ in range(2):
            with pytest.raises(Forbidden):
                await web.get(url)
        assert canary.connections == 1


async def test_what_is_allowed_is_reached_and_read(own_web: GuardedWeb, canary: Canary) -> None:
    canary.say = lambda _: ok("grün".encode("latin-1"), "Text/HTML; charset=latin-1")

    page = await own_web.get(f"http://OWN.test:{canary.port}/a?b=c#part")

    assert (page.status, page.content_type, page.text, page.is_cut) == (200, "text/html", "grün", False)
    assert canary.heads[0].startswith(b"GET /a?b=c HTTP/1.1\r\n")
    assert f"Host: own.test:{canary.port}".encode() in canary.heads[0]


@pytest.mark.parametrize("allowed", ["127.0.0.1", "127.0.0.0/8", "own.test"])
async def test_names_addresses_and_networks_can_be_allowed(canary: Canary, allowed: str) -> None:
    async with open_web(resolve=resolve, allowed=(allowed,)) as web:
        assert (await web.get(f"http://own.test:{canary.port}/")).status == 200


async def test_a_name_can_be_allowed_for_one_port_alone(canary: Canary) -> None:
    async with open_web(resolve=resolve, allowed=(f"own.test:{canary.port}",)) as web:
        assert (await web.get(f"http://own.test:{canary.port}/")).status == 200
        with pytest.raises(Forbidden):
            await web.get(f"http://own.test:{canary.port + 1}/")


@pytest.mark.parametrize("allowed", ["", "own test", "own.test:x", "10.0.0.0/99"])
def test_what_cannot_be_allowed_is_refused(allowed: str) -> None:
    with pytest.raises(ValueError, match="no name, address or network"):
        Guard((allowed,))


async def test_a_webhook_is_posted_and_its_redirect_not_followed(own_web: GuardedWeb, canary: Canary) -> None:
    canary.say = lambda _: redirect("/in", 307)

    status = await own_web.post(f"http://own.test:{canary.port}/hook", b"{}", {"x-signature": "abc"})

    assert status == 307
    assert len(canary.heads) == 1
    assert b"x-signature: abc" in canary.heads[0].lower()


async def test_redirects_are_followed_three_times_and_no_more(own_web: GuardedWeb, canary: Canary) -> None:
    url = f"http://own.test:{canary.port}"
    canary.say = lambda head: ok(b"there") if b" /3 " in head else redirect(f"/{len(canary.heads)}")

    assert (await own_web.get(f"{url}/0")).url == f"{url}/3"

    canary.say = lambda _: redirect("/on")
    with pytest.raises(NodeUnreachable, match="3 times"):
        await own_web.get(f"{url}/0")


async def test_a_large_page_is_cut(own_web: GuardedWeb, canary: Canary) -> None:
    canary.say = lambda _: ok(b"x" * 500_000)

    page = await own_web.get(f"http://own.test:{canary.port}/")

    assert (len(page.text), page.is_cut) == (1000, True)


async def test_a_silent_server_is_given_up(canary: Canary) -> None:
    canary.say = lambda _: b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n"
    stays = asyncio.Event()

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stays.wait()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server, open_web(resolve=resolve, allowed=("own.test",), limit_s=0.1) as web:
        with pytest.raises(NodeTimeout):
            await web.get(f"http://own.test:{server.sockets[0].getsockname()[1]}/")
        stays.set()


@pytest.mark.parametrize("said", [b"", b"no HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: " + b"y" * 60_000 + b"\r\n\r\n"])
async def test_nonsense_is_a_fault_of_the_server(own_web: GuardedWeb, canary: Canary, said: bytes) -> None:
    canary.say = lambda _: said

    with pytest.raises(NodeUnreachable):
        await own_web.get(f"http://own.test:{canary.port}/")


async def test_a_name_without_an_address_is_told(web: GuardedWeb) -> None:
    for host in ("nowhere.test", "unknown.test"):
        with pytest.raises(NodeUnreachable, match=host):
            await web.get(f"http://{host}/")


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "2001:4860:4860::8888", "64:ff9b::808:808"],
)
def test_public_addresses_are_open(address: str) -> None:
    Guard().check("public.test", 443, ip_address(address))
    shown = f"[{address}]" if ":" in address else address
    assert Guard().target(f"https://{shown}/").port == 443
