"""
No tenant learns of another: every address that the API description names is asked with foreign keys.

Tenant A leaves canaries wherever something is kept: names, a prompt under way, an answer, a session, a task. Each
hostile tenant knows one of them, and puts it wherever the description has room for a text. What it gets back must hold
none of the others. New addresses are asked as soon as they are described, and one that is not described fails a test.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import Mock
from urllib.parse import quote

import msgspec
import pytest

from sutazai.adapters.postgres.stores import open_stores
from sutazai.core.identity import Role, Scope, Tenant
from sutazai.edge import public
from sutazai.edge.app import build
from sutazai.edge.openapi import document
from sutazai.settings.model import Auth, Database, NodeSettings
from sutazai.testing import Answer, Fault
from sutazai.testing.plain_agents import plain_agents

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Dial, StartGateway, StartNode

    from sutazai.adapters.postgres.stores import Stores
    from sutazai.edge.pool import Pool

DESCRIBED = document()
FOR_PROBES = {"/healthz", "/readyz"}
FOR_ALL = FOR_PROBES | {"/openapi.json"} | {route.path for route in public.routes()}
FOR_ANY_KEY = FOR_ALL | {"/metrics", "/api/version"}
"""Addresses that tell the same to everybody and ask no model."""
FOR_TASKS = ("/v1/tasks", "/v1/agents", "/v1/webhooks", "/v1/schedules")
METHODS = ("get", "post", "put", "patch", "delete")
QUIET_S = 10.0


# what is asked


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one address, as it is described."""

    method: str
    path: str
    described: Mapping[str, Any]

    def request(self, word: str, key: str) -> bytes:
        """A request that is well formed, with `word` wherever there is room for a text."""
        path, query = self.path, []
        for parameter in self.described.get("parameters", ()):
            text = quote(str(sample(parameter["schema"], word)), safe="")
            if parameter["in"] == "path":
                path = path.replace("{" + parameter["name"] + "}", text)
            elif parameter["in"] == "query":
                query.append(f"{parameter['name']}={text}")
        body = b""
        if "requestBody" in self.described:
            ((kind, content),) = self.described["requestBody"]["content"].items()
            value = sample(content["schema"], word)
            body = msgspec.json.encode(value) if kind == "application/json" else form(value, word)
        return raw(self.method, path + ("?" + "&".join(query) if query else ""), body, word, key)


def operations() -> Iterator[Operation]:
    for path, item in DESCRIBED["paths"].items():
        for method in METHODS:
            if method in item:
                yield Operation(method.upper(), path, item[method])


OPERATIONS = list(operations())
every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: f"{one.method} {one.path}")


def form(value: object, word: str) -> bytes:
    """The same as a form, with the word as the name of every file."""
    parts = [
        f'--b0\r\nContent-Disposition: form-data; name="{name}"; filename="{word}"\r\n\r\n{text}\r\n'
        for name, text in cast("dict[str, str]", value).items()
    ]
    return "".join([*parts, "--b0--\r\n"]).encode()


def raw(method: str, path: str, body: bytes, word: str, key: str) -> bytes:
    """Bytes of a request whose headers claim to belong to whatever the word names."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    lines += ["Content-Type: multipart/form-data; boundary=b0"] if body.startswith(b"--b0") else []
    lines += [f"{name}: {word}" for name in ("x-sutazai-session", "x-request-id", "x-sutazai-tenant", "x-tenant-id")]
    return "\r\n".join([*lines, "", ""]).encode() + body


def sample(schema: Mapping[str, Any], word: str) -> object:
    """A value that fits the schema."""
    if "$ref" in schema:
        return sample(DESCRIBED["components"]["schemas"][schema["$ref"].rpartition("/")[2]], word)
    if "anyOf" in schema or "oneOf" in schema:
        choices = schema.get("anyOf") or schema["oneOf"]
        return sample(next(choice for choice in choices if choice.get("type") != "null"), word)
    if "enum" in schema or "const" in schema:
        return schema["enum"][0] if "enum" in schema else schema["const"]
    kinds = schema.get("type", "object")
    kind = kinds if isinstance(kinds, str) else kinds[0]
    if kind == "object":
        return {name: sample(inner, word) for name, inner in schema.get("properties", {}).items()}
    if kind == "array":
        return [sample(schema.get("items", {"type": "string"}), word)]
    if kind == "string":
        known = schema.get("examples") or ["2026-01-01T00:00:00Z"] * (schema.get("format") == "date-time")
        return "llama3" if "sutazai-trial" in known else known[0] if known else word
    return {"boolean": False, "integer": 1, "number": 1.0}[kind]


# where it is asked


@dataclass(slots=True)
class Place:
    """A gateway with what tenant A left there."""

    port: int
    admin: str
    owner: str
    """The key of tenant A."""
    session: str
    """The id of A's session."""
    task: str
    """The id of A's task."""
    file: str
    """The id of A's file."""
    under_way: str
    """The id of A's request that a node works on."""
    canaries: dict[str, str]
    """By what they are; each is a text that nobody else would come upon."""
    hostile: dict[str, str]
    """For each canary the key of a tenant that knows this one alone."""
    dial: Dial

    async def said(self, request: bytes) -> tuple[int, bytes]:
        """The status, and all bytes of the answer."""
        wire = await self.dial(self.port)
        wire.send(request.replace(b"Host: localhost", b"Host: localhost\r\nConnection: close", 1))
        async with asyncio.timeout(QUIET_S):
            answer = await wire.rest()
        return int(answer.split(b" ", 2)[1]), answer

    async def ask(self, method: str, path: str, body: object = None, *, key: str) -> Any:
        """The body of a good answer."""
        encoded = b"" if body is None else msgspec.json.encode(body)
        status, answer = await self.said(raw(method, path, encoded, "own", key))
        assert status < 300, answer
        return msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])


@pytest.fixture
async def stores(data_dir: Path) -> AsyncIterator[Stores]:
    async with open_stores(Database(), data_dir) as opened:
        yield opened


QUESTION = {"model": "llama3", "messages": [{"role": "user", "content": "canary-question"}], "temperature": 0}
SECRET_PROMPT = {"model": "llama3", "messages": [{"role": "user", "content": "canary-prompt"}], "temperature": 0}


@pytest.fixture
async def place(gateways: StartGateway, fake_nodes: StartNode, dial: Dial, stores: Stores) -> Place:
    await _revoke_all(stores)
    node = await fake_nodes(slots=64)
    admin_key, admin = await stores.keys.create(name="canary-ops", tenant="canary-platform", role=Role.ADMIN)
    owner_key, owner = await stores.keys.create(name="canary-laptop", tenant="canary-acme", role=Role.USER)
    await stores.tenants.set(Tenant(name="canary-acme", weight=2.0))
    gateway = await gateways(
        NodeSettings(url=node.url, kind=node.kind.value, slots=64), auth=Auth(required=True), agents=plain_agents()
    )
    found = Place(gateway.port, admin, owner, "", "", "", "", {}, {}, dial)

    node.script.extend([Answer(tokens=("canary-", "answer")), Answer(tokens=("canary-", "answer"))])
    draft = {"model": "llama3", "system": "canary-system", "metadata": {"canary-meta": "canary-value"}}
    found.session = (await found.ask("POST", "/v1/sessions", draft, key=owner))["id"]
    turn = {"messages": [{"role": "user", "content": "canary-turn"}]}
    await found.ask("POST", f"/v1/sessions/{found.session}/chat/completions", turn, key=owner)
    await found.ask("POST", "/v1/chat/completions", QUESTION, key=owner)
    errand = {"agent": "echo", "input": {"text": "canary-input"}, "idempotency_key": "canary-once"}
    found.task = (await found.ask("POST", "/v1/tasks", errand, key=owner))["id"]
    upload = form({"purpose": "batch", "file": "canary-content"}, "canary-file")
    _, answer = await found.said(raw("POST", "/v1/files", upload, "own", owner))
    found.file = msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])["id"]
    node.script.append(Fault.stall_before_head())
    before, asking = len(node.inferences), await dial(gateway.port)
    asking.post("/v1/chat/completions", SECRET_PROMPT, f"Authorization: Bearer {owner}")
    await node.wait_for(before + 1)
    (request,) = (await found.ask("GET", "/admin/requests", key=admin))["requests"]
    found.under_way = request["id"]

    found.canaries = {
        "tenant": "canary-acme",
        "key name": "canary-laptop",
        "key id": owner_key.id,
        "admin's key name": "canary-ops",
        "admin's key id": admin_key.id,
        "admin's tenant": "canary-platform",
        "request id": found.under_way,
        "session id": found.session,
        "session's system": "canary-system",
        "session's metadata": "canary-meta",
        "session's value": "canary-value",
        "task id": found.task,
        "task's input": "canary-input",
        "task's key": "canary-once",
        "file id": found.file,
        "file's name": "canary-file",
        "file's content": "canary-content",
        "turn": "canary-turn",
        "prompt": "canary-prompt",
        "answer": "canary-answer",
    }
    for what in found.canaries:
        name = f"hostile {what}"
        _, found.hostile[what] = await stores.keys.create(name=name, tenant=name, role=Role.USER)
    await _known(found)
    return found


async def _revoke_all(stores: Stores) -> None:
    """The keys of an earlier test: their names are needed again."""
    for key in await stores.keys.all():
        if key.revoked_at is None and key.name.startswith(("canary", "hostile")):
            await stores.keys.revoke(key.id)


async def _known(found: Place) -> None:
    """Wait until the gateway knows the newest key."""
    newest = list(found.hostile.values())[-1]
    async with asyncio.timeout(QUIET_S):
        while (await found.said(raw("GET", "/v1/models", b"", "own", newest)))[0] == 401:
            await asyncio.sleep(0.02)


# what must not come back


def is_in(word: str, told: bytes) -> bool:
    """Whether the word is told; the ids of other requests may begin with the id of A's."""
    return re.search(re.escape(word.encode()) + rb"(?!\d)", told) is not None


@pytest.mark.deadline(120)
async def test_no_address_tells_a_foreign_tenant_anything(place: Place) -> None:
    """Neither in bodies nor in headers nor in errors, whatever it already knows; and nothing of A is changed."""
    leaks, wrong = [], []
    for what, key in place.hostile.items():
        others = {other: word for other, word in place.canaries.items() if word not in place.canaries[what]}
        for operation in OPERATIONS:
            status, answer = await place.said(operation.request(place.canaries[what], key))
            name = f"{operation.method} {operation.path} by whoever knows the {what}"
            leaks += [f"{name}: the {other}" for other, word in others.items() if is_in(word, answer)]
            if status >= 500 and operation.path not in FOR_PROBES:
                wrong.append(f"{name}: {status}")
            if operation.path.startswith("/admin") and status != 403:
                wrong.append(f"{name}: {status}")

    assert leaks == []
    assert wrong == []
    await _is_untouched(place)


async def _is_untouched(place: Place) -> None:
    session = await place.ask("GET", f"/v1/sessions/{place.session}", key=place.owner)
    said = await place.ask("GET", f"/v1/sessions/{place.session}/messages", key=place.owner)
    requests = (await place.ask("GET", "/admin/requests", key=place.admin))["requests"]
    tenant = await place.ask("GET", "/admin/tenants/canary-acme", key=place.admin)

    task = await place.ask("GET", f"/v1/tasks/{place.task}", key=place.owner)
    assert (task["status"], task["version"], task["input"]) == ("pending", 1, {"text": "canary-input"})
    file = await place.ask("GET", f"/v1/files/{place.file}", key=place.owner)
    assert (file["filename"], file["bytes"]) == ("canary-file", len("canary-content"))
    assert (session["turns"], "canary-answer" in str(said)) == (1, True)
    assert place.under_way in {request["id"] for request in requests}
    assert tenant["weight"] == 2.0


@pytest.mark.parametrize("question", [QUESTION, SECRET_PROMPT], ids=["answered", "under way"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_same_question_of_another_tenant_is_asked_anew(
    place: Place, question: Mapping[str, object], path: str, stream: bool
) -> None:
    """It is given neither A's answer nor a place beside A at the same one."""
    options = {"options": {"temperature": 0}} if path == "/api/chat" else {}
    body = msgspec.json.encode({**question, **options, "stream": stream})

    status, answer = await place.said(raw("POST", path, body, "x", place.hostile["turn"]))

    assert status == 200
    assert b"canary-" not in answer
    assert b"Hel" in answer
    assert b"x-sutazai-cache: hit" not in answer
    assert b"x-sutazai-cache: coalesced" not in answer


async def test_metrics_name_no_tenant_no_key_and_no_request(place: Place) -> None:
    for key in (place.owner, place.hostile["turn"]):
        status, page = await place.said(raw("GET", "/metrics", b"", "x", key))

        assert status == 200
        assert [what for what, word in place.canaries.items() if is_in(word, page)] == []


async def test_an_admin_is_told_of_all_tenants_but_of_no_prompt_and_no_secret(place: Place) -> None:
    """The canaries are there to be found: were they not, the other tests would prove nothing."""
    told = b""
    for operation in OPERATIONS:
        if operation.path.startswith("/admin") and operation.method == "GET":
            told += (await place.said(operation.request("canary-acme", place.admin)))[1]

    names = ("tenant", "key name", "key id", "admin's key name", "request id")
    assert [what for what in names if not is_in(place.canaries[what], told)] == []
    spoken = ("prompt", "answer", "turn", "session's system", "session's value")
    assert [what for what in spoken if is_in(place.canaries[what], told)] == []
    assert not any(key.encode() in told for key in (place.owner, place.admin, *place.hostile.values()))


# who may come in at all


@every_operation
async def test_without_a_key_only_what_is_public_is_answered(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, operation: Operation
) -> None:
    gateway = await gateways(await fake_nodes(), auth=Auth(required=True))
    place = Place(gateway.port, "", "", "", "", "", "", {}, {}, dial)

    statuses = [(await place.said(operation.request("x", key)))[0] for key in ("", "sk-sutazai-wrong")]

    assert [status == 401 for status in statuses] == [operation.path not in FOR_ALL] * 2


@pytest.mark.parametrize("scope", [Scope.TASKS, Scope.INFERENCE])
async def test_a_key_without_the_scope_is_refused_everywhere(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, stores: Stores, scope: Scope
) -> None:
    """Whoever adds an address has to say whom it is for: here are those that a key of one scope may use."""
    await _revoke_all(stores)
    _, key = await stores.keys.create(name="canary-one", tenant="t", role=Role.ADMIN, scopes=frozenset({scope}))
    gateway = await gateways(await fake_nodes(), auth=Auth(required=True))
    place = Place(gateway.port, "", "", "", "", "", "", {}, {}, dial)

    asked = [
        operation
        for operation in OPERATIONS
        if operation.path not in FOR_ANY_KEY and operation.path.startswith(FOR_TASKS) != (scope is Scope.TASKS)
    ]
    if scope is Scope.INFERENCE:
        asked = [operation for operation in asked if operation.path.startswith(("/admin", *FOR_TASKS))]
    statuses = {
        f"{operation.method} {operation.path}": (await place.said(operation.request("x", key)))[0]
        for operation in asked
    }

    assert asked
    assert {name: status for name, status in statuses.items() if status != 403} == {}


def test_every_address_is_described() -> None:
    """Else nobody would have asked it above."""
    answered = {route.path for route in build(cast("Pool", Mock())).routes if hasattr(route, "path")}
    known = {path.replace("{name}", "{name:path}") for path in DESCRIBED["paths"]} | set(DESCRIBED["paths"])

    assert answered - known == set()
