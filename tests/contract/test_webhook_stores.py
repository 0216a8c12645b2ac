"""The store of webhooks: an end is kept with its task, taken by one at a time, and never forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

import pytest
from tests.shards import addresses

from sutazai.adapters.postgres.stores import Stores
from sutazai.core.task import Completed, Failed, FailureReason, Retried, Task, TaskDraft, TaskStatus
from sutazai.ports.tasks import Change, Start

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

HOOK = "https://example.org/done"


@pytest.fixture(params=["postgres", "two shards"])
def urls(request: pytest.FixtureRequest) -> Sequence[str]:
    return addresses(request)


async def begun(stores: Stores, webhook: str = HOOK) -> Task:
    (made,) = await stores.tasks.submit([TaskDraft(tenant="acme", agent="echo", webhook=webhook)])
    (task,) = await stores.tasks.begin([Start(task=made.id, may_take_over=False)], worker="w", delivery_limit=20)
    assert isinstance(task, Task)
    return task


async def test_only_an_end_is_kept_and_only_where_an_address_was_left(stores: Stores) -> None:
    goes_on, silent, told = await begun(stores), await begun(stores, ""), await begun(stores)
    await stores.tasks.change(
        [
            Change(task=goes_on.id, event=Retried(1, FailureReason.ERROR, "It broke.", goes_on.created_at)),
            Change(task=silent.id, event=Completed(1, "1")),
            Change(task=told.id, event=Completed(1, "2")),
        ]
    )
    (due,) = await stores.webhooks.claim(limit=10, lease_s=60)

    assert (due.task.id, due.version, due.status, due.attempt) == (told.id, 3, TaskStatus.COMPLETED, 1)
    assert due.task.result == "2"


async def test_each_is_taken_by_one_and_is_due_again_when_its_lease_ended(stores: Stores) -> None:
    """As when whoever took it is killed."""
    task = await begun(stores)
    await stores.tasks.change([Change(task=task.id, event=Completed(1, "1"))])
    both = await asyncio.gather(*(stores.webhooks.claim(limit=10, lease_s=0) for _ in range(2)))
    again = await stores.webhooks.claim(limit=10, lease_s=60)
    meanwhile = await stores.webhooks.claim(limit=10, lease_s=60)
    await stores.webhooks.postpone(again[0], pause_s=0)
    postponed = await stores.webhooks.claim(limit=10, lease_s=0)
    await stores.webhooks.settle(postponed[0])

    assert sum(map(len, both)) in {1, 2}
    assert [len(found) for found in (again, meanwhile, postponed)] == [1, 0, 1]
    assert postponed[0].attempt == again[0].attempt + 1
    assert await stores.webhooks.claim(limit=10, lease_s=60) == []


async def test_every_end_of_a_task_that_was_tried_again_is_told(stores: Stores) -> None:
    task = await begun(stores)
    await stores.tasks.change([Change(task=task.id, event=Failed(1, FailureReason.ERROR, "It broke."))])
    await stores.tasks.requeue(None, task.id)
    await stores.tasks.cancel(None, task.id)
    due = await stores.webhooks.claim(limit=10, lease_s=60)

    assert sorted(one.status.value for one in due) == ["cancelled", "failed"]
    assert {one.task.status for one in due} == {TaskStatus.CANCELLED}


async def test_an_end_wakes_those_who_tell(stores: Stores) -> None:
    async with aclosing(cast("AsyncGenerator[None, None]", stores.webhooks.due())) as due, asyncio.timeout(3):
        await anext(due)  # it listens
        task = await begun(stores)
        await stores.tasks.change([Change(task=task.id, event=Completed(1, "1"))])
        await anext(due)

        assert len(await stores.webhooks.claim(limit=10, lease_s=60)) == 1
