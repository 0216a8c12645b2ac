"""Gateways over a primary and its replica: who wrote sees it, others are told nothing that is old."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from tests.postgres_servers import PostgresServer, paused, streaming
from tests.redis_servers import eventually
from tests.shards import divide

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import Database as OpenDatabase
from sutazai.adapters.postgres.database import open_database
from sutazai.adapters.postgres.partitions import Partitions
from sutazai.adapters.postgres.stores import connected
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.core.task import Completed, Task
from sutazai.ports.tasks import Change, Start
from sutazai.settings.model import Database, Shard
from sutazai.settings.secret import Secret
from sutazai.testing.plain_agents import plain_agents

if TYPE_CHECKING:
    from tests.conftest import Answered, Dial, StartGateway, Wire

LAG_S = 1.0
LIMIT_S = 5.0
WRITTEN = "x-sutazai-written"
NO_TASK = "task_" + "0" * 32
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\nContent-Disposition: form-data; '
    b'name="file"; filename="a.jsonl"\r\n\r\n{}\r\n--x--\r\n'
)

Pair = Sequence[PostgresServer]


@pytest.fixture(scope="module")
def well() -> Iterator[Pair]:
    """A primary and a replica that are hurt only for a moment."""
    with streaming(replicas=1) as servers:
        yield servers


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Servers of this test's own."""
    with streaming(replicas=1) as servers:
        yield servers


def settings_of(pair: Pair) -> Database:
    """Both servers; the first address may be either's."""
    primary, replica = pair
    return Database(url=replica.url, replicas=(primary.url,), replica_max_lag_s=LAG_S, timeout_s=LIMIT_S)


async def opened(pair: Pair, gateways: StartGateway, dial: Dial, *, with_all_agents: bool = False) -> Wire:
    """A gateway that has found out who is who."""
    agents = None if with_all_agents else plain_agents()
    wire = await dial((await gateways(agents=agents, database=settings_of(pair))).port)
    await eventually(lambda: reads_from(wire, pair[1]))
    return wire


async def reads_from(wire: Wire, server: PostgresServer) -> bool:
    """Whether this one answers a list now."""
    name = f'sutazai_database_reads_total{{server="{server.host}"}}'
    before = await wire.gauge(name)
    assert (await got(wire, "/v1/tasks?limit=1")).status == 200
    return await wire.gauge(name) > before


async def got(wire: Wire, path: str, *headers: str) -> Answered:
    wire.get(path, *headers)
    return await wire.answer()


async def submitted(wire: Wire, *headers: str, **body: Any) -> Answered:
    wire.post("/v1/tasks", {"agent": "echo"} | body, *headers)
    answer = await wire.answer()
    assert answer.status == 202, answer.body
    return answer


async def listed(wire: Wire, path: str, *headers: str) -> list[str]:
    answer = await got(wire, path, *headers)
    assert answer.status == 200, answer.body
    return [one["id"] for one in answer.json["data"]]


# who wrote


async def test_who_submits_sees_it_though_the_replica_stands_still(
    well: Pair, gateways: StartGateway, dial: Dial
) -> None:
    wire = await opened(well, gateways, dial)
    async with paused(well[1]):
        for _ in range(20):
            task = (await submitted(wire)).json["id"]

            assert (await listed(wire, "/v1/tasks"))[0] == task
            assert (await got(wire, f"/v1/tasks/{task}")).json["status"] == "pending"
            wire.get(f"/v1/tasks/{task}", method="DELETE")
            assert (await wire.answer()).status == 200
            assert (await got(wire, f"/v1/tasks/{task}")).json["status"] == "cancelled"
            assert task not in await listed(wire, "/v1/tasks?status=pending")


async def test_files_batches_schedules_and_sessions_are_seen_by_who_made_them(
    well: Pair, gateways: StartGateway, dial: Dial
) -> None:
    wire = await opened(well, gateways, dial, with_all_agents=True)
    async with paused(well[1]):
        wire.post("/v1/files", FORM, "Content-Type: multipart/form-data; boundary=x")
        file = (await wire.answer()).json["id"]
        assert file in await listed(wire, "/v1/files")

        made: dict[str, dict[str, Any]] = {
            "/v1/batches": {
                "input_file_id": file,
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
            },
            "/v1/schedules": {"cron": "0 0 1 1 *", "agent": "summarize", "input": {"text": "x"}},
            "/v1/sessions": {"model": "any"},
        }
        for path, body in made.items():
            wire.post(path, body)
            answer = await wire.answer()
            assert answer.status < 300, answer.body
            assert answer.json["id"] in await listed(wire, path)
            assert WRITTEN in answer.headers


async def test_a_replica_reads_again_once_it_has_what_was_written(
    well: Pair, gateways: StartGateway, dial: Dial
) -> None:
    wire = await opened(well, gateways, dial)
    task = (await submitted(wire)).json["id"]

    await eventually(lambda: reads_from(wire, well[1]))
    assert (await listed(wire, "/v1/tasks"))[0] == task


# others


async def test_others_see_it_within_the_bound_and_with_the_mark_at_once(
    well: Pair, gateways: StartGateway, dial: Dial
) -> None:
    writer, other = await opened(well, gateways, dial), await opened(well, gateways, dial)
    async with paused(well[1]):
        for _ in range(5):
            accepted = await submitted(writer)
            began = time.monotonic()
            task, mark = accepted.json["id"], accepted.headers[WRITTEN]

            assert (await listed(other, "/v1/tasks", f"{WRITTEN}: {mark}"))[0] == task
            assert (await got(other, f"/v1/tasks/{task}")).status == 200  # a replica's not having it denies nothing
            while (await listed(other, "/v1/tasks?limit=1")) != [task]:
                assert time.monotonic() - began < LAG_S + 0.5


async def test_a_mark_is_taken_by_the_replica_once_it_is_there(well: Pair, gateways: StartGateway, dial: Dial) -> None:
    writer, other = await opened(well, gateways, dial), await opened(well, gateways, dial)
    mark = (await submitted(writer)).headers[WRITTEN]
    name = f'sutazai_database_reads_total{{server="{well[1].host}"}}'

    async def read_there() -> bool:
        before = await other.gauge(name)
        await listed(other, "/v1/tasks?limit=1", f"{WRITTEN}: {mark}")
        return await other.gauge(name) > before

    await eventually(read_there)


@pytest.mark.parametrize("mark", ["ffffffff-7fffffffffffffff", "1-1", "0-0"])
async def test_a_mark_of_the_future_or_of_elsewhere_holds_nobody_up(
    well: Pair, gateways: StartGateway, dial: Dial, mark: str
) -> None:
    wire = await opened(well, gateways, dial)
    source = (await submitted(wire)).headers[WRITTEN].partition("-")[0]
    for sent in (mark, f"{source}-7fffffffffffffff"):
        began = time.monotonic()
        assert (await got(wire, "/v1/tasks", f"{WRITTEN}: {sent}")).status == 200
        assert time.monotonic() - began < LAG_S

    await eventually(lambda: reads_from(wire, well[1]))


@pytest.mark.parametrize("path", ["/v1/tasks", f"/v1/tasks/{NO_TASK}/events", "/v1/files", "/v1/sessions"])
async def test_what_is_no_mark_is_refused_and_nothing_is_written(
    well: Pair, gateways: StartGateway, dial: Dial, path: str
) -> None:
    wire = await opened(well, gateways, dial)
    before = await listed(wire, "/v1/tasks?limit=1")
    refused = await got(wire, path, f"{WRITTEN}: 1-2; DROP TABLE tasks")
    wire.post("/v1/tasks", {"agent": "echo"}, f"{WRITTEN}: {'9' * 400}")
    unwritten = await wire.answer()

    assert [refused.status, unwritten.status] == [400, 400]
    assert "was no mark" in refused.json["error"]["message"]
    assert await listed(wire, "/v1/tasks?limit=1") == before


async def test_one_server_needs_no_mark(gateways: StartGateway, dial: Dial) -> None:
    wire = await dial((await gateways(agents=plain_agents())).port)

    assert WRITTEN not in (await submitted(wire)).headers
    assert (await got(wire, "/v1/tasks", f"{WRITTEN}: 1-2")).status == 200


# who watches


async def test_who_watched_the_end_is_told_nothing_older(well: Pair, gateways: StartGateway, dial: Dial) -> None:
    wire, other = await opened(well, gateways, dial), await opened(well, gateways, dial)
    watcher = await dial(int(wire.writer.get_extra_info("peername")[1]))
    task = (await submitted(wire)).json["id"]
    async with worker(well) as tasks:
        await eventually(lambda: reads_from(wire, well[1]))
        async with paused(well[1]):
            watcher.get(f"/v1/tasks/{task}/events")
            assert (await watcher.head()).status == 200
            await ended(tasks, task)
            told = await until_end(watcher)

            assert (await got(wire, f"/v1/tasks/{task}")).json["status"] == "completed"
            mark = told.partition(f": {WRITTEN} ".encode())[2].split()[0].decode()
            seen = await got(other, f"/v1/tasks/{task}", f"{WRITTEN}: {mark}")
            assert seen.json["status"] == "completed"


async def test_a_watcher_misses_nothing_that_the_replica_does_not_have(
    well: Pair, gateways: StartGateway, dial: Dial
) -> None:
    """Events come from the primary, whose word it is that rings the bell."""
    wire = await opened(well, gateways, dial)
    async with worker(well) as tasks, paused(well[1]):
        task = (await submitted(wire)).json["id"]
        await ended(tasks, task)
        wire.get(f"/v1/tasks/{task}/events")
        await wire.head()
        told = await until_end(wire)

    kinds = [line.removeprefix(b"event: ") for line in told.splitlines() if line.startswith(b"event: ")]
    assert kinds == [b"task.submitted", b"task.started", b"task.completed"]


@asynccontextmanager
async def worker(pair: Pair) -> AsyncIterator[PostgresTaskStore]:
    """The store as a process of its own would have it."""
    settings = settings_of(pair)
    assert settings.url is not None
    async with connected(settings.url, settings) as database:
        yield PostgresTaskStore(database, max_length=1000)


async def ended(tasks: PostgresTaskStore, task_id: str) -> None:
    (task,) = await tasks.begin([Start(task=task_id, may_take_over=False)], worker="w", delivery_limit=20)
    assert isinstance(task, Task)
    assert (await tasks.change([Change(task=task_id, event=Completed(task.deliveries, "{}"))]))[0] is not None


async def until_end(wire: Wire) -> bytes:
    """What a stream of events says until it ends."""
    told = b""
    while part := await wire.chunk():
        told += part
    await wire.reader.readexactly(2) if not told else None
    return told


# shards


async def test_tenants_of_shards_read_from_replicas_too(well: Pair, gateways: StartGateway, dial: Dial) -> None:
    primary, replica = well
    await primary.ask("CREATE DATABASE even")
    await primary.ask("CREATE DATABASE odd")
    urls = [
        [Secret(server.url.reveal().replace("/postgres", f"/{name}")) for server in well] for name in ("even", "odd")
    ]
    async with AsyncExitStack() as stack:
        databases: dict[str, OpenDatabase] = {}
        for name, (at_primary, _) in zip(("even", "odd"), urls, strict=True):
            opened_here = await stack.enter_async_context(open_database(at_primary, timeout_s=30.0))
            await migrate.migrate(opened_here, migrate.read())
            await Partitions(opened_here).tend()  # so that the gateway locks no table while replay is paused
            databases[name] = opened_here
        await divide(databases)
    (even, even_too), (odd, odd_too) = urls
    gateway = await gateways(
        agents=plain_agents(),
        database=Database(url=even, replicas=(even_too,), timeout_s=LIMIT_S),
        shards=(Shard(name="even"), Shard(name="odd", url=odd, replicas=(odd_too,))),
    )
    wire = await dial(gateway.port)
    await eventually(lambda: reads_from(wire, replica))
    async with paused(replica):
        for _ in range(5):
            task = (await submitted(wire)).json["id"]
            assert (await listed(wire, "/v1/tasks"))[0] == task
    await eventually(lambda: reads_from(wire, replica))
    assert (await listed(wire, "/v1/tasks"))[0] == task

    samples = [line.rpartition(" ")[0] for line in (await got(wire, "/metrics")).body.decode().splitlines()]
    told = [sample for sample in samples if sample.startswith("sutazai_database_")]
    assert len(told) == len(set(told))


# who is away


async def test_without_the_replica_the_primary_answers(pair: Pair, gateways: StartGateway, dial: Dial) -> None:
    wire = await opened(pair, gateways, dial)
    task = (await submitted(wire)).json["id"]
    pair[1].kill()

    for _ in range(5):
        assert (await listed(wire, "/v1/tasks"))[0] == task
    assert await reads_from(wire, pair[0])


async def test_metrics_tell_roles_and_that_another_one_was_promoted(
    pair: Pair, gateways: StartGateway, dial: Dial
) -> None:
    wire = await opened(pair, gateways, dial)
    primary, replica = pair

    async def gauges(name: str) -> list[float]:
        return [await wire.gauge(f'sutazai_database_{name}{{server="{server.host}"}}') for server in pair]

    assert await gauges("primary") == [1, 0]
    assert await gauges("up") == [1, 1]
    assert await wire.gauge(f'sutazai_database_lag_seconds{{server="{replica.host}"}}') < 2 * LAG_S
    primary.kill()
    await replica.promote()
    await submitted(wire)

    assert await gauges("primary") == [0, 1]
    assert await gauges("up") == [0, 1]
    assert await wire.gauge("sutazai_database_primary_changes_total") == 1


async def test_without_the_primary_reads_go_on_and_writes_are_told(
    pair: Pair, gateways: StartGateway, dial: Dial
) -> None:
    wire = await opened(pair, gateways, dial)
    accepted = await submitted(wire)
    task, mark = accepted.json["id"], accepted.headers[WRITTEN]
    await eventually(lambda: reads_from(wire, pair[1]))
    pair[0].kill()

    for path in ("/v1/tasks", f"/v1/tasks/{task}", "/v1/files", "/v1/batches", "/v1/schedules", "/v1/sessions"):
        assert (await got(wire, path, f"{WRITTEN}: {mark}")).status == 200, path
    assert (await listed(wire, "/v1/tasks"))[0] == task
    wire.post("/v1/tasks", {"agent": "echo"})
    answer = await asyncio.wait_for(wire.answer(), LIMIT_S + 2)
    assert answer.status == 503
    assert (await listed(wire, "/v1/tasks"))[0] == task
