"""`/v1/tasks`, `/v1/schedules` and `/v1/agents` through a real gateway on a real database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from sutazai.adapters.postgres.stores import open_stores
from sutazai.core.identity import Role, Scope
from sutazai.core.task import Completed, Event, Failed, FailureReason, Progressed, Task
from sutazai.ports.tasks import Change, Start
from sutazai.settings.model import Auth, Database, Timeouts, Webhooks
from sutazai.settings.secret import Secret
from sutazai.testing.plain_agents import plain_agents

if TYPE_CHECKING:
    from tests.conftest import Answered, Dial, StartGateway, Wire

    from sutazai.adapters.postgres.stores import Stores

WEBHOOKS = Webhooks(secret=Secret("a-secret-of-this-test"))
NO_TASK = "task_" + "0" * 32


@pytest.fixture
async def stores(data_dir: Path) -> AsyncIterator[Stores]:
    """The same database as the gateway's, as a worker would open it."""
    async with open_stores(Database(), data_dir) as opened:
        yield opened


@pytest.fixture
async def wire(gateways: StartGateway, dial: Dial) -> Wire:
    return await dial((await gateways(agents=plain_agents(), webhooks=WEBHOOKS)).port)


async def posted(wire: Wire, *headers: str, **body: Any) -> Answered:
    wire.post("/v1/tasks", {"agent": "echo"} | body, *headers)
    return await wire.answer()


async def submitted(wire: Wire, **body: Any) -> str:
    answer = await posted(wire, **body)
    assert answer.status == 202, answer.body
    found: str = answer.json["id"]
    return found


async def got(wire: Wire, path: str, *headers: str, method: str = "GET") -> Answered:
    wire.get(path, *headers, method=method)
    return await wire.answer()


async def begun(stores: Stores, task_id: str) -> Task:
    """What a worker does first."""
    (task,) = await stores.tasks.begin([Start(task=task_id, may_take_over=False)], worker="w", delivery_limit=20)
    assert isinstance(task, Task)
    return task


async def happened(stores: Stores, task: Task, *events: Event) -> None:
    for event in events:
        assert (await stores.tasks.change([Change(task=task.id, event=event)]))[0] is not None


async def completed(stores: Stores, task_id: str) -> None:
    task = await begun(stores, task_id)
    await happened(stores, task, Completed(task.deliveries, '{"said": 1}'))


# submission


async def test_a_task_is_accepted_and_can_be_looked_at(wire: Wire) -> None:
    run_at = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    accepted = await posted(
        wire,
        input={"text": "hi"},
        priority="low",
        run_at=run_at,
        deadline=run_at + timedelta(hours=1),
        webhook="https://example.org/done",
        max_attempts=5,
        time_limit_s=7.5,
        budget_tokens=1000,
    )
    shown = await got(wire, accepted.headers["location"])

    assert accepted.status == 202
    assert shown.json == accepted.json
    assert datetime.fromisoformat(shown.json["run_at"]) == run_at
    assert {
        name: shown.json[name]
        for name in ("agent", "input", "status", "priority", "webhook", "max_attempts", "time_limit_s", "budget_tokens")
    } == {
        "agent": "echo",
        "input": {"text": "hi"},
        "status": "pending",
        "priority": "low",
        "webhook": "https://example.org/done",
        "max_attempts": 5,
        "time_limit_s": 7.5,
        "budget_tokens": 1000,
    }


async def test_the_same_idempotency_key_gives_the_same_task(wire: Wire) -> None:
    key = f"key-{datetime.now(UTC).timestamp()}"
    first = await posted(wire, idempotency_key=key)
    again = await posted(wire, f"Idempotency-Key: {key}", input={"text": "other"})
    both = await posted(wire, "Idempotency-Key: another", idempotency_key=key)

    assert first.json["id"] == again.json["id"]
    assert again.json["input"] == {}
    assert (both.status, both.json["error"]["param"]) == (400, "idempotency_key")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"agent": "ecko"}, 404, None),
        ({"agent": "echo", "input": {"text": 3}}, 400, "input.text"),
        ({"agent": "echo", "input": "x" * (2**20 + 1)}, 413, "input"),
        ({"agent": "echo", "run_at": "tomorrow"}, 400, "run_at"),
        ({"agent": "echo", "deadline": "2020-01-01T00:00:00Z"}, 400, "deadline"),
        ({"agent": "echo", "after": [NO_TASK]}, 400, "after"),
        ({"agent": "echo", "parent": NO_TASK}, 400, "parent"),
        ({"agent": "echo", "max_attempts": 0}, 400, "max_attempts"),
        ({"agent": "echo", "webhook": "gopher://x"}, 400, "webhook"),
        ({"agent": "echo", "agnet": "x"}, 400, None),
        ({}, 400, "agent"),
    ],
    ids=lambda one: str(one)[:60],
)
async def test_bad_tasks_are_refused_in_a_sentence_and_nothing_is_kept(
    wire: Wire, stores: Stores, body: dict[str, Any], status: int, param: str | None
) -> None:
    before = (await got(wire, "/v1/tasks?limit=1")).json["last_id"]
    wire.post("/v1/tasks", body)
    answer = await wire.answer()
    after = (await got(wire, "/v1/tasks?limit=1")).json["last_id"]

    assert (answer.status, answer.json["error"].get("param")) == (status, param), answer.body
    assert answer.json["error"]["message"].endswith((".", "?"))
    assert after == before


async def test_a_task_waits_for_another_and_is_released_by_its_end(wire: Wire, stores: Stores) -> None:
    first = await submitted(wire)
    second = await submitted(wire, after=[first])
    before = (await got(wire, f"/v1/tasks/{second}")).json
    await completed(stores, first)
    after = (await got(wire, f"/v1/tasks/{second}")).json

    assert (before["status"], before["after"]) == ("waiting", [first])
    assert after["status"] == "pending"


# webhooks


class Mailbox:
    """A web that keeps what is posted."""

    def __init__(self) -> None:
        self.got: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        assert headers["x-sutazai-signature"].startswith("t=")
        self.got.put_nowait((url, msgspec.json.decode(body)))
        return 200


async def test_the_end_of_a_task_is_told_to_its_webhook(gateways: StartGateway, dial: Dial, stores: Stores) -> None:
    mailbox = Mailbox()
    wire = await dial((await gateways(agents=plain_agents(), webhooks=WEBHOOKS, web=mailbox)).port)
    task_id = await submitted(wire, webhook="https://example.org/done")
    await completed(stores, task_id)
    async with asyncio.timeout(10):
        url, told = await mailbox.got.get()
        while told["data"]["id"] != task_id:  # of an earlier test
            url, told = await mailbox.got.get()

    assert (url, told["type"], told["data"]["result"]) == ("https://example.org/done", "task.completed", {"said": 1})


async def test_without_a_secret_no_webhook_is_taken(gateways: StartGateway, dial: Dial, wire: Wire) -> None:
    bare = await dial((await gateways(agents=plain_agents())).port)
    refused = await posted(bare, webhook="https://example.org/done")
    mine = await got(wire, "/v1/webhooks/secret")

    assert (refused.status, refused.json["error"]["param"]) == (400, "webhook")
    assert (await got(bare, "/v1/webhooks/secret")).status == 404
    assert mine.json["secret"].startswith("whsec_")


# lists, cancelling, retrying


async def test_tasks_are_listed_page_by_page_and_filtered(wire: Wire, stores: Stores) -> None:
    parent = await submitted(wire)
    mine = [await submitted(wire, parent=parent) for _ in range(5)]
    await completed(stores, mine[0])
    first = (await got(wire, f"/v1/tasks?parent={parent}&limit=2")).json
    rest = (await got(wire, f"/v1/tasks?parent={parent}&after={first['last_id']}")).json
    done = (await got(wire, f"/v1/tasks?parent={parent}&status=completed")).json
    none = (await got(wire, f"/v1/tasks?parent={parent}&agent=anything")).json

    assert [one["id"] for one in first["data"] + rest["data"]] == mine[::-1]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert [one["id"] for one in done["data"]] == [mine[0]]
    assert none == {"object": "list", "data": [], "has_more": False, "last_id": None}
    assert "input" not in first["data"][0]


@pytest.mark.parametrize("query", ["status=done", "limit=0", "limit=101", "after=x", "parent=task_1", "agent=%00"])
async def test_a_list_that_is_not_understood_is_refused(wire: Wire, query: str) -> None:
    answer = await got(wire, f"/v1/tasks?{query}")

    assert (answer.status, answer.json["error"]["param"]) == (400, query.partition("=")[0])


async def test_a_task_that_waits_is_cancelled_and_one_that_runs_is_asked_to_end(wire: Wire, stores: Stores) -> None:
    waits, runs = await submitted(wire), await submitted(wire)
    child = await submitted(wire, parent=waits)
    task = await begun(stores, runs)
    first = (await got(wire, f"/v1/tasks/{waits}", method="DELETE")).json
    second = (await got(wire, f"/v1/tasks/{runs}", method="DELETE")).json
    again = (await got(wire, f"/v1/tasks/{runs}", method="DELETE")).json

    assert first["status"] == "cancelled"
    assert (await got(wire, f"/v1/tasks/{child}")).json["status"] == "cancelled"
    assert (second["status"], second["is_cancelling"]) == ("processing", True)
    assert again == second
    assert await stores.tasks.called_off([(runs, task.deliveries)]) == [runs]


async def test_a_dead_letter_is_retried_and_what_is_none_is_not(wire: Wire, stores: Stores) -> None:
    task_id = await submitted(wire)
    task = await begun(stores, task_id)
    await happened(stores, task, Failed(1, FailureReason.ERROR, "It broke."))
    dead = (await got(wire, f"/v1/tasks/{task_id}")).json
    wire.post(f"/v1/tasks/{task_id}/retry", b"")
    again = await wire.answer()
    wire.post(f"/v1/tasks/{task_id}/retry", b"")
    refused = await wire.answer()

    assert (dead["status"], dead["reason"], dead["error"]) == ("failed", "error", "It broke.")
    assert dead["failed_attempts"] == 1
    assert (again.status, again.json["status"], again.json["failed_attempts"]) == (202, "pending", 0)
    assert refused.status == 409


@pytest.mark.parametrize("task_id", [NO_TASK, "nonsense", "task_" + "f" * 32, "%00"])
async def test_what_is_not_there_is_not_found(wire: Wire, task_id: str) -> None:
    path = f"/v1/tasks/{task_id}"
    answers = [
        await got(wire, path),
        await got(wire, path, method="DELETE"),
        await got(wire, f"{path}/retry", method="POST"),
        await got(wire, f"{path}/events"),
    ]

    assert [answer.status for answer in answers] == [404] * 4


async def test_other_tenants_find_nothing(gateways: StartGateway, dial: Dial, stores: Stores) -> None:
    """Not by id, not in a list, not as a parent, not to wait for; and it stays as it was."""
    owner = await _key(stores, "owner")
    other = await _key(stores, "other")
    wire = await dial((await gateways(agents=plain_agents(), auth=Auth(required=True))).port)
    key = f"x-api-key: {owner}"
    wire.post("/v1/tasks", {"agent": "echo", "idempotency_key": "once"}, key)
    task = (await wire.answer()).json

    async def asked(method: str, path: str, body: object = b"") -> Answered:
        wire.send(
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {other}\r\n".encode(),
            b"Content-Length: %d\r\n\r\n"
            % len(encoded := body if isinstance(body, bytes) else msgspec.json.encode(body)),
            encoded,
        )
        return await wire.answer()

    path = f"/v1/tasks/{task['id']}"
    assert [
        (await asked(method, where)).status
        for method, where in (("GET", path), ("DELETE", path), ("POST", f"{path}/retry"), ("GET", f"{path}/events"))
    ] == [404] * 4
    assert task["id"] not in (await asked("GET", "/v1/tasks")).body.decode()
    own = (await asked("POST", "/v1/tasks", {"agent": "echo", "idempotency_key": "once"})).json
    assert own["id"] != task["id"]
    assert (await asked("POST", "/v1/tasks", {"agent": "echo", "parent": task["id"]})).status == 400
    assert (await asked("POST", "/v1/tasks", {"agent": "echo", "after": [task["id"]]})).status == 400
    assert (await got(wire, path, key)).json == task


async def test_a_key_needs_the_scope(gateways: StartGateway, dial: Dial, stores: Stores) -> None:
    key = await _key(stores, "asks", scopes=frozenset({Scope.INFERENCE}))
    wire = await dial((await gateways(agents=plain_agents(), auth=Auth(required=True))).port)

    for path in ("/v1/tasks", "/v1/agents", f"/v1/tasks/{NO_TASK}", f"/v1/tasks/{NO_TASK}/events"):
        assert (await got(wire, path, f"x-api-key: {key}")).status == 403


async def _key(stores: Stores, name: str, **fields: Any) -> str:
    for kept in await stores.keys.all():
        if kept.revoked_at is None and kept.name == f"tasks-{name}":
            await stores.keys.revoke(kept.id)
    _, key = await stores.keys.create(name=f"tasks-{name}", tenant=f"tasks-{name}", role=Role.USER, **fields)
    return key


async def test_agents_tell_what_they_take(wire: Wire) -> None:
    agents = {agent["name"]: agent for agent in (await got(wire, "/v1/agents")).json["data"]}

    assert list(agents) == ["anything", "echo"]
    assert agents["echo"]["description"] == "Says it again."
    assert "text" in str(agents["echo"]["input_schema"])


# schedules


async def test_a_schedule_is_made_shown_listed_changed_and_deleted(wire: Wire) -> None:
    body = {"cron": "0 0 1 1 *", "timezone": "Europe/Berlin", "agent": "echo", "input": {"text": "hi"}}
    wire.post("/v1/schedules", body)
    made = await wire.answer()
    path = f"/v1/schedules/{made.json['id']}"
    shown = await got(wire, path)
    listed = await got(wire, "/v1/schedules?limit=100")
    encoded = msgspec.json.encode(body | {"cron": "0 12 * * *"})
    wire.send(f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(encoded)}\r\n\r\n".encode(), encoded)
    changed = await wire.answer()
    deleted = await got(wire, path, method="DELETE")

    assert made.status == 201
    assert shown.json == made.json
    assert (made.json["input"], made.json["last_due_at"]) == ({"text": "hi"}, None)
    assert datetime.fromisoformat(made.json["due_at"]) > datetime.now(UTC)
    assert made.json["id"] in {one["id"] for one in listed.json["data"]}
    assert (changed.status, changed.json["cron"]) == (200, "0 12 * * *")
    assert deleted.json == {"id": made.json["id"], "object": "schedule.deleted", "deleted": True}
    assert [(await got(wire, path, method=method)).status for method in ("GET", "DELETE")] == [404, 404]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"cron": "never"}, 400, "cron"),
        ({"timezone": "Mars"}, 400, "timezone"),
        ({"agent": "ecko"}, 404, None),
        ({"input": {"text": 3}}, 400, "input.text"),
        ({"run_at": "2030-01-01T00:00:00Z"}, 400, None),
    ],
)
async def test_a_bad_schedule_is_refused_in_a_sentence(
    wire: Wire, change: dict[str, Any], status: int, param: str | None
) -> None:
    wire.post("/v1/schedules", {"cron": "0 0 1 1 *", "agent": "echo"} | change)
    answer = await wire.answer()

    assert (answer.status, answer.json["error"].get("param")) == (status, param)


# events


class Stream:
    """The events of a task as a client reads them."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.comments = 0

    async def opened(self, task_id: str, *headers: str) -> int:
        self.wire.get(f"/v1/tasks/{task_id}/events", *headers)
        return (await self.wire.head()).status

    async def event(self) -> dict[str, Any] | None:
        """The next event; None at the end."""
        while part := await self.wire.chunk():
            for one in part.decode().split("\n\n"):
                fields = dict(line.split(": ", 1) for line in one.splitlines() if not line.startswith(":"))
                self.comments += one.startswith(":")
                if "data" in fields:
                    told: dict[str, Any] = msgspec.json.decode(fields["data"])
                    return told | {"id": int(fields["id"]), "event": fields["event"]}
        return None


async def test_events_come_as_they_happen_and_end_with_the_task(wire: Wire, dial: Dial, stores: Stores) -> None:
    task_id = await submitted(wire, input={"text": "hi"})
    stream = Stream(wire)
    assert await stream.opened(task_id) == 200
    first = await stream.event()
    task = await begun(stores, task_id)
    second = await stream.event()
    await happened(stores, task, Progressed(1, '{"done":\n 0.5}'))
    third = await stream.event()
    await happened(stores, task, Completed(1, '{"text": "hi"}'))
    fourth = await stream.event()

    assert first is not None
    assert (first["id"], first["event"], first["kind"]) == (1, "task.submitted", "task.submitted")
    assert second is not None
    assert (second["id"], second["event"]) == (2, "task.started")
    assert third is not None
    assert third["data"]["progress"] == {"done": 0.5}
    assert fourth is not None
    assert (fourth["event"], fourth["data"]["result"]) == ("task.completed", {"text": "hi"})
    assert await stream.event() is None


async def test_a_stream_is_taken_up_where_it_broke(wire: Wire, dial: Dial, stores: Stores) -> None:
    task_id = await submitted(wire)
    await completed(stores, task_id)
    stream = Stream(wire)

    assert await stream.opened(task_id, "Last-Event-ID: 2") == 200
    rest = await stream.event()
    assert rest is not None
    assert (rest["id"], rest["event"]) == (3, "task.completed")
    assert await stream.event() is None
    assert await stream.opened(task_id, "Last-Event-ID: 3") == 204
    assert (await got(wire, f"/v1/tasks/{task_id}/events", "Last-Event-ID: -1")).status == 400


async def test_a_task_that_was_retried_is_told_from_its_first_event_to_its_last(wire: Wire, stores: Stores) -> None:
    """An end that another life followed does not end the stream."""
    task_id = await submitted(wire)
    task = await begun(stores, task_id)
    await happened(stores, task, Failed(1, FailureReason.ERROR, "It broke."))
    await stores.tasks.requeue(None, task_id)
    stream = Stream(wire)
    await stream.opened(task_id)
    kinds = [event["event"] for _ in range(4) if (event := await stream.event())]
    await completed(stores, task_id)
    kinds += [event["event"] for _ in range(2) if (event := await stream.event())]

    assert kinds == [f"task.{kind}" for kind in ("submitted", "started", "failed", "requeued", "started", "completed")]
    assert await stream.event() is None


async def test_a_quiet_stream_gives_signs_of_life(gateways: StartGateway, dial: Dial, stores: Stores) -> None:
    gateway = await gateways(agents=plain_agents(), timeouts=Timeouts(keep_alive_s=0.05))
    wire = await dial(gateway.port)
    task_id = await submitted(wire)
    stream = Stream(wire)
    await stream.opened(task_id)
    await stream.event()
    alive = await wire.chunk()
    await stores.tasks.cancel(None, task_id)
    last = await stream.event()

    assert alive == b": still here\n\n"
    assert last is not None
    assert last["event"] == "task.cancelled"


async def test_many_watch_and_none_is_forgotten(gateways: StartGateway, dial: Dial, stores: Stores) -> None:
    gateway = await gateways(agents=plain_agents())
    wire = await dial(gateway.port)
    task_id = await submitted(wire)
    streams = [Stream(await dial(gateway.port)) for _ in range(50)]
    for stream in streams:
        await stream.opened(task_id)
        await stream.event()
    await completed(stores, task_id)

    async def kinds(stream: Stream) -> list[str]:
        found = []
        while event := await stream.event():
            found.append(event["event"])
        return found

    assert await asyncio.gather(*map(kinds, streams)) == [["task.started", "task.completed"]] * 50


async def test_head_of_a_stream_does_not_wait_for_the_end(wire: Wire) -> None:
    task_id = await submitted(wire)
    wire.get(f"/v1/tasks/{task_id}/events", method="HEAD")
    answer = await wire.answer(has_body=False)

    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
