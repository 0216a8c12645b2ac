"""Messages that nobody can read or do, and queues that are full: each ends where people find it, and none is lost."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from tests.broker_scene import running, scene, worker_of
from tests.postgres_databases import fresh_stores
from tests.rabbit_servers import Rabbits, eventually, plain_channel

from sutazai.adapters.rabbitmq.queue import open_rabbitmq
from sutazai.adapters.rabbitmq.topology import full_name
from sutazai.core.task import FailureReason, TaskDraft, TaskStatus, task_id
from sutazai.ports.agent import TASK_PROCESSING
from sutazai.settings.model import Rabbitmq
from sutazai.tasks.relay import Relay

pytestmark = pytest.mark.xdist_group("rabbitmq")

POISON: Mapping[str, bytes] = {
    "no JSON": b"\xff{no JSON",
    "another type": b"[1, 2, 3]",
    "a field of another type": b'{"task": 5, "queue": "task_processing", "tenant": "t", "agent": "a"}',
    "no id of a task": b'{"task": "5", "queue": "task_processing", "tenant": "t", "agent": "a"}',
    "a megabyte": b"x" * 1_000_000,
    "nothing": b"",
}


@pytest.fixture
def settings(rabbit_node: Rabbits) -> Rabbitmq:
    """Queues of this test's own."""
    rabbit_node.restore()
    return rabbit_node.settings(prefix=uuid.uuid4().hex[:12])


@pytest.mark.parametrize("body", POISON.values(), ids=POISON.keys())
async def test_what_nobody_can_read_becomes_a_dead_letter_with_a_reason_and_holds_nobody_up(
    data_dir: Path, settings: Rabbitmq, body: bytes
) -> None:
    async with scene(data_dir, settings) as made:
        (before,) = await made.done()
        async with plain_channel(settings) as channel:
            await channel.basic_publish(body, routing_key=full_name(TASK_PROCESSING, settings), mandatory=True)

        async def is_given_up() -> bool:
            return made.dead_letters.counts["unreadable"] == 1

        await eventually(is_given_up)
        (after,) = await made.done()

    assert {before.status, after.status} == {TaskStatus.COMPLETED}
    async with plain_channel(settings) as channel:
        letter = await channel.basic_get(full_name("dead_letters", settings))
    assert letter.body == body
    headers = letter.header.properties.headers or {}
    assert headers["x-first-death-reason"] == "delivery_limit"
    assert headers["x-first-death-queue"] == full_name(TASK_PROCESSING, settings)


async def test_a_task_of_an_agent_that_is_not_there_ends_with_that_reason(data_dir: Path, settings: Rabbitmq) -> None:
    async with scene(data_dir, settings) as made:
        (task,) = await made.done("nobody")

    assert (task.status, task.reason) == (TaskStatus.FAILED, FailureReason.UNKNOWN_AGENT)
    assert "nobody" in task.error


async def test_an_input_of_the_wrong_type_ends_with_that_reason(data_dir: Path, settings: Rabbitmq) -> None:
    async with scene(data_dir, settings) as made:
        (task,) = await made.stores.tasks.submit([TaskDraft(tenant="acme", agent="echo", input='"x"')])

        async def has_ended() -> bool:
            return (await made.stores.tasks.several("acme", [task.id]))[0].status.is_end

        await eventually(has_ended)
        (ended,) = await made.stores.tasks.several("acme", [task.id])

    assert (ended.status, ended.reason) == (TaskStatus.FAILED, FailureReason.UNREADABLE)


async def test_a_queue_that_is_full_leaves_the_rest_in_the_outbox_and_all_are_done(
    data_dir: Path, settings: Rabbitmq
) -> None:
    small = msgspec.structs.replace(settings, max_length=5)
    async with scene(data_dir, small) as made:
        tasks = await made.done(count=200)

    assert {task.status for task in tasks} == {TaskStatus.COMPLETED}
    assert {task.deliveries for task in tasks} == {1}


async def test_a_worker_that_stops_gives_what_it_has_not_begun_to_another_at_once(
    data_dir: Path, settings: Rabbitmq
) -> None:
    async with fresh_stores(data_dir) as stores, open_rabbitmq(settings) as broker:
        first, second = worker_of(stores, broker, slots=1, held=10), worker_of(stores, broker)
        carry = (stores.queue.run(), Relay(stores.queue, broker, [TASK_PROCESSING]).run(), first.run())
        async with running(*map(asyncio.create_task, carry)):
            slow, *others = [
                task.id
                for seconds in ("60", *["1"] * 5)
                for task in await stores.tasks.submit([TaskDraft(tenant="acme", agent="echo", input=seconds)])
            ]

            async def is_under_way() -> bool:
                held = await broker.depth(TASK_PROCESSING)
                return first.running == 1 and held == 0 and await stores.queue.depth(TASK_PROCESSING) == 0

            async def are_done() -> bool:
                found = await stores.tasks.several("acme", others)
                return all(task.status is TaskStatus.COMPLETED for task in found)

            await eventually(is_under_way)
            first.stop()
            async with running(asyncio.create_task(second.run())):
                await eventually(are_done)
                (still,) = await stores.tasks.several("acme", [slow])

                assert still.status is TaskStatus.PROCESSING
                assert not first.ended.is_set()  # it still waits for its attempt


async def test_word_of_a_task_that_is_gone_is_passed_over(data_dir: Path, settings: Rabbitmq) -> None:
    gone = {"task": task_id(1.0, 0), "queue": TASK_PROCESSING, "tenant": "t", "agent": "a"}
    async with scene(data_dir, settings) as made:
        await made.broker.depth(TASK_PROCESSING)
        async with plain_channel(settings) as channel:
            key = full_name(TASK_PROCESSING, settings)
            await channel.basic_publish(msgspec.json.encode(gone), routing_key=key, mandatory=True)
        await made.done(count=3)

        assert await made.broker.depth(TASK_PROCESSING) == 0
        assert made.dead_letters.counts == {"task": 0, "unreadable": 0}
