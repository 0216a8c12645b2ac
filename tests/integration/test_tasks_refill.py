"""Tasks of which a broker has lost word, or with the word the worker, are started all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.postgres_databases import fresh_stores
from tests.postgres_servers import embedded
from tests.shards import make_databases, sharded_stores, tenant_of

from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.stores import Stores
from sutazai.core.errors import QueueUnavailable
from sutazai.core.task import Completed, Task, TaskDraft, TaskStatus
from sutazai.ports.agent import TASK_PROCESSING
from sutazai.ports.queue import Message
from sutazai.ports.tasks import Change, Refused, Start
from sutazai.tasks.refill import Refill, RefillRhythm
from sutazai.testing.queue import MemoryQueue

RHYTHM = RefillRhythm()
DRAFT = TaskDraft(tenant="acme", agent="a")
SOON_S = 1.0


@dataclass(slots=True, eq=False)
class Scene:
    """Stores, a broker that has no word of any task, and the processes that look after them."""

    stores: Stores
    broker: MemoryQueue = field(default_factory=MemoryQueue)
    clock_s: float = 0.0
    ahead_s: float = 0.0
    """By how much the wall clock is ahead of that of the stores."""

    def process(self, worker: str = "here") -> Refill:
        """One of several."""
        return Refill(
            self.stores.refills,
            self.stores.tasks,
            self.broker,
            [TASK_PROCESSING],
            worker=worker,
            wall=self.wall,
            clock=lambda: self.clock_s,
            rhythm=RHYTHM,
        )

    def wall(self) -> datetime:
        """The time that tasks are seen to have waited by."""
        return self.stores.wall() + timedelta(seconds=self.ahead_s)

    async def handed_over(self, count: int = 1, draft: TaskDraft = DRAFT) -> list[str]:
        """Tasks whose word has left the database."""
        tasks = [(await self.stores.tasks.submit([draft]))[0] for _ in range(count)]
        for database in self.databases:
            await _run(database, "DELETE FROM dispatch")
        return [task.id for task in tasks]

    async def begun(self, task: str, *, worker: str) -> Task:
        """An attempt of it, under way."""
        start = Start(task=task, may_take_over=False)
        (begun,) = await self.stores.tasks.begin([start], worker=worker, delivery_limit=3)
        assert isinstance(begun, Task)
        return begun

    async def words(self) -> list[str]:
        """Tasks that the database holds word of, in the order they would be taken."""
        held = [await _run(each, "SELECT task FROM dispatch ORDER BY priority, turn, id") for each in self.databases]
        return [f"task_{row['task'].hex}" for rows in held for row in rows]

    async def look_twice(self, refill: Refill) -> list[str]:
        """As long as it takes until what is missing is put again; word of which tasks there is then."""
        self.pass_patience()
        for _ in range(2):
            await refill.look()
            self.clock_s += RHYTHM.look_s
        return await self.words()

    def pass_patience(self) -> None:
        """What waits now has waited for long."""
        self.ahead_s += RHYTHM.patience_s + SOON_S

    async def beat_for(self, seconds: float, *others: Refill) -> None:
        """These live, and nobody else does."""
        until = self.clock_s + seconds
        while self.clock_s < until:
            self.clock_s += RHYTHM.beat_s
            for each in others:
                await each.beat()

    @property
    def databases(self) -> Sequence[Database]:
        """All that keep tasks."""
        return list(self.stores.databases.values())


@pytest.fixture
async def scene(data_dir: Path) -> AsyncIterator[Scene]:
    """Over one database."""
    async with fresh_stores(data_dir) as stores:
        yield Scene(stores)


async def test_word_that_was_lost_is_put_again_at_the_second_look(scene: Scene) -> None:
    lost = await scene.handed_over(3)
    refill = scene.process()
    scene.pass_patience()
    await refill.look()
    at_first = await scene.words()
    scene.clock_s += RHYTHM.look_s
    await refill.look()

    assert (at_first, await scene.words()) == ([], lost)
    assert refill.refilled == 3


async def test_word_that_is_at_the_broker_is_not_missing(scene: Scene) -> None:
    kept = await scene.handed_over(3)
    await scene.broker.put([_word(task) for task in kept])

    assert await scene.look_twice(scene.process()) == []


async def test_those_that_waited_longest_are_taken_for_the_lost_ones(scene: Scene) -> None:
    lost = await scene.handed_over(2)
    kept = await scene.handed_over(3)
    await scene.broker.put([_word(task) for task in kept])

    assert await scene.look_twice(scene.process()) == lost


async def test_tasks_of_later_are_left_alone(scene: Scene) -> None:
    await scene.handed_over(draft=replace(DRAFT, run_at=scene.wall() + timedelta(days=1)))

    assert await scene.look_twice(scene.process()) == []


async def test_tasks_of_a_moment_ago_are_left_alone(scene: Scene) -> None:
    await scene.handed_over()
    refill = scene.process()
    for _ in range(3):
        await refill.look()
        scene.clock_s += RHYTHM.look_s

    assert await scene.words() == []


async def test_while_word_is_on_its_way_to_the_broker_none_is_put_again(scene: Scene) -> None:
    await scene.handed_over(2)
    (on_its_way,) = await scene.stores.tasks.submit([DRAFT])

    assert await scene.look_twice(scene.process()) == [on_its_way.id]


async def test_of_several_who_look_at_once_one_puts_it_again(scene: Scene) -> None:
    lost = await scene.handed_over(5)
    several = [scene.process(name) for name in ("a", "b", "c")]
    scene.pass_patience()
    for _ in range(3):
        await asyncio.gather(*(each.look() for each in several))
        scene.clock_s += RHYTHM.look_s

    assert await scene.words() == lost
    assert sum(each.refilled for each in several) == 5


async def test_a_task_whose_word_was_doubled_is_started_once(scene: Scene) -> None:
    (task,) = await scene.handed_over()
    await scene.look_twice(scene.process())
    await scene.begun(task, worker="a")
    start = Start(task=task, may_take_over=False)
    (again,) = await scene.stores.tasks.begin([start], worker="b", delivery_limit=3)

    assert isinstance(again, Refused)


async def test_an_attempt_whose_worker_is_gone_with_its_word_is_given_up(scene: Scene) -> None:
    (task,) = await scene.handed_over()
    here, there = scene.process("here"), scene.process("there")
    await there.beat()
    old = await scene.begun(task, worker="there")
    await scene.beat_for(RHYTHM.lease_s + 2 * RHYTHM.beat_s, here)
    words = await scene.look_twice(here)
    (found,) = await scene.stores.tasks.several("acme", [task])
    late = Change(task=task, event=Completed(old.deliveries, "1"))

    assert words == [task]
    assert (found.status, found.losses, here.given_up) == (TaskStatus.PENDING, 1, 1)
    assert await scene.stores.tasks.change([late]) == [None]
    assert (await scene.begun(task, worker="here")).deliveries == 2


async def test_attempts_of_workers_that_live_are_theirs(scene: Scene) -> None:
    (task,) = await scene.handed_over()
    here, there = scene.process("here"), scene.process("there")
    await there.beat()
    await scene.begun(task, worker="there")
    await scene.beat_for(3 * RHYTHM.lease_s, here, there)

    assert await scene.look_twice(here) == []


async def test_while_the_broker_has_word_of_an_attempt_it_is_left_to_the_broker(scene: Scene) -> None:
    (task,) = await scene.handed_over()
    here, there = scene.process("here"), scene.process("there")
    await there.beat()
    await scene.begun(task, worker="there")
    await scene.broker.put([_word(task)])
    await scene.beat_for(2 * RHYTHM.lease_s, here)

    assert await scene.look_twice(here) == []


async def test_a_worker_that_left_nothing_behind_is_forgotten(scene: Scene) -> None:
    here, there = scene.process("here"), scene.process("there")
    await there.beat()
    await scene.beat_for(2 * RHYTHM.lease_s, here)
    await here.look()
    (store,) = scene.stores.refills

    assert set(await store.beats()) == {"here"}


async def test_a_worker_that_beats_again_is_not_forgotten(scene: Scene) -> None:
    here, there = scene.process("here"), scene.process("there")
    await there.beat()
    await scene.beat_for(2 * RHYTHM.lease_s, here)
    await there.beat()
    await here.look()
    (store,) = scene.stores.refills

    assert set(await store.beats()) == {"here", "there"}


async def test_while_the_broker_is_away_nothing_is_believed(scene: Scene) -> None:
    await scene.handed_over()
    refill = scene.process()
    scene.broker.is_away = True
    scene.pass_patience()
    for _ in range(3):
        with pytest.raises(QueueUnavailable):
            await refill.look()

    assert await scene.words() == []


@pytest.fixture(scope="module")
def shards() -> Iterator[Sequence[str]]:
    """Two databases on a server of our own."""
    with embedded() as (url, _):
        yield asyncio.run(make_databases(url))


async def test_each_shard_is_looked_at(shards: Sequence[str]) -> None:
    tenants = [tenant_of(0), tenant_of(1)]
    async with sharded_stores(shards) as stores:
        scene = Scene(stores)
        lost = [task for name in tenants for task in await scene.handed_over(2, replace(DRAFT, tenant=name))]
        kept = await scene.handed_over(1, replace(DRAFT, tenant=tenants[0]))
        await scene.broker.put([_word(task) for task in kept])
        words = await scene.look_twice(scene.process())

    assert set(lost) <= set(words)


def _word(task: str) -> Message:
    return Message(task=task, queue=TASK_PROCESSING, tenant="acme", agent="a")


async def _run(database: Database, statement: str) -> Sequence[dict[str, Any]]:
    async with database.transaction() as connection:
        rows: Sequence[dict[str, Any]] = await connection.fetch(statement)
    return rows
