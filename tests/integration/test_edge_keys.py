"""Who is let in: keys where they are asked for, and no foreign web page where they are not."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from sutazai.adapters.postgres.stores import open_stores
from sutazai.core.identity import Role
from sutazai.settings.model import Auth, Database, Server
from sutazai.testing import Fault

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.conftest import Answered, Dial, StartGateway, StartNode, StartProgram, Wire

    from sutazai.adapters.postgres.stores import Stores

    Ask = Callable[..., Awaitable[Answered]]

CHAT = {"model": "llama3", "messages": [{"role": "user", "content": "hi"}]}
KEYS_NEEDED = Auth(required=True)
KNOWN_S = 1.0
"""A change of the keys counts that soon."""


@pytest.fixture
async def stores(data_dir: Path) -> AsyncIterator[Stores]:
    """The same database as the gateway's, as the command line would open it."""
    async with open_stores(Database(), data_dir) as opened:
        yield opened


async def key_for(stores: Stores, role: Role = Role.USER) -> tuple[str, str]:
    """The id of a new key, and the key."""
    record, key = await stores.keys.create(name=f"test {time.monotonic_ns()}", tenant="tests", role=role)
    return record.id, key


async def until_status(wire: Wire, status: int, *headers: str) -> float:
    """Seconds until a request gets this status."""
    began_at = time.monotonic()
    async with asyncio.timeout(5):
        while True:
            wire.get("/v1/models", *headers)
            if (await wire.answer()).status == status:
                return time.monotonic() - began_at
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat", "/v1/models", "/admin/nodes", "/metrics", "/x"])
async def test_without_a_key_everything_is_a_401(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, path: str
) -> None:
    node = await fake_nodes()
    gateway = await gateways(node, auth=KEYS_NEEDED)
    for header, words in (("", "No API key was sent"), ("Authorization: Bearer sk-wrong", "not known here")):
        wire = await dial(gateway.port)
        wire.post(path, CHAT, *filter(None, [header]))
        answer = await wire.answer()

        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert words in str(answer.json["error"])
    assert not node.inferences


async def test_probes_of_load_balancers_need_no_key(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> None:
    gateway = await gateways(await fake_nodes(), auth=KEYS_NEEDED)
    wire = await dial(gateway.port)
    for path in ("/healthz", "/readyz"):
        wire.send(f"GET {path} HTTP/1.1\r\nHost: gateway.example.org\r\n\r\n".encode())

        assert (await wire.answer()).status == 200


@pytest.mark.parametrize("form", ["Authorization: Bearer {}", "authorization: bearer  {}", "x-api-key: {}"])
async def test_a_key_opens_the_door_within_a_second_of_its_making_and_until_it_is_revoked(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, stores: Stores, form: str
) -> None:
    gateway = await gateways(await fake_nodes(), auth=KEYS_NEEDED)
    key_id, key = await key_for(stores)
    wire = await dial(gateway.port)

    assert await until_status(wire, 200, form.format(key)) < KNOWN_S

    wire.post("/v1/chat/completions", CHAT, form.format(key))
    assert (await wire.answer()).status == 200

    await stores.keys.revoke(key_id)
    assert await until_status(wire, 401, form.format(key)) < KNOWN_S

    wire.post("/v1/chat/completions", CHAT, form.format(key))
    assert (await wire.answer()).status == 401


async def test_a_key_counts_on_each_request_of_a_connection(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, stores: Stores
) -> None:
    """What a connection was let in with once is not remembered for it."""
    gateway = await gateways(await fake_nodes(), auth=KEYS_NEEDED)
    _, key = await key_for(stores)
    _, other = await key_for(stores)
    wire = await dial(gateway.port)
    await until_status(wire, 200, f"x-api-key: {other}")
    for _ in range(3):
        wire.post("/v1/chat/completions", CHAT, f"x-api-key: {key}")
        assert (await wire.answer()).status == 200
    wire.post("/v1/chat/completions", CHAT, f"x-api-key: {key[:-1]}!")
    assert (await wire.answer()).status == 401


async def test_a_users_key_is_not_for_administration(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, stores: Stores
) -> None:
    gateway = await gateways(await fake_nodes(), auth=KEYS_NEEDED)
    _, user = await key_for(stores)
    _, admin = await key_for(stores, Role.ADMIN)
    wire = await dial(gateway.port)
    await until_status(wire, 200, f"x-api-key: {admin}")
    for method, path in (
        ("GET", "/admin/nodes"),
        ("GET", "/admin/requests"),
        ("DELETE", "/admin/requests/1"),
        ("POST", "/api/pull"),
        ("POST", "/api/copy"),
        ("DELETE", "/api/delete"),
    ):
        wire.get(path, f"x-api-key: {user}", method=method)
        answer = await wire.answer()
        assert answer.status == 403, path
        assert "admin key" in str(answer.json["error"])

    wire.get("/admin/nodes", f"x-api-key: {admin}")
    assert (await wire.answer()).status == 200


async def test_usage_is_booked_on_the_key(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, stores: Stores
) -> None:
    """The node never sees the key, and the request is the tenant's."""
    node = await fake_nodes()
    gateway = await gateways(node, auth=KEYS_NEEDED)
    key_id, key = await key_for(stores)
    _, admin = await key_for(stores, Role.ADMIN)
    wire, watcher = await dial(gateway.port), await dial(gateway.port)
    await until_status(wire, 200, f"x-api-key: {admin}")
    node.default = Fault.stall_before_head()
    wire.post("/v1/chat/completions", CHAT, f"Authorization: Bearer {key}")
    await node.wait_for(1)
    watcher.get("/admin/requests", f"x-api-key: {admin}")
    (request,) = (await watcher.answer()).json["requests"]

    assert (request["key"], request["tenant"]) == (key_id, "tests")
    assert key not in str(node.inferences[0].headers)


# without keys


@pytest.fixture
async def ask(gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> Ask:
    """Asks a gateway that needs no keys, and that one page and one name may call."""
    gateway = await gateways(
        await fake_nodes(),
        server=Server(allowed_origins=("https://chat.example.org",), allowed_hosts=("gateway.example.org",)),
    )

    async def asked(*headers: str, method: str = "GET", path: str = "/v1/models") -> Answered:
        wire = await dial(gateway.port)
        wire.send("\r\n".join([f"{method} {path} HTTP/1.1", *headers, "", ""]).encode())
        return await wire.answer()

    return asked


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1:10010", "[::1]:10010", "10.0.0.5", "gateway", "gw.local", "gw.internal", "a.localhost:1"],
)
async def test_names_that_no_page_can_take_are_answered(ask: Ask, host: str) -> None:
    assert (await ask(f"Host: {host}")).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:10010", "127.0.0.1.evil.example", "localhost.evil.example", "evil.local.com"]
)
async def test_a_page_that_points_its_name_here_is_refused(ask: Ask, host: str) -> None:
    answer = await ask(f"Host: {host}")

    assert answer.status == 403
    assert "server.allowed_hosts" in answer.json["error"]["message"]


async def test_a_name_from_the_settings_is_answered(ask: Ask) -> None:
    assert (await ask("Host: Gateway.Example.org:443")).status == 200


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://127.0.0.1.evil.example", "http://localhost.evil.example", "file://"],
)
@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
async def test_a_foreign_page_is_refused_and_its_reader_learns_nothing(ask: Ask, origin: str, method: str) -> None:
    answer = await ask("Host: localhost", f"Origin: {origin}", "Access-Control-Request-Method: POST", method=method)

    assert answer.status == 403
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origin", ["https://chat.example.org", "http://localhost:3000", "http://127.0.0.1:8080"])
async def test_a_page_that_may_call_gets_the_answer(ask: Ask, origin: str) -> None:
    preflight = await ask(
        "Host: localhost",
        f"Origin: {origin}",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: authorization, content-type",
        method="OPTIONS",
        path="/v1/chat/completions",
    )
    answer = await ask("Host: localhost", f"Origin: {origin}")
    wrong = await ask("Host: localhost", f"Origin: {origin}", path="/nowhere")

    assert preflight.status == 204
    assert {"GET", "POST", "DELETE"} <= set(preflight.headers["access-control-allow-methods"].split(", "))
    assert {"authorization", "content-type"} <= set(preflight.headers["access-control-allow-headers"].split(", "))
    assert answer.status == 200
    assert {preflight.headers["access-control-allow-origin"], answer.headers["access-control-allow-origin"]} == {origin}
    assert wrong.headers["access-control-allow-origin"] == origin


# secrets

CANARY_KEY = "sk-sutazai-canary-4f7d1e9b"
CANARY_PROMPT = "canary-prompt-83c2a6"


async def test_neither_keys_nor_prompts_are_ever_told(
    programs: StartProgram, fake_nodes: StartNode, dial: Dial
) -> None:
    """Not in logs, not in errors, not in metrics, whatever goes wrong."""
    node = await fake_nodes()
    program = await programs(
        'server.port = 0\nlogs.level = "debug"\nlogs.format = "text"\n'
        "retry.attempts = 1\ntimeouts.first_token_s = 0.3\n"
        f'[[nodes]]\nurl = "{node.url}"\napi_key = "{CANARY_KEY}-node"\n'
    )
    told = b""
    messages = [{"role": "user", "content": CANARY_PROMPT}]
    good: dict[str, object] = {"model": "llama3", "messages": messages}
    faults = [Fault.reset_before_head(), Fault.garbage(), Fault.stall_before_head(), Fault.reset_mid_stream(1)]
    node.script.extend([*faults, Fault.status(400), Fault.status(500)])
    bodies: list[object] = [*[good] * 3, good | {"stream": True}, *[good] * 3]
    bodies += [{"messages": messages}, good | {"stream": 5}, good | {"model": "llama9"}]
    bodies += [f'{{"model": "llama3", "messages": "{CANARY_PROMPT}"'.encode(), CANARY_PROMPT.encode()]
    bodies += [good | {"messages": CANARY_PROMPT}, good | {"messages": [{"role": "user", "content": [CANARY_PROMPT]}]}]
    for path in ("/v1/chat/completions", "/api/chat"):
        for body in bodies:
            for header in (f"Authorization: Bearer {CANARY_KEY}", f"X-Api-Key: {CANARY_KEY}"):
                wire = await dial(program.port)
                wire.post(f"{path}?key={CANARY_KEY}", body, header)
                told += (await wire.answer()).body
    for raw in (
        f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic {CANARY_KEY}\r\nBad {CANARY_KEY}\r\n\r\n",
        f"GET /v1/models?key={CANARY_KEY} HTTP/1.1\r\nAuthorization: {CANARY_KEY}\r\n\r\n",
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n{CANARY_PROMPT}",
    ):
        wire = await dial(program.port)
        wire.send(raw.encode())
        told += await wire.rest()
    wire = await dial(program.port)
    for path in ("/metrics", "/admin/nodes", "/admin/requests"):
        wire.get(path)
        told += (await wire.answer()).body
    program.process.terminate()
    await program.ended()

    assert b"request refused" in program.said
    assert b"attempt failed" in program.said
    assert CANARY_KEY.encode() not in told + program.said
    assert CANARY_PROMPT.encode() not in told + program.said


async def test_a_key_given_to_the_gateway_appears_nowhere(
    programs: StartProgram, fake_nodes: StartNode, dial: Dial, stores: Stores
) -> None:
    node = await fake_nodes()
    _, key = await key_for(stores, Role.ADMIN)
    program = await programs(
        f'server.port = 0\nauth.required = true\nlogs.level = "debug"\n[[nodes]]\nurl = "{node.url}"\n'
    )
    wire = await dial(program.port)
    told = b""
    for path in ("/v1/models", "/admin/nodes", "/admin/requests", "/metrics", "/nowhere"):
        wire.get(path, f"Authorization: Bearer {key}")
        answer = await wire.answer()
        assert answer.status in {200, 404}
        told += answer.body
    wire.post("/api/chat", CHAT, f"Authorization: Bearer {key}")
    told += (await wire.answer()).body
    program.process.terminate()
    await program.ended()

    assert key.encode() not in told + program.said
    assert key not in str([received.headers for received in node.requests])
