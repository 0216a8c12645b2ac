"""Messages that nobody can read or do, and queues that are full: each ends where people find it, and none is lost."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.postgres_databases import fresh_stores
from tests.rabbit_servers import Rabbits, eventually, plain_channel

from sutazai.adapters.postgres.stores import Stores
from sutazai.adapters.rabbitmq.queue import RabbitQueue, open_rabbitmq
from sutazai.adapters.rabbitmq.topology import full_name
from sutazai.core.task import FailureReason, Task, TaskDraft, TaskStatus, task_id
from sutazai.policy.prefetch import PrefetchRules
from sutazai.ports.agent import TASK_PROCESSING, Agent, AgentContext
from sutazai.settings.model import Rabbitmq
from sutazai.tasks.context import Surroundings
from sutazai.tasks.dead_letters import DeadLetters
from sutazai.tasks.relay import Relay
from sutazai.tasks.worker import Worker, WorkerRules

pytestmark = pytest.mark.xdist_group("rabbitmq")

POISON: Mapping[str, bytes] = {
    "no JSON": b"\xff{no JSON",
    "another type": b"[1, 2, 3]",
    "a field of another type": b'{"task": 5, "queue": "task_processing", "tenant": "t", "agent": "a"}',
    "no id of a task": b'{"task": "5", "queue": "task_processing", "tenant": "t", "agent": "a"}',
    "a megabyte": b"x" * 1_000_000,
    "nothing": b"",
}


class NoModels:
    """These agents ask nobody."""

    async def chat(self, body: Any, **_: Any) -> Any:
        raise NotImplementedError

    async def usual(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A broker with a worker, and what carries between it and the database."""

    stores: Stores
    broker: RabbitQueue
    settings: Rabbitmq
    dead_letters: DeadLetters

    async def done(self, agent: str = "echo", *, count: int = 1) -> list[Task]:
        """Tasks that were submitted and have ended."""
        tasks = await self.stores.tasks.submit([TaskDraft(tenant="acme", agent=agent, input="1")] * count)
        ids = [task.id for task in tasks]
        found: list[Task] = []

        async def have_ended() -> bool:
            found[:] = await self.stores.tasks.several("acme", ids)
            return all(task.status.is_end for task in found)

        await eventually(have_ended)
        return found


@asynccontextmanager
async def running(*work: asyncio.Task[None]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for task in work:
            task.cancel()
        await asyncio.wait(work)


def worker_of(stores: Stores, broker: RabbitQueue, *, slots: int = 4, held: int = 1) -> Worker:
    async def echo(_: AgentContext, value: float) -> float:
        await asyncio.sleep(value if value > 1 else 0)
        return value

    known = {"echo": Agent(name="echo", run=echo, input_type=float, output_type=float, describes="", concurrency=100)}
    around = Surroundings(
        store=stores.tasks,
        models=NoModels(),
        messages=stores.messages,
        agents=known,
        default_model="m",
        wall=lambda: datetime.now(UTC),
    )
    rules = WorkerRules(
        name="w", slots={TASK_PROCESSING: slots}, prefetch=PrefetchRules(slow=held, fast=held), drain_s=5.0
    )
    return Worker(broker, around, rules, mine=frozenset(known), random=random.random)


@asynccontextmanager
async def scene(data_dir: Path, settings: Rabbitmq) -> AsyncIterator[Scene]:
    async with fresh_stores(data_dir) as stores, open_rabbitmq(settings) as broker:
        dead_letters = DeadLetters(broker, stores.tasks)
        work = (
            stores.queue.run(),
            Relay(stores.queue, broker, [TASK_PROCESSING]).run(),
            dead_letters.run(),
            worker_of(stores, broker).run(),
        )
        async with running(*map(asyncio.create_task, work)):
            yield Scene(stores=stores, broker=broker, settings=settings, dead_letters=dead_letters)


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
                took_s = await eventually(are_done)
                (still,) = await stores.tasks.several("acme", [slow])

    assert still.status is TaskStatus.PROCESSING
    assert took_s < 5.0  # and not only after the first worker has waited so long for its attempt


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
