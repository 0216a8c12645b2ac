"""How many tasks of a tenant may wait: the others always have room, and the store is not asked each time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest

from sutazai.core.errors import StoreUnavailable, TooManyWaiting
from sutazai.core.task import Task, TaskDraft
from sutazai.ports.tasks import Start
from sutazai.tasks.bound import COUNT_S, REMEMBERED, WaitingBound
from sutazai.testing.queue import MemoryQueue
from sutazai.testing.tasks import MemoryTaskStore

MOST = 10


class CountedStore(MemoryTaskStore):
    """Knows how often it had to count."""

    def __init__(self) -> None:
        super().__init__(MemoryQueue())
        self.counts: Counter[str] = Counter()
        self.takes_s = 0.0
        self.counting: asyncio.Event | None = None
        """Whether a count is let go on."""

    async def waiting(self, tenant: str, *, at_most: int) -> int:
        self.counts[tenant] += 1
        counted = await super().waiting(tenant, at_most=at_most)
        await asyncio.sleep(0)  # others come meanwhile
        if self.counting is not None:
            await self.counting.wait()
        clock.now += self.takes_s
        return counted


class Clock:
    """Monotonic time that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


clock = Clock()


@pytest.fixture
def store() -> CountedStore:
    return CountedStore()


@pytest.fixture
def bound(store: CountedStore) -> WaitingBound:
    return WaitingBound(store, lambda tenant: 2 * MOST if tenant == "large" else MOST, clock=clock)


async def submitted(bound: WaitingBound, store: CountedStore, tenant: str, count: int) -> list[Task]:
    """So many at once; those that there was room for."""

    async def one() -> Sequence[Task]:
        async with bound.room(tenant):
            await asyncio.sleep(0)
            return await store.submit([TaskDraft(tenant=tenant, agent="echo")])

    answers = await asyncio.gather(*(one() for _ in range(count)), return_exceptions=True)
    assert all(isinstance(answer, list | TooManyWaiting) for answer in answers), answers
    return [task for answer in answers if isinstance(answer, list) for task in answer]


async def test_clients_that_come_at_once_get_no_further_than_the_bound(
    bound: WaitingBound, store: CountedStore
) -> None:
    made = [await submitted(bound, store, tenant, 50) for tenant in ("acme", "other", "large")]

    assert [len(tasks) for tasks in made] == [MOST, MOST, 2 * MOST]
    assert await store.waiting("acme", at_most=99) == MOST


async def test_one_that_is_refused_is_told_why_and_when_to_come_back(bound: WaitingBound, store: CountedStore) -> None:
    await submitted(bound, store, "acme", MOST)

    with pytest.raises(TooManyWaiting, match="10 tasks of the tenant 'acme' waited already") as refused:
        async with bound.room("acme"):
            pass
    assert refused.value.retry_after_s > 0


async def test_tasks_are_counted_once_a_while(bound: WaitingBound, store: CountedStore) -> None:
    for _ in range(5):
        await submitted(bound, store, "acme", 20)
    assert store.counts["acme"] == 1

    clock.now += COUNT_S
    await submitted(bound, store, "acme", 20)
    assert store.counts["acme"] == 2


async def test_others_do_not_wait_for_a_count_while_their_tenant_has_room(
    bound: WaitingBound, store: CountedStore
) -> None:
    """And are counted all the same."""
    await submitted(bound, store, "large", 1)
    clock.now += COUNT_S
    store.counting = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        waits = group.create_task(submitted(bound, store, "large", 1))
        await asyncio.sleep(0)
        assert len(await submitted(bound, store, "large", 5)) == 5
        assert not waits.done()
        store.counting.set()
    store.counting = None

    assert len(await submitted(bound, store, "large", 50)) == 2 * MOST - 7
    assert store.counts["large"] == 2


async def test_a_tenant_at_its_bound_waits_for_the_count_that_may_make_room(
    bound: WaitingBound, store: CountedStore
) -> None:
    tasks = await submitted(bound, store, "acme", MOST)
    for task in tasks:
        await store.begin([Start(task=task.id, may_take_over=False)], worker="w", delivery_limit=3)
    clock.now += COUNT_S

    assert len(await submitted(bound, store, "acme", 50)) == MOST


async def test_a_count_that_takes_long_is_made_less_often(bound: WaitingBound, store: CountedStore) -> None:
    store.takes_s = 1.0
    await submitted(bound, store, "acme", 1)
    clock.now += 10 * COUNT_S
    await submitted(bound, store, "acme", 1)

    assert store.counts["acme"] == 1


async def test_what_was_started_makes_room_at_the_next_count(bound: WaitingBound, store: CountedStore) -> None:
    (first, *_) = await submitted(bound, store, "acme", MOST)
    await store.begin([Start(task=first.id, may_take_over=False)], worker="w", delivery_limit=3)

    assert not await submitted(bound, store, "acme", 1)
    clock.now += COUNT_S
    assert len(await submitted(bound, store, "acme", 5)) == 1


async def test_what_agents_made_counts(bound: WaitingBound, store: CountedStore) -> None:
    await store.submit([TaskDraft(tenant="acme", agent="echo")] * (MOST + 5))

    assert not await submitted(bound, store, "acme", 1)


async def test_what_the_store_did_not_keep_leaves_its_room(bound: WaitingBound, store: CountedStore) -> None:
    await submitted(bound, store, "acme", 1)
    store.is_away = True
    for _ in range(3 * MOST):
        with pytest.raises(StoreUnavailable):
            async with bound.room("acme"):
                await store.submit([TaskDraft(tenant="acme", agent="echo")])
    store.is_away = False

    assert len(await submitted(bound, store, "acme", 50)) == MOST - 1


async def test_a_count_that_fails_is_made_again_by_the_next(bound: WaitingBound, store: CountedStore) -> None:
    store.is_away = True
    with pytest.raises(StoreUnavailable):
        async with bound.room("acme"):
            pass
    store.is_away = False

    assert len(await submitted(bound, store, "acme", 50)) == MOST


async def test_tenants_that_are_not_heard_of_are_forgotten(bound: WaitingBound, store: CountedStore) -> None:
    for number in range(REMEMBERED):
        async with bound.room(f"tenant {number}"):
            pass
    clock.now += COUNT_S
    async with bound.room("acme"):
        pass

    assert bound.remembered == 1


async def test_while_nobody_could_have_filled_half_of_the_room_it_is_not_counted_again(store: CountedStore) -> None:
    bound = WaitingBound(store, lambda _: 1_000_000, clock=clock)
    for _ in range(20):
        await submitted(bound, store, "acme", 1)
        clock.now += 2 * COUNT_S
    seldom = store.counts["acme"]
    clock.now += 100.0
    await submitted(bound, store, "acme", 1)

    assert (seldom, store.counts["acme"]) == (1, 2)


async def test_a_bound_that_is_reached_before_the_next_count_is_counted_again_soon(store: CountedStore) -> None:
    most = 100_000
    bound = WaitingBound(store, lambda _: most, clock=clock)
    (task,) = await submitted(bound, store, "acme", 1)
    most = 1
    refused = await submitted(bound, store, "acme", 1)
    await store.cancel("acme", task.id)
    clock.now += COUNT_S

    assert refused == []
    assert await submitted(bound, store, "acme", 1)
    assert store.counts["acme"] == 2
