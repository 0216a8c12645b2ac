"""Clients that race, flood and send nonsense, through real gateways on a real database."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sutazai.adapters.postgres.stores import open_stores
from sutazai.core.identity import Role, Tenant
from sutazai.ports.tasks import TaskFilter
from sutazai.settings.model import Auth, Database, Tasks
from sutazai.tasks.bound import COUNT_S
from sutazai.testing.plain_agents import plain_agents

if TYPE_CHECKING:
    from tests.conftest import Answered, Dial, StartGateway, Wire

    from sutazai.adapters.postgres.stores import Stores

CLIENTS = 50
LIMIT_S = 30.0
MANY = 1000


@pytest.fixture
async def stores(data_dir: Path) -> AsyncIterator[Stores]:
    """The same database as the gateway's."""
    async with open_stores(Database(), data_dir) as opened:
        yield opened


@pytest.fixture
def tenant() -> str:
    """One whom no other test knows."""
    return f"tenant-{uuid.uuid4().hex[:12]}"


async def key_of(stores: Stores, tenant: str) -> str:
    _, key = await stores.keys.create(name=tenant, tenant=tenant, role=Role.USER)
    return f"x-api-key: {key}"


async def kept(stores: Stores, tenant: str) -> int:
    """Tasks that a tenant has."""
    return len(await stores.tasks.page(tenant, TaskFilter(), limit=MANY))


async def flood(wires: Sequence[Wire], rounds: int, *headers: str, **body: Any) -> list[Answered]:
    """Many clients at once, each some times in a row."""

    async def client(wire: Wire) -> list[Answered]:
        answers = []
        for _ in range(rounds):
            wire.post("/v1/tasks", {"agent": "anything"} | body, *headers)
            answers.append(await wire.answer())
        return answers

    async with asyncio.timeout(LIMIT_S):
        return [one for some in await asyncio.gather(*map(client, wires)) for one in some]


def accepted(answers: Sequence[Answered]) -> int:
    assert {answer.status for answer in answers} <= {202, 429}
    return sum(answer.status == 202 for answer in answers)


# A tenant's bound


async def test_a_tenant_that_floods_is_told_to_come_back_and_others_still_submit(
    gateways: StartGateway, dial: Dial, stores: Stores, tenant: str
) -> None:
    greedy, other = await key_of(stores, tenant), await key_of(stores, f"{tenant}-2")
    gateway = await gateways(
        agents=plain_agents(), auth=Auth(required=True), tasks=Tasks(worker=False, max_waiting_per_tenant=30)
    )
    wires = [await dial(gateway.port) for _ in range(10)]

    answers = await flood(wires, 10, greedy)
    refused = next(answer for answer in answers if answer.status == 429)

    assert accepted(answers) == await kept(stores, tenant) == 30
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json["error"]["type"] == "rate_limit_error"
    assert refused.json["error"]["message"].startswith(f"30 tasks of the tenant '{tenant}' waited already")
    assert accepted(await flood(wires, 2, other)) == 20


async def test_a_tenant_can_have_a_bound_of_its_own(
    gateways: StartGateway, dial: Dial, stores: Stores, tenant: str
) -> None:
    await stores.tenants.set(Tenant(name=tenant, waiting_tasks=3))
    key = await key_of(stores, tenant)
    wire = await dial((await gateways(agents=plain_agents(), auth=Auth(required=True))).port)

    assert accepted(await flood([wire], 5, key)) == await kept(stores, tenant) == 3


async def test_a_tenant_at_its_bound_hears_again_of_the_task_that_its_key_made(
    gateways: StartGateway, dial: Dial, stores: Stores, tenant: str
) -> None:
    """And of no other: a key that made none is refused."""
    await stores.tenants.set(Tenant(name=tenant, waiting_tasks=1))
    key = await key_of(stores, tenant)
    wire = await dial((await gateways(agents=plain_agents(), auth=Auth(required=True))).port)

    first, again = await flood([wire], 2, key, idempotency_key="monday")
    (other,) = await flood([wire], 1, key, idempotency_key="tuesday")

    assert (first.status, again.status, other.status) == (202, 202, 429)
    assert again.json["id"] == first.json["id"]


async def test_gateways_go_past_a_bound_by_no_more_than_they_admit_between_two_counts(
    gateways: StartGateway, dial: Dial, stores: Stores, tenant: str
) -> None:
    key = await key_of(stores, tenant)
    bound = Tasks(worker=False, max_waiting_per_tenant=40)
    both = [await gateways(agents=plain_agents(), auth=Auth(required=True), tasks=bound) for _ in range(2)]
    wires = [await dial(gateway.port) for gateway in both for _ in range(5)]

    first = await flood(wires, 20, key)
    assert 40 <= accepted(first) == await kept(stores, tenant) <= 80

    await asyncio.sleep(COUNT_S)  # counted anew
    assert accepted(await flood(wires, 5, key)) == 0


# Racing


async def test_fifty_clients_with_one_idempotency_key_get_one_task(
    gateways: StartGateway, dial: Dial, stores: Stores, tenant: str
) -> None:
    """Through two gateways; whatever else they ask for."""
    key = await key_of(stores, tenant)
    both = [await gateways(agents=plain_agents(), auth=Auth(required=True)) for _ in range(2)]
    wires = [await dial(both[number % 2].port) for number in range(CLIENTS)]

    async def client(number: int, wire: Wire) -> str:
        wire.post("/v1/tasks", {"agent": "anything", "input": number, "idempotency_key": "once"}, key)
        answer = await wire.answer()
        assert answer.status == 202, answer.body
        found: str = answer.json["id"]
        return found

    async with asyncio.timeout(LIMIT_S):
        ids = await asyncio.gather(*(client(number, wire) for number, wire in enumerate(wires)))

    assert len(set(ids)) == 1
    assert await kept(stores, tenant) == 1
    assert [one.kind for one in await stores.tasks.events(tenant, ids[0], limit=MANY)] == ["task.submitted"]


# Nonsense


async def test_an_input_of_a_megabyte_comes_back_as_it_was_and_one_of_more_is_refused(
    gateways: StartGateway, dial: Dial, stores: Stores
) -> None:
    wire = await dial((await gateways(agents=plain_agents())).port)
    largest = "ü" * (2**19 - 1)  # two bytes each, and the quotes
    wire.post("/v1/tasks", {"agent": "anything", "input": largest})
    answer = await wire.answer()
    wire.get(answer.headers["location"])
    shown = await wire.answer()
    wire.post("/v1/tasks", {"agent": "anything", "input": largest + "a"})
    refused = await wire.answer()

    assert (answer.status, shown.json["input"]) == (202, largest)
    assert (refused.status, refused.json["error"]["param"]) == (413, "input")


WORDS = st.text(max_size=20) | st.sampled_from(
    ["", "\0", "\ud800", "task_" + "0" * 32, "task_" + "f" * 32, "echo", "anything", "NaN", "1e999", "9" * 400, "../.."]
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | WORDS
    | st.sampled_from([2**63, -(2**63), 2**200, 1e308, "0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999+23:59"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
FIELDS = (
    "agent", "input", "priority", "run_at", "deadline", "idempotency_key", "parent", "after", "webhook", "max_attempts",
    "time_limit_s", "budget_tokens", "cron", "timezone", "input_file_id", "endpoint", "completion_window",
)  # fmt: skip
BODIES = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6) | st.fixed_dictionaries(
    {"agent": st.sampled_from(["echo", "anything"])}, optional=dict.fromkeys(FIELDS[1:12], JSON)
)
PATHS = ("/v1/tasks", "/v1/schedules", "/v1/batches")
NAMES = st.text(st.characters(codec="ascii", exclude_characters=" ?#/\r\n\0\x7f", min_codepoint=33), max_size=40)
QUERIES = st.dictionaries(st.sampled_from(["limit", "after", "status", "agent", "parent", "x"]), NAMES, max_size=3)


def plain(value: object) -> bytes:
    """As JSON by the one writer that also writes what JSON does not have: NaN, infinities and half pairs."""
    return json.dumps(value).encode()


@pytest.mark.deadline(120)
@given(path=st.sampled_from(PATHS), body=BODIES | JSON)
@settings(
    deadline=None, max_examples=200, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_whatever_is_submitted_is_kept_or_blamed_on_the_client_and_then_not_kept(
    wire: Wire, stores: Stores, path: str, body: object
) -> None:
    before = await newest(wire, path)
    wire.post(path, plain(body))
    async with asyncio.timeout(LIMIT_S):
        answer = await wire.answer()

    assert answer.status < 500, (path, body, answer)
    if answer.status >= 400:
        assert answer.json["error"]["message"].strip()[-1] in ".?", answer.body
        assert await newest(wire, path) == before
    else:
        assert await newest(wire, path) == answer.json["id"]


@pytest.mark.deadline(120)
@given(
    method=st.sampled_from(["GET", "DELETE", "POST", "PUT", "HEAD", "PATCH"]),
    path=st.sampled_from(PATHS),
    name=NAMES | st.sampled_from(["task_" + "0" * 32, "schedule_" + "0" * 32, "batch_" + "0" * 32, "%00", "%ff", "%"]),
    rest=st.sampled_from(["", "/events", "/retry", "/cancel", "/x"]),
    query=QUERIES,
    seen=NAMES,
)
@settings(
    deadline=None, max_examples=200, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_whatever_address_is_asked_no_gateway_fails(
    wire: Wire, method: str, path: str, name: str, rest: str, query: dict[str, str], seen: str
) -> None:
    asked = "&".join(f"{key}={value}" for key, value in query.items())
    headers = f"Host: localhost\r\nContent-Length: 0\r\nLast-Event-ID: {seen}\r\n\r\n"
    wire.send(f"{method} {path}/{name}{rest}?{asked} HTTP/1.1\r\n{headers}".encode())
    async with asyncio.timeout(LIMIT_S):
        answer = await wire.answer(has_body=method != "HEAD")

    assert answer.status < 500, (method, path, name, rest, query, answer)


@pytest.fixture
async def wire(gateways: StartGateway, dial: Dial) -> Wire:
    return await dial((await gateways(agents=plain_agents(), tasks=Tasks(worker=False))).port)


async def newest(wire: Wire, path: str) -> str:
    """The id of what was made last; empty where nothing is there."""
    wire.get(f"{path}?limit=1")
    data = msgspec.json.decode((await wire.answer()).body)["data"]
    return data[0]["id"] if data else ""
