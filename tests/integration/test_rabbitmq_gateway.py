"""A gateway beside a broker: a client's task goes all the way, is told on the stream, and is counted."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from tests.postgres_databases import fresh_database
from tests.rabbit_servers import Rabbits, eventually, plain_channel

from sutazai.adapters.rabbitmq.queue import open_rabbitmq
from sutazai.adapters.rabbitmq.topology import full_name
from sutazai.ports.agent import TASK_PROCESSING
from sutazai.ports.broadcasts import EventNotice, Unseen
from sutazai.settings.model import Database, Rabbitmq
from sutazai.settings.secret import Secret
from sutazai.testing.plain_agents import plain_agents

if TYPE_CHECKING:
    from tests.conftest import Dial, StartGateway, Wire

pytestmark = pytest.mark.xdist_group("rabbitmq")


@pytest.fixture
def settings(rabbit_node: Rabbits) -> Rabbitmq:
    """Queues of this test's own."""
    rabbit_node.restore()
    return rabbit_node.settings(prefix=uuid.uuid4().hex[:12], delivery_limit=2)


async def figure(wire: Wire, name: str) -> float:
    """One number of the page for Prometheus."""
    wire.get("/metrics")
    page = (await wire.answer()).body.decode()
    return next(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(name))


async def test_a_task_goes_through_the_broker_and_is_told_and_counted(
    data_dir: Path, settings: Rabbitmq, gateways: StartGateway, dial: Dial
) -> None:
    async with fresh_database(data_dir) as url:
        gateway = await gateways(
            agents=plain_agents(), with_worker=True, rabbitmq=settings, database=Database(url=Secret(url))
        )
        wire = await dial(gateway.port)
        wire.post("/v1/tasks", {"agent": "anything", "input": 1})
        task = (await wire.answer()).json["id"]
        kinds, unseen = list[str](), Unseen()
        async with open_rabbitmq(settings) as queue, queue.events.read() as reader:
            while "task.completed" not in kinds:
                for entry in await reader.take(10):
                    notices = unseen.notices_of(entry.body)
                    kinds += [each.kind for each in notices if isinstance(each, EventNotice) and each.task == task]
        async with plain_channel(settings) as channel:
            await channel.basic_publish(b"junk", routing_key=full_name("task_processing", settings), mandatory=True)

        async def is_counted() -> bool:
            return await figure(wire, 'sutazai_dead_letters_total{what="unreadable"}') == 1.0

        await eventually(is_counted)
        assert kinds == ["task.submitted", "task.started", "task.completed"]
        assert await figure(wire, 'sutazai_rabbitmq_published_total{outcome="kept"}') >= 2
        assert await figure(wire, "sutazai_rabbitmq_connections ") >= 4
        assert await figure(wire, "sutazai_rabbitmq_connections_opened_total") >= 4
        assert await figure(wire, "sutazai_broadcast_notices_total") >= 3
        assert await figure(wire, "sutazai_broadcast_behind{") == 0
        assert await figure(wire, "sutazai_broadcast_behind_seconds{") == 0


async def test_a_gateway_whose_broker_is_away_takes_tasks_and_says_how_late_the_stream_is(
    data_dir: Path, settings: Rabbitmq, gateways: StartGateway, dial: Dial
) -> None:
    nobody = msgspec.structs.replace(settings, url=Secret("amqp://127.0.0.1:1"), timeout_s=0.3)
    async with fresh_database(data_dir) as url:
        gateway = await gateways(agents=plain_agents(), rabbitmq=nobody, database=Database(url=Secret(url)))
        wire = await dial(gateway.port)
        wire.post("/v1/tasks", {"agent": "anything", "input": 1})
        accepted = (await wire.answer()).status

        async def is_late() -> bool:
            return await figure(wire, "sutazai_broadcast_behind_seconds{") > 1.0

        await eventually(is_late)
        assert accepted == 202
        assert await figure(wire, "sutazai_broadcast_behind{") == 1
        assert await figure(wire, "sutazai_rabbitmq_connections ") == 0


@pytest.mark.deadline(120)
async def test_a_task_whose_word_the_broker_has_lost_is_done_all_the_same(
    data_dir: Path, settings: Rabbitmq, gateways: StartGateway, dial: Dial
) -> None:
    async with fresh_database(data_dir) as url, open_rabbitmq(settings) as broker:
        database = Database(url=Secret(url))
        gateway = await gateways(agents=plain_agents(), rabbitmq=settings, database=database)
        wire = await dial(gateway.port)
        wire.post("/v1/tasks", {"agent": "anything", "input": 1})
        task = (await wire.answer()).json["id"]

        async def is_at_the_broker() -> bool:
            return await broker.depth(TASK_PROCESSING) == 1

        await eventually(is_at_the_broker)
        async with plain_channel(settings) as channel:
            await channel.queue_purge(full_name(TASK_PROCESSING, settings))
        await gateways(agents=plain_agents(), with_worker=True, rabbitmq=settings, database=database)

        async def is_done() -> bool:
            wire.get(f"/v1/tasks/{task}")
            return bool((await wire.answer()).json["status"] == "completed")

        await eventually(is_done, within_s=90.0)
