"""Inputs and results of a megabyte, from the client through the queue and the worker and back."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from aiormq.exceptions import ChannelNotFoundEntity
from tests.postgres_databases import fresh_database
from tests.rabbit_servers import eventually, plain_channel

from sutazai.adapters.postgres.stores import open_stores
from sutazai.adapters.rabbitmq.topology import full_name
from sutazai.settings.model import Database, Objects, Rabbitmq
from sutazai.settings.secret import Secret
from sutazai.tasks.replay import replay, verify
from sutazai.tasks.submit import MAX_INPUT_BYTES
from sutazai.testing.plain_agents import plain_agents

if TYPE_CHECKING:
    from tests.conftest import Dial, StartGateway, Wire
    from tests.rabbit_servers import Rabbits

pytestmark = [pytest.mark.xdist_group("rabbitmq"), pytest.mark.deadline(90)]

LARGEST = {"text": "ü" * ((MAX_INPUT_BYTES - len('{"text":"","times":1}')) // 2), "times": 1}
"""The largest input that there is."""


@pytest.fixture
async def url(data_dir: Path) -> AsyncIterator[str]:
    async with fresh_database(data_dir) as address:
        yield address


@pytest.fixture(params=["table", "RabbitMQ"])
async def broker(request: pytest.FixtureRequest) -> Rabbitmq:
    if request.param == "table":
        return Rabbitmq()
    node: Rabbits = request.getfixturevalue("rabbit_node")
    return node.settings(prefix=uuid.uuid4().hex[:12])


async def done(wire: Wire, task: str) -> Any:
    told: dict[str, Any] = {}

    async def has_ended() -> bool:
        wire.get(f"/v1/tasks/{task}")
        told.update((await wire.answer()).json)
        return told["ended_at"] is not None

    await eventually(has_ended)
    return told


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def test_the_largest_input_reaches_its_agent_and_the_result_comes_back(
    url: str, gateways: StartGateway, dial: Dial, broker: Rabbitmq, tmp_path: Path
) -> None:
    gateway = await gateways(
        agents=plain_agents(),
        with_worker=True,
        database=Database(url=Secret(url)),
        objects=Objects(url=str(tmp_path)),
        rabbitmq=broker,
    )
    wire = await dial(gateway.port)
    wire.post("/v1/tasks", {"agent": "echo", "input": LARGEST})
    submitted = await wire.answer()
    assert submitted.status == 202

    told = await done(wire, submitted.json["id"])

    assert (told["status"], told["result"], told["input"]) == ("completed", LARGEST, LARGEST)
    (file,) = files_in(tmp_path)
    assert str(file.relative_to(tmp_path)) == told["result_object"]
    assert file.parts[-4] == "t-local"
    wire.get(f"/v1/tasks/{told['id']}/events")
    last = msgspec.json.decode((await wire.answer()).body.rpartition(b"data: ")[2])
    assert last["kind"] == "task.completed"
    assert (last["data"]["result"], last["data"]["result_object"]) == (None, told["result_object"])
    assert last["data"]["result_bytes"] == file.stat().st_size
    wire.get("/v1/tasks")
    assert "result" not in (await wire.answer()).json["data"][0]


async def test_events_give_the_very_task_whose_result_is_an_object(
    url: str, gateways: StartGateway, dial: Dial, data_dir: Path, tmp_path: Path
) -> None:
    gateway = await gateways(
        agents=plain_agents(), with_worker=True, database=Database(url=Secret(url)), objects=Objects(url=str(tmp_path))
    )
    wire = await dial(gateway.port)
    wire.post("/v1/tasks", {"agent": "anything", "input": "x" * 500_000})
    await done(wire, (await wire.answer()).json["id"])

    async with open_stores(Database(url=Secret(url)), data_dir) as stores:
        async with stores.replays[""].session() as session:
            verified = await verify(session, note=lambda _: None)
        async with stores.replays[""].session() as session:
            replayed = await replay(session, until=None, note=lambda _: None)

    assert verified.is_whole
    assert replayed.is_whole
    assert replayed.tasks == 1


async def test_a_result_that_nobody_finds_is_told_in_a_sentence(
    url: str, gateways: StartGateway, dial: Dial, tmp_path: Path
) -> None:
    gateway = await gateways(
        agents=plain_agents(), with_worker=True, database=Database(url=Secret(url)), objects=Objects(url=str(tmp_path))
    )
    wire = await dial(gateway.port)
    wire.post("/v1/tasks", {"agent": "anything", "input": "x" * 500_000})
    told = await done(wire, (await wire.answer()).json["id"])
    await asyncio.to_thread((tmp_path / told["result_object"]).unlink)

    wire.get(f"/v1/tasks/{told['id']}")
    answer = await wire.answer()

    assert answer.status == 503
    assert "`objects.url`" in answer.json["error"]["message"]


async def test_a_message_carries_no_input(gateways: StartGateway, dial: Dial, url: str, rabbit_node: Rabbits) -> None:
    settings = rabbit_node.settings(prefix=uuid.uuid4().hex[:12])
    gateway = await gateways(agents=plain_agents(), database=Database(url=Secret(url)), rabbitmq=settings)
    wire = await dial(gateway.port)
    wire.post("/v1/tasks", {"agent": "anything", "input": "x" * 1_000_000})
    task = (await wire.answer()).json["id"]

    bodies: list[bytes] = []

    async def is_there() -> bool:
        with suppress(ChannelNotFoundEntity):  # the queue is declared a moment after the gateway listens
            async with plain_channel(settings) as channel:
                found = await channel.basic_get(full_name("task_processing", settings), no_ack=True)
                bodies.append(found.body)
        return any(bodies)

    await eventually(is_there)

    assert task.encode() in bodies[-1]
    assert len(bodies[-1]) < 1000


async def test_an_input_over_the_limit_is_refused_and_nothing_is_kept(
    url: str, gateways: StartGateway, dial: Dial, tmp_path: Path
) -> None:
    gateway = await gateways(
        agents=plain_agents(), database=Database(url=Secret(url)), objects=Objects(url=str(tmp_path))
    )
    wire = await dial(gateway.port)

    wire.post("/v1/tasks", {"agent": "echo", "input": {**LARGEST, "text": f"{LARGEST['text']}xx"}})
    refused = await wire.answer()

    assert refused.status == 413
    assert "1,048,576" in refused.json["error"]["message"]
    wire.get("/v1/tasks")
    assert (await wire.answer()).json["data"] == []
    assert not files_in(tmp_path)
