"""Slots move between two databases while their tenants work: nothing is lost or doubled, whatever is killed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime, timedelta

import pytest
from tests.postgres_servers import embedded
from tests.shard_moves import (
    MOVED,
    NEIGHBOUR,
    QUEUE,
    STEPS,
    all_done,
    filled,
    kill_after,
    moved,
    mover_of,
    rows,
    seen,
    tasks_of,
)
from tests.shards import make_databases, sharded_stores, tenant_of

from sutazai.adapters.postgres.sharded.moving import Mover
from sutazai.adapters.postgres.stores import Stores
from sutazai.core.errors import Conflict, StoreUnavailable
from sutazai.core.task import Completed, Task, TaskDraft, TaskStatus
from sutazai.policy.sharding import SlotMove, slot_of
from sutazai.ports.tasks import Change, Start, TaskFilter

pytestmark = pytest.mark.deadline(120)


@pytest.fixture(scope="module")
def urls() -> Iterator[Sequence[str]]:
    """Two databases on a server of our own."""
    with embedded() as (url, _):
        yield asyncio.run(make_databases(url))


@pytest.fixture
async def stores(urls: Sequence[str]) -> AsyncIterator[Stores]:
    """Over both, with even slots in one and odd ones in the other, and their queues tended."""
    async with sharded_stores(urls) as opened:
        tending = asyncio.create_task(opened.queue.run(), name="tend the queues")
        try:
            yield opened
        finally:
            tending.cancel()
            await asyncio.wait([tending])


@pytest.fixture
async def mover(stores: Stores) -> Mover:
    return mover_of(stores)


async def test_a_tenant_that_was_moved_finds_everything_as_it_was(
    stores: Stores, mover: Mover, urls: Sequence[str]
) -> None:
    await filled(stores, MOVED)
    await filled(stores, NEIGHBOUR)
    before, beside = await seen(stores, MOVED), await seen(stores, NEIGHBOUR)

    done = await moved(mover)

    assert await seen(stores, MOVED) == before
    assert await seen(stores, NEIGHBOUR) == beside
    there = await rows(urls[0], slot_of(MOVED))
    assert there == done.rows
    assert set(there.values()) == {5, 8, 1, 2}
    assert set((await rows(urls[1], slot_of(MOVED))).values()) == {0}
    assert set((await rows(urls[1], slot_of(NEIGHBOUR))).values()) == {5, 8, 1, 2}


async def test_a_tenant_that_was_moved_goes_on_where_it_was(stores: Stores, mover: Mover) -> None:
    """Keys are known, numbers grow, attempts end, and what waits for them begins."""
    await filled(stores, MOVED)
    tasks = {task.draft.idempotency_key or task.status.value: task for task in await tasks_of(stores)}
    numbers = [number for number, _ in await stores.messages.received(MOVED, "anna", after=0)]

    await moved(mover)

    (again,) = await stores.tasks.submit([TaskDraft(tenant=MOVED, agent="echo", idempotency_key="once")])
    assert again.id == tasks["once"].id
    assert await stores.messages.send(MOVED, "anna", sender="bert", body='"two"') > max(numbers)
    (ended,) = await stores.tasks.change([Change(task=tasks["processing"].id, event=Completed(1, "1"))])
    assert ended is not None
    assert ended.status is TaskStatus.COMPLETED
    done = await all_done(stores, count=3)
    assert {task.id for task in done} == {tasks["pending"].id, tasks["once"].id, tasks["waiting"].id}


async def test_a_slot_can_be_moved_there_and_back(stores: Stores, mover: Mover) -> None:
    await filled(stores, MOVED)
    before = await seen(stores, MOVED)

    await moved(mover)
    await moved(mover, source="even", target="odd")

    assert await seen(stores, MOVED) == before


@pytest.mark.parametrize("step", STEPS)
async def test_a_move_that_is_killed_after_any_step_is_brought_to_its_end_by_another(
    step: str, stores: Stores, urls: Sequence[str]
) -> None:
    """With kill -9, and what was written before and after it is there."""
    await filled(stores, MOVED)
    await filled(stores, NEIGHBOUR)
    beside = await seen(stores, NEIGHBOUR)
    await kill_after(step, urls)
    assert await seen(stores, NEIGHBOUR) == beside
    late: list[Task] = []
    if step not in {"fenced", "compared", "owned"}:  # in these its writers wait until somebody sees that it is gone
        late += await stores.tasks.submit([TaskDraft(tenant=MOVED, agent="echo")])

    await moved(mover_of(stores))

    assert late == [task for task in await tasks_of(stores) if task.id in {one.id for one in late}]
    assert (await rows(urls[0], slot_of(MOVED)))["tasks"] == 5 + len(late)
    assert set((await rows(urls[1], slot_of(MOVED))).values()) == {0}
    assert await seen(stores, NEIGHBOUR) == beside
    done = await all_done(stores, count=2 + 2 + len(late))  # two of each tenant wait, and the late one
    assert len({task.id for task in done}) == len(done)


@pytest.mark.parametrize("step", ["expected", "copied", "fenced", "compared"])
async def test_a_move_that_fails_gives_the_slot_back_to_its_shard(
    step: str, stores: Stores, urls: Sequence[str]
) -> None:
    await filled(stores, MOVED)
    before = await seen(stores, MOVED)

    async def fail(name: str) -> None:
        if name == step:
            raise RuntimeError("it was to fail")

    with pytest.raises(RuntimeError):
        await moved(mover_of(stores, after=fail))

    assert await seen(stores, MOVED) == before
    assert (await rows(urls[1], slot_of(MOVED)))["tasks"] == 5


async def test_a_slot_that_is_on_its_way_cannot_go_somewhere_else(stores: Stores) -> None:
    async def fail(name: str) -> None:
        raise RuntimeError("it was to fail")

    with pytest.raises(RuntimeError):
        await moved(mover_of(stores, after=fail))

    with pytest.raises(Conflict, match="on its way from 'odd' to 'even'"):
        await moved(mover_of(stores), source="even", target="odd")


async def test_of_two_who_move_the_same_slot_only_the_second_hands_it_over(stores: Stores, urls: Sequence[str]) -> None:
    """The first one finds that it was overtaken, whatever it had reached, and both shards never own the slot."""
    await filled(stores, MOVED)
    before = await seen(stores, MOVED)

    async def overtake(name: str) -> None:
        if name == "compared":
            await moved(mover_of(stores))

    with pytest.raises(StoreUnavailable, match="nother process"):
        await moved(mover_of(stores, after=overtake))

    assert await seen(stores, MOVED) == before
    assert set((await rows(urls[1], slot_of(MOVED))).values()) == {0}


async def test_what_was_deleted_during_a_move_stays_deleted(stores: Stores, urls: Sequence[str]) -> None:
    await filled(stores, MOVED)

    async def delete(name: str) -> None:
        if name == "copied":
            assert await stores.files.delete(MOVED, f"file-{MOVED}")
            assert await stores.sessions.delete(MOVED, f"sess_{MOVED}")

    await moved(mover_of(stores, after=delete))

    there = await rows(urls[0], slot_of(MOVED))
    assert (there["files"], there["sessions"], there["session_messages"]) == (0, 0, 0)


async def test_copies_on_their_way_are_nobodys_work(stores: Stores, mover: Mover) -> None:
    """What ends tasks, sweeps sessions and looks what is due sees each row once, wherever a move stands."""
    soon = datetime.now(UTC) + timedelta(seconds=1)
    (task,) = await stores.tasks.submit([TaskDraft(tenant=MOVED, agent="echo", deadline=soon)])
    found: list[tuple[int, int]] = []

    async def look(name: str) -> None:
        if name in {"copied", "fenced", "owned"}:
            tasks = await stores.tasks.page(None, TaskFilter(), limit=10)
            expired = await stores.tasks.expire(soon - timedelta(seconds=1), limit=10)
            found.append((len(tasks), expired))

    await moved(mover_of(stores, after=look))

    assert found == [(1, 0), (0, 0), (1, 0)]
    assert await stores.tasks.expire(soon + timedelta(seconds=1), limit=10) == 1
    assert [event.kind for event in await stores.tasks.events(MOVED, task.id, limit=9)] == [
        "task.submitted",
        "task.failed",
    ]


async def test_empty_slots_are_moved_together_and_full_ones_alone(stores: Stores, mover: Mover) -> None:
    await filled(stores, MOVED)
    moves = [SlotMove(slot, "odd", "even") for slot in {slot_of(MOVED), *range(1, 200, 2)}]

    groups = await mover.plan(moves)

    assert sorted(map(len, groups)) == [1, len(moves) - 1]
    assert [SlotMove(slot_of(MOVED), "odd", "even")] in groups


@pytest.mark.deadline(120)
async def test_tenants_that_work_during_moves_lose_nothing_and_do_nothing_twice(
    stores: Stores, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four tenants submit and two workers do their tasks while two of them go there and back."""
    tenants = [MOVED, NEIGHBOUR, tenant_of(0), tenant_of(0, 1)]
    work = _Work(stores, tenants)
    async with asyncio.TaskGroup() as group:
        writers = [group.create_task(work.submit(tenant)) for tenant in tenants]
        workers = [group.create_task(work.do()) for _ in range(2)]
        mover, pauses = mover_of(stores), []
        for there, back in (("odd", "even"), ("even", "odd")) * 2:
            for tenant in (MOVED, NEIGHBOUR):
                await asyncio.sleep(0.2)
                done = await mover.move([slot_of(tenant)], source=there, target=back)
                pauses.append(done.pause_s)
        work.is_over = True
        await asyncio.gather(*writers)
        while len(work.ends) < len(work.acknowledged):
            await asyncio.sleep(0.05)
        for worker in workers:
            worker.cancel()

    assert sorted(work.ends) == sorted(work.acknowledged)
    for tenant in tenants:
        tasks = list(await stores.tasks.page(tenant, TaskFilter(), limit=100_000))
        assert sorted(task.id for task in tasks) == sorted(work.of[tenant])
        assert {(task.status, task.version, task.deliveries) for task in tasks} == {(TaskStatus.COMPLETED, 3, 1)}
    with capsys.disabled():
        sys.stdout.write(
            f"\n{len(work.ends):,} tasks during {len(pauses)} moves: the longest fence {max(pauses):.3f} s, "
            f"the longest submission {work.longest_s:.3f} s\n"
        )


class _Work:
    """What writers and workers did."""

    def __init__(self, stores: Stores, tenants: Sequence[str]) -> None:
        self._stores = stores
        self.of: dict[str, list[str]] = {tenant: [] for tenant in tenants}
        self.ends: list[str] = []
        """Tasks whose completion was taken, each time that it was."""
        self.longest_s = 0.0
        self.is_over = False

    @property
    def acknowledged(self) -> Sequence[str]:
        return [task for tasks in self.of.values() for task in tasks]

    async def submit(self, tenant: str) -> None:
        """One after another; a key makes it safe to send one again."""
        number = 0
        while not self.is_over:
            began = asyncio.get_running_loop().time()
            (task,) = await self._stores.tasks.submit(
                [TaskDraft(tenant=tenant, agent="echo", idempotency_key=f"{number}")]
            )
            self.longest_s = max(self.longest_s, asyncio.get_running_loop().time() - began)
            self.of[tenant].append(task.id)
            number += 1
            await asyncio.sleep(0.005)

    async def do(self) -> None:
        """Begin and complete, with a moment in between, so that some are under way when a slot is fenced."""
        async with self._stores.queue.consume(QUEUE, prefetch=20) as consumer:
            while True:
                deliveries = await consumer.take(20)
                starts = [Start(task=one.message.task, may_take_over=one.is_redelivered) for one in deliveries]
                begun = await self._stores.tasks.begin(starts, worker="w", delivery_limit=50)
                await asyncio.sleep(0.02)
                tasks = [one for one in begun if isinstance(one, Task)]
                changes = [Change(task=one.id, event=Completed(one.deliveries, "1")) for one in tasks]
                self.ends += [one.id for one in await self._stores.tasks.change(changes) if one is not None]
                await consumer.ack(deliveries)
