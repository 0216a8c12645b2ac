"""The admin API: keys, tenants, the audit log, usage, and what is written down of every action."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import asyncpg
import msgspec
import pytest

from sutazai.adapters.postgres.embedded import EmbeddedPostgres
from sutazai.adapters.postgres.stores import open_stores
from sutazai.core.identity import Role, Scope
from sutazai.ports.keys import UsageRow
from sutazai.settings.model import Auth, Database
from sutazai.testing import Fault

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.conftest import Answered, Dial, StartGateway, StartNode, Wire

    from sutazai.adapters.postgres.stores import Stores
    from sutazai.testing import FakeNode

    Ask = Callable[..., Awaitable[Answered]]

CHAT = {"model": "llama3", "messages": [{"role": "user", "content": "hi"}]}
KNOWN_S = 1.0
"""A change of keys or tenants counts that soon."""


def sent(wire: Wire, method: str, path: str, body: object = None, key: str = "") -> None:
    encoded = b"" if body is None else body if isinstance(body, bytes) else msgspec.json.encode(body)
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(encoded)}"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    wire.send("\r\n".join([*lines, "", ""]).encode(), encoded)


@pytest.fixture
async def stores(data_dir: Path) -> AsyncIterator[Stores]:
    """The same database as the gateway's."""
    async with open_stores(Database(), data_dir) as opened:
        yield opened


@pytest.fixture
async def node(fake_nodes: StartNode) -> FakeNode:
    return await fake_nodes()


@pytest.fixture
async def ask(gateways: StartGateway, node: FakeNode, dial: Dial) -> Ask:
    """Asks a gateway that needs no key, so that whoever asks is an admin."""
    gateway = await gateways(node)

    async def asked(method: str, path: str, body: object = None) -> Answered:
        wire = await dial(gateway.port)
        sent(wire, method, path, body)
        return await wire.answer()

    return asked


def unique(word: str) -> str:
    return f"{word}-{time.monotonic_ns()}"


async def entries(ask: Ask, **wanted: str) -> list[dict[str, Any]]:
    """Entries of the log with these values, oldest first."""
    found = (await ask("GET", "/admin/audit?limit=50")).json["entries"]
    return [entry for entry in reversed(found) if all(entry[name] == value for name, value in wanted.items())]


# keys


async def test_a_key_is_made_listed_and_revoked(ask: Ask) -> None:
    name = unique("robot")
    limits = {"requests_per_minute": 60, "money_per_month": 1.5}
    asked = {"name": name, "tenant": "acme", "scopes": ["inference"], "priority": "low", "limits": limits}

    made = await ask("POST", "/admin/keys", asked)
    listed = (await ask("GET", "/admin/keys")).json["keys"]
    revoked = await ask("DELETE", f"/admin/keys/{made.json['id']}")
    again = await ask("DELETE", f"/admin/keys/{made.json['id']}")

    assert made.status == 201
    assert made.json["key"].startswith("sk-sutazai-")
    told = {name: value for name, value in made.json.items() if name != "key"}
    assert told in listed
    assert made.json["key"] not in str(listed)
    assert (told["scopes"], told["priority"], told["role"]) == (["inference"], "low", "user")
    assert told["limits"] | limits == told["limits"]
    assert revoked.status == 200
    assert revoked.json["revoked_at"]
    assert again.status == 404
    assert "No live key" in again.json["error"]["message"]


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b"", None),
        (b"[]", None),
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": 5}, "name"),
        ({"name": "a", "tenant": ""}, "tenant"),
        ({"name": "a", "role": "root"}, "role"),
        ({"name": "a", "scopes": ["all"]}, "scopes[0]"),
        ({"name": "a", "scopes": []}, "scopes"),
        ({"name": "a", "scopes": ["admin"]}, "scopes"),
        ({"name": "a", "priority": "top"}, "priority"),
        ({"name": "a", "limits": {"requests_per_minute": -1}}, "limits.requests_per_minute"),
        ({"name": "a", "limits": {"requests_per_minute": 2**60}}, "limits.requests_per_minute"),
        ({"name": "a", "limits": {"request_per_minute": 1}}, "limits"),
        ({"name": "a", "limits": {"burst_s": 0}}, "limits.burst_s"),
        ({"name": "a", "scope": ["inference"]}, None),
    ],
)
async def test_a_key_that_cannot_be_is_a_400_that_names_the_field(ask: Ask, body: object, where: str | None) -> None:
    answer = await ask("POST", "/admin/keys", body)

    assert answer.status == 400
    assert answer.json["error"].get("param") == where


async def test_a_name_that_is_taken_is_refused(ask: Ask) -> None:
    name = unique("twice")
    await ask("POST", "/admin/keys", {"name": name})

    answer = await ask("POST", "/admin/keys", {"name": name})

    assert answer.status == 400
    assert "was there already" in answer.json["error"]["message"]


# tenants


async def test_a_tenant_is_put_read_replaced_and_deleted(ask: Ask) -> None:
    path = f"/admin/tenants/{unique('acme')}"
    made = await ask("PUT", path, {"weight": 2, "priority": "high", "limits": {"tokens_per_minute": 10}})
    read = await ask("GET", path)
    replaced = await ask("PUT", path, {})
    listed = (await ask("GET", "/admin/tenants")).json["tenants"]
    deleted = await ask("DELETE", path)

    assert made.status == 200
    assert made.json == read.json
    assert (read.json["weight"], read.json["priority"], read.json["is_defined"]) == (2.0, "high", True)
    assert read.json["limits"]["tokens_per_minute"] == 10
    assert (replaced.json["weight"], replaced.json["limits"]["tokens_per_minute"]) == (1.0, None)
    assert replaced.json in listed
    assert deleted.json["is_defined"] is False
    assert [(await ask(method, path)).status for method in ("GET", "DELETE")] == [404, 404]


async def test_a_tenant_that_only_a_key_names_is_told_with_the_defaults(ask: Ask) -> None:
    name = unique("acme")
    key = (await ask("POST", "/admin/keys", {"name": name, "tenant": name})).json
    named = await ask("GET", f"/admin/tenants/{name}")
    await ask("DELETE", f"/admin/keys/{key['id']}")
    forgotten = await ask("GET", f"/admin/tenants/{name}")

    assert (named.json["weight"], named.json["is_defined"]) == (1.0, False)
    assert forgotten.status == 404


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"weight": 0}, "weight"),
        ({"weight": -1}, "weight"),
        ({"weight": "2"}, "weight"),
        ({"priority": "top"}, "priority"),
        ({"limits": {"bytes_per_minute": 1.5}}, "limits.bytes_per_minute"),
        ({"wieght": 2}, None),
    ],
)
async def test_a_tenant_that_cannot_be_is_a_400_that_names_the_field(ask: Ask, body: object, where: str | None) -> None:
    answer = await ask("PUT", "/admin/tenants/acme", body)

    assert answer.status == 400
    assert answer.json["error"].get("param") == where


async def test_a_tenant_whose_name_cannot_be_shown_is_refused(ask: Ask) -> None:
    assert (await ask("PUT", "/admin/tenants/a%0Ab", {})).status == 400
    assert (await ask("PUT", f"/admin/tenants/{'a' * 65}", {})).status == 400


@pytest.mark.parametrize(("path", "allowed"), [("/admin/keys", "GET, HEAD, POST"), ("/admin/audit", "GET, HEAD")])
async def test_another_method_is_a_405_that_tells_the_right_ones(ask: Ask, path: str, allowed: str) -> None:
    answer = await ask("PATCH", path, {})

    assert (answer.status, answer.headers["allow"]) == (405, allowed)


# the log


async def test_what_the_database_changes_is_one_entry(ask: Ask) -> None:
    name = unique("robot")
    made = await ask("POST", "/admin/keys", {"name": name})
    await ask("DELETE", f"/admin/keys/{made.json['id']}")
    await ask("PUT", f"/admin/tenants/{name}", {"weight": 3})
    await ask("DELETE", f"/admin/tenants/{name}")

    keys, tenants = await entries(ask, subject=made.json["id"]), await entries(ask, subject=name)
    assert [(entry["action"], entry["outcome"]) for entry in keys] == [("key.created", "done"), ("key.revoked", "done")]
    assert [entry["action"] for entry in tenants] == ["tenant.set", "tenant.deleted"]
    assert {entry["actor"] for entry in keys + tenants} == {"local"}
    assert keys[0]["request_id"] == made.headers["x-request-id"]
    assert made.json["key"] not in str(keys)


async def test_a_cancelled_request_is_written_down_before_and_after(
    gateways: StartGateway, node: FakeNode, dial: Dial
) -> None:
    gateway = await gateways(node)
    node.default = Fault.stall_before_head()
    asking, admin = await dial(gateway.port), await dial(gateway.port)
    asking.post("/v1/chat/completions", CHAT)
    await node.wait_for(1)
    sent(admin, "GET", "/admin/requests")
    (request,) = (await admin.answer()).json["requests"]
    sent(admin, "DELETE", f"/admin/requests/{request['id']}")
    cancelled = await admin.answer()
    sent(admin, "GET", "/admin/audit?limit=2")
    after, before = (await admin.answer()).json["entries"]

    assert cancelled.status == 200
    assert (await asking.answer()).status == 499
    assert [entry["outcome"] for entry in (before, after)] == ["begun", "done"]
    assert {entry["subject"] for entry in (before, after)} == {request["id"]}
    assert {entry["request_id"] for entry in (before, after)} == {cancelled.headers["x-request-id"]}
    assert before["detail"] == {"tenant": "local"}


@pytest.mark.parametrize(
    ("method", "path", "body", "action"),
    [
        ("POST", "/api/pull", {"model": "qwen3"}, "model.pulled"),
        ("POST", "/api/pull", {"model": "qwen3", "stream": False}, "model.pulled"),
        ("POST", "/api/copy", {"source": "llama3", "destination": "qwen3"}, "model.copied"),
        ("DELETE", "/api/delete", {"model": "llama3"}, "model.deleted"),
        ("POST", "/admin/cache/forget", {"model": "qwen3"}, "cache.forgotten"),
    ],
)
async def test_what_happens_elsewhere_is_written_down_before_and_after(
    ask: Ask, method: str, path: str, body: object, action: str
) -> None:
    answer = await ask(method, path, body)

    told = await entries(ask, request_id=answer.headers["x-request-id"])
    assert answer.status == 200
    assert [(entry["action"], entry["outcome"]) for entry in told] == [(action, "begun"), (action, "done")]


@pytest.mark.parametrize("body", [{"model": "nope"}, {"model": "nope", "stream": False}], ids=["stream", "unary"])
async def test_a_pull_that_failed_is_written_down_as_such(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, body: object
) -> None:
    gateway = await gateways(await fake_nodes(registry=["other"]))
    wire = await dial(gateway.port)
    sent(wire, "POST", "/api/pull", body)
    pulled = await wire.answer()
    sent(wire, "GET", "/admin/audit?limit=2")
    after, before = (await wire.answer()).json["entries"]

    assert "file does not exist" in pulled.body.decode()
    assert (before["outcome"], after["outcome"]) == ("begun", "failed")
    assert "file does not exist" in after["detail"]["why"]


async def test_an_action_that_was_refused_is_written_down_as_failed(ask: Ask) -> None:
    answer = await ask("DELETE", "/api/delete", {"model": "nowhere"})

    told = await entries(ask, request_id=answer.headers["x-request-id"])
    assert answer.status == 404
    assert [entry["outcome"] for entry in told] == ["begun", "failed"]


async def test_a_pull_whose_client_left_is_written_down_as_such(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    gateway = await gateways(await fake_nodes(pull_s=60.0))
    leaving, admin = await dial(gateway.port), await dial(gateway.port)
    sent(leaving, "POST", "/api/pull", {"model": "qwen3"})
    request_id = (await leaving.head()).headers["x-request-id"]
    await leaving.chunk()
    leaving.writer.close()
    async with asyncio.timeout(5.0):
        while True:
            sent(admin, "GET", "/admin/audit?limit=1")
            (newest,) = (await admin.answer()).json["entries"]
            if newest["outcome"] != "begun":
                break
            await asyncio.sleep(0.02)

    assert (newest["request_id"], newest["outcome"]) == (request_id, "failed")
    assert "client left" in newest["detail"]["why"]


async def test_the_log_is_read_in_pages(ask: Ask) -> None:
    for number in range(3):
        await ask("PUT", f"/admin/tenants/page-{number}", {})

    first = (await ask("GET", "/admin/audit?limit=2")).json
    second = (await ask("GET", f"/admin/audit?limit=2&before={first['next_before']}")).json
    last = (await ask("GET", "/admin/audit?limit=1&before=2")).json

    numbers = [entry["number"] for entry in first["entries"] + second["entries"]]
    assert numbers == list(range(numbers[0], numbers[0] - 4, -1))
    assert [entry["subject"] for entry in first["entries"]] == ["page-2", "page-1"]
    assert ([entry["number"] for entry in last["entries"]], last["next_before"]) == ([1], None)


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "limit=-1", "limit=%C2%B2", "before=0", f"before={2**63}", "before="]
)
async def test_a_page_that_cannot_be_is_a_400(ask: Ask, query: str) -> None:
    answer = await ask("GET", f"/admin/audit?{query}")

    assert (answer.status, answer.json["error"]["param"]) == (400, query.partition("=")[0])


async def test_without_the_log_nothing_is_done(
    gateways: StartGateway, node: FakeNode, dial: Dial, data_dir: Path, stores: Stores
) -> None:
    """The log refuses, as a full disk would make it: so do the actions, with a 503."""
    key, _ = await stores.keys.create(name=unique("laptop"), tenant="acme", role=Role.USER)
    gateway = await gateways(node)
    wire = await dial(gateway.port)
    server = EmbeddedPostgres()
    connection: Any = await asyncpg.connect(await server.start(data_dir))
    try:
        await connection.execute("ALTER TABLE audit ADD CONSTRAINT full_disk CHECK (false) NOT VALID")
        for method, path, body in (
            ("POST", "/admin/keys", {"name": unique("other")}),
            ("DELETE", f"/admin/keys/{key.id}", None),
            ("PUT", "/admin/tenants/acme", {"weight": 9}),
            ("POST", "/api/pull", {"model": "qwen3"}),
            ("DELETE", "/api/delete", {"model": "llama3"}),
            ("POST", "/admin/cache/forget", {}),
        ):
            sent(wire, method, path, body)
            assert (await wire.answer()).status == 503, path
    finally:
        await connection.execute("ALTER TABLE audit DROP CONSTRAINT full_disk")
        await connection.close()
        await server.stop()

    assert [one.revoked_at for one in await stores.keys.all() if one.id == key.id] == [None]
    assert not any(seen.path in {"/api/pull", "/api/delete"} for seen in node.requests)


# usage


async def test_usage_is_told_from_a_time_on(ask: Ask, stores: Stores) -> None:
    model = unique("m")
    for year in (2019, 2020):
        hour = datetime(year, 1, 1, tzinfo=UTC)
        row = UsageRow(
            key_id="k", tenant="t", model=model, hour=hour, requests=3, errors=1, input_tokens=5, output_tokens=7
        )
        await stores.usage.add([row])

    async def told(query: str) -> list[int]:
        rows = (await ask("GET", f"/admin/usage{query}")).json["usage"]
        return [row["requests"] for row in rows if row["model"] == model]

    assert await told("") == []
    assert await told("?since=2019-06-01T00:00:00Z") == [3]
    assert await told("?since=2019-01-01T01:00:00%2B01:00") == [6]
    assert await told("?since=2019-01-01T01:00:00+01:00") == [6]


@pytest.mark.parametrize("since", ["yesterday", "0001-01-01T00:00:00%2B14:00", "9999-12-31T23:59:59-14:00"])
async def test_a_time_that_cannot_be_is_a_400(ask: Ask, since: str) -> None:
    answer = await ask("GET", f"/admin/usage?since={since}")

    assert (answer.status, answer.json["error"]["param"]) == (400, "since")


async def test_answers_of_a_model_are_forgotten_by_both_of_its_names(ask: Ask) -> None:
    for model, text in (("llama3", "a"), ("llama3:latest", "b")):
        assert (await ask("POST", "/v1/embeddings", {"model": model, "input": text})).status == 200

    assert (await ask("POST", "/admin/cache/forget", {"model": "llama3"})).json == {"forgotten": 2}


async def test_what_is_written_down_of_forgetting_says_what_was_meant(ask: Ask) -> None:
    answer = await ask("POST", "/admin/cache/forget", {"tenant": ""})
    endless = await ask("POST", "/admin/cache/forget", {"tag": "x" * 513})

    told = await entries(ask, request_id=answer.headers["x-request-id"])
    assert {entry["subject"] for entry in told} == {""}, "answers that are everybody's, and not everything"
    assert (endless.status, endless.json["error"]["param"]) == (400, "tag")


# who may


SCOPED = [
    (Role.USER, frozenset({Scope.INFERENCE}), 200, 200, 403),
    (Role.USER, frozenset({Scope.TASKS}), 403, 403, 403),
    (Role.ADMIN, frozenset({Scope.ADMIN}), 403, 403, 200),
    (Role.ADMIN, frozenset({Scope.INFERENCE}), 200, 200, 403),
    (Role.ADMIN, None, 200, 200, 200),
]


@pytest.mark.parametrize(("role", "scopes", "chat", "models", "admin"), SCOPED)
async def test_a_key_does_what_its_scopes_say(
    gateways: StartGateway,
    node: FakeNode,
    dial: Dial,
    stores: Stores,
    role: Role,
    scopes: frozenset[Scope] | None,
    chat: int,
    models: int,
    admin: int,
) -> None:
    _, key = await stores.keys.create(name=unique("scoped"), tenant="acme", role=role, scopes=scopes)
    gateway = await gateways(node, auth=Auth(required=True))
    wire = await dial(gateway.port)

    async def answer(method: str, path: str, body: object = None) -> Answered:
        sent(wire, method, path, body, key)
        return await wire.answer()

    chats = [await answer("POST", path, CHAT) for path in ("/v1/chat/completions", "/api/chat", "/api/chat")]
    lists = [await answer("GET", path) for path in ("/v1/models", "/v1/models/llama3", "/api/tags", "/api/ps")]
    kept = [await answer("GET", "/admin/keys"), await answer("POST", "/api/pull", {"model": "qwen3"})]

    assert [one.status for one in chats] == [chat] * 3
    assert [one.status for one in lists] == [models] * 4
    assert [one.status for one in kept] == [admin] * 2
    for one in (*chats, *lists):
        if one.status == 403:
            assert "scope `inference`" in str(one.json["error"])
            assert "keys create NAME --scope inference" in str(one.json["error"])
    if admin == 403:
        assert "scope `admin`" in kept[0].json["error"]["message"]
        assert "scope `admin`" in kept[1].json["error"]


async def test_a_key_made_over_http_counts_in_every_gateway_within_a_second(
    gateways: StartGateway, node: FakeNode, dial: Dial, stores: Stores
) -> None:
    _, admin = await stores.keys.create(name=unique("ops"), tenant="platform", role=Role.ADMIN)
    one, two = [await gateways(node, auth=Auth(required=True)) for _ in range(2)]
    here, there = await dial(one.port), await dial(two.port)
    sent(here, "POST", "/admin/keys", {"name": unique("robot")}, admin)
    made = (await here.answer()).json

    async def until(status: int) -> float:
        began_at = time.monotonic()
        async with asyncio.timeout(5.0):
            while True:
                sent(there, "GET", "/v1/models", None, made["key"])
                if (await there.answer()).status == status:
                    return time.monotonic() - began_at
                await asyncio.sleep(0.01)

    assert await until(200) < KNOWN_S
    sent(here, "DELETE", f"/admin/keys/{made['id']}", None, admin)
    assert (await here.answer()).status == 200
    assert await until(401) < KNOWN_S
