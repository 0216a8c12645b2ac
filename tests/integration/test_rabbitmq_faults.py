"""Alarms and a partition on a cluster of three: what was acknowledged meanwhile is done afterwards, with no restart."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from tests.broker_scene import Scene, scene
from tests.rabbit_servers import RabbitNode, Rabbits, eventually

from sutazai.adapters.rabbitmq.topology import full_name
from sutazai.core.task import Task, TaskStatus
from sutazai.ports.agent import TASK_PROCESSING
from sutazai.ports.broadcasts import EventNotice, Unseen
from sutazai.settings.model import Rabbitmq

pytestmark = [pytest.mark.xdist_group("rabbitmq_cluster"), pytest.mark.alone, pytest.mark.deadline(90)]

TASKS = 300
ALARMS = {
    "disk": (("set_disk_free_limit", str(10**18)), ("set_disk_free_limit", "50MB")),
    "memory": (("set_vm_memory_high_watermark", "0.00001"), ("set_vm_memory_high_watermark", "0.4")),
}
"""What raises each on a node, and what ends it."""


@pytest.fixture
def cluster(rabbit_cluster: Rabbits) -> Iterator[Rabbits]:
    """Three nodes, all of them there before the test and after it."""
    rabbit_cluster.restore()
    yield rabbit_cluster
    rabbit_cluster.restore()


@pytest.fixture
def settings(cluster: Rabbits) -> Rabbitmq:
    """Queues of this test's own, and callers that are told soon."""
    return cluster.settings(prefix=uuid.uuid4().hex[:12], timeout_s=3.0, confirm_timeout_s=1.0)


async def told_on_stream(made: Scene) -> list[tuple[str, int]]:
    """Task and version of all events that a reader of the stream sees, once nothing is behind."""

    async def is_told() -> bool:
        return made.broadcast.carried > 0 and made.broadcast.behind == 0

    await eventually(is_told, 40)
    wanted = len(await made.stores.tasks.tail(after=0, limit=100_000))
    unseen, seen = Unseen(), list[tuple[str, int]]()
    async with made.broker.events.read() as reader:
        while len(seen) < wanted:
            for entry in await reader.take(100):
                notices = unseen.notices_of(entry.body)
                seen += [(notice.task, notice.version) for notice in notices if isinstance(notice, EventNotice)]
    return seen


async def check(made: Scene, ids: Sequence[str]) -> None:
    """All were done, and all of it was told."""
    tasks: Sequence[Task] = await made.ended(list(ids), within_s=60)
    events = await made.stores.tasks.tail(after=0, limit=100_000)

    assert {task.status for task in tasks} == {TaskStatus.COMPLETED}
    assert await told_on_stream(made) == [(event.task, event.version) for event in events]


@pytest.mark.parametrize("alarm", ALARMS)
async def test_an_alarm_of_one_node_keeps_publishers_waiting_and_no_submitter(
    cluster: Rabbits, settings: Rabbitmq, data_dir: Path, alarm: str
) -> None:
    raised, ended = ALARMS[alarm]
    node = cluster.nodes[1]
    async with scene(data_dir, settings) as made:
        await made.done(count=20)
        with capture_logs() as said:
            await asyncio.to_thread(node.control, *raised)
            try:
                ids = [task for _ in range(3) for task in await made.submitted(count=TASKS // 3)]

                async def is_noticed() -> bool:
                    waits = made.broadcast.behind > 0 and made.broadcast.behind_s > 1.0
                    return waits and any("outbox" in line["event"] for line in said)

                await eventually(is_noticed, 40)
                late = await made.submitted(count=10)
            finally:
                await asyncio.to_thread(node.control, *ended)
        await check(made, [*ids, *late])
        assert made.broker.figures.outcomes["unknown"] > 0


async def test_a_node_that_is_cut_off_pauses_and_the_majority_goes_on(
    cluster: Rabbits, settings: Rabbitmq, data_dir: Path
) -> None:
    async with scene(data_dir, settings) as made:
        await made.done(count=20)
        leader = await asyncio.to_thread(cluster.leader_of, full_name(TASK_PROCESSING, settings))
        others = [node for node in cluster.nodes if node is not leader]
        ids = await made.submitted(count=TASKS)
        with cut_off(leader, others):
            await eventually(lambda: is_paused(leader), 40)
            ids += await made.submitted(count=TASKS)
            await made.ended(ids, within_s=40)
        await eventually(lambda: is_back(others[0]), 40)
        ids += [task.id for task in await made.done(count=20)]
        await check(made, ids)


class cut_off:  # noqa: N801 - reads as a word in a `with`
    """
    Part one node from the others, though not from its clients.

    It and they show each other the wrong cookie, so they cannot come together again, as if the network between them
    were gone.
    """

    def __init__(self, node: RabbitNode, others: Sequence[RabbitNode]) -> None:
        self._node = node
        self._others = others

    def __enter__(self) -> None:
        wrong = [f"erlang:set_cookie('{other.name}', wrong)" for other in self._others]
        parted = [f"erlang:disconnect_node('{other.name}')" for other in self._others]
        self._node.control("eval", ", ".join([*wrong, *parted]) + ".")

    def __exit__(self, *_: object) -> None:
        right = [f"erlang:set_cookie('{other.name}', erlang:get_cookie())" for other in self._others]
        self._node.control("eval", ", ".join(right) + ".")


async def is_paused(node: RabbitNode) -> bool:
    return not await asyncio.to_thread(node.listens)


async def is_back(other: RabbitNode) -> bool:
    said = await asyncio.to_thread(other.control, "eval", "length(rabbit_nodes:all_running()).")
    return said.strip() == "3"
