"""Stores over two shards: who finds what where, what processes hear, and who is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime

import pytest
from tests.postgres_servers import embedded
from tests.shards import make_databases, sharded_stores, tenant_of, two_shards

from sutazai.adapters.postgres.database import SlotMoved, open_database
from sutazai.adapters.postgres.sharded.moving import Mover
from sutazai.adapters.postgres.sharded.queue import ShardedQueue
from sutazai.adapters.postgres.sharded.shards import Shards
from sutazai.adapters.postgres.sharded.stores import ShardedScheduleStore
from sutazai.adapters.postgres.sharded.tasks import ShardedTaskStore
from sutazai.core.errors import Misdirected, StoreUnavailable
from sutazai.core.identity import Tenant
from sutazai.core.task import TaskDraft
from sutazai.edge.errors import status_of
from sutazai.policy.sharding import slot_of
from sutazai.ports.queue import Message
from sutazai.settings.secret import Secret
from sutazai.tasks.submit import Submission, Submitter, Wanted
from sutazai.testing.plain_agents import plain_agents

EVEN, ODD = tenant_of(0), tenant_of(1)
QUEUE = "task_processing"


@pytest.fixture(scope="module")
def urls() -> Iterator[Sequence[str]]:
    """Two databases on a server of our own."""
    with embedded() as (url, _):
        yield asyncio.run(make_databases(url))


@pytest.fixture
async def shards(urls: Sequence[str]) -> AsyncIterator[Shards]:
    async with two_shards(urls) as opened:
        yield opened


async def test_the_slot_of_a_tenant_is_the_same_in_the_database(shards: Shards) -> None:
    names = ["default", "acme", "Ünïcode", "a b", *(f"tenant-{number}" for number in range(500))]
    async with shards.databases["even"].transaction() as connection:
        found = await connection.fetch("SELECT sutazai_slot(one) AS slot FROM unnest($1::text[]) AS one", names)

    assert [row["slot"] for row in found] == [slot_of(name) for name in names]


async def test_the_slot_in_an_id_is_the_same_in_the_database(shards: Shards) -> None:
    tasks = ShardedTaskStore(shards, max_length=100)
    await tasks.submit([TaskDraft(tenant=tenant, agent="echo") for tenant in (EVEN, ODD)])

    for name, tenant in (("even", EVEN), ("odd", ODD)):
        async with shards.databases[name].transaction() as connection:
            rows = await connection.fetch("SELECT tenant, sutazai_slot(id) AS slot FROM tasks")
        assert [(row["tenant"], row["slot"]) for row in rows] == [(tenant, slot_of(tenant))]


async def test_a_transaction_on_a_slot_that_is_elsewhere_does_nothing(shards: Shards) -> None:
    with pytest.raises(SlotMoved):
        async with shards.databases["even"].of([slot_of(ODD)]).transaction():
            pytest.fail("it began")


async def test_a_process_that_heard_of_no_move_finds_the_new_shard(shards: Shards) -> None:
    """Its table is old; the shard says so, and it reads the new one."""
    old = Shards(shards.databases["even"], shards.databases, region="")
    await old.refresh()
    tasks = ShardedTaskStore(old, max_length=100)
    (task,) = await tasks.submit([TaskDraft(tenant=ODD, agent="echo")])
    await Mover(shards.databases["even"], shards).move([slot_of(ODD)], source="odd", target="even")
    assert old.owner(slot_of(ODD)) == "odd"

    assert await tasks.get(ODD, task.id) == task

    assert old.owner(slot_of(ODD)) == "even"


async def test_a_consumer_takes_from_all_shards_in_turn_and_holds_no_more_than_it_may(shards: Shards) -> None:
    queue = ShardedQueue(shards, max_length=100)
    await queue.put(
        [
            Message(task=f"task_{number:032x}", queue=QUEUE, tenant=tenant, agent="echo")
            for number in range(10)
            for tenant in (EVEN, ODD)
        ]
    )
    async with queue.consume(QUEUE, prefetch=3) as consumer:
        taken = [delivery for _ in range(3) for delivery in await consumer.take(1)]
        assert {delivery.message.tenant for delivery in taken} == {EVEN, ODD}
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await consumer.take(1)
        await consumer.ack(taken[:2])

        assert len(await consumer.take(5)) == 2


async def test_shards_hear_of_the_weights_of_tenants(urls: Sequence[str]) -> None:
    """Their queues are fair by them."""
    async with sharded_stores(urls) as stores:
        await stores.tenants.set(Tenant(name=ODD, weight=3.0))

        async with asyncio.timeout(10):
            while not await _weights(stores.databases["odd"]):
                await asyncio.sleep(0.05)
        assert await _weights(stores.databases["odd"]) == [(ODD, 3.0)]


async def _weights(database: object) -> Sequence[tuple[str, float]]:
    async with database.transaction() as connection:  # type: ignore[attr-defined]
        return [tuple(row) for row in await connection.fetch("SELECT name, weight FROM tenants")]


async def test_a_tenant_of_another_region_is_refused_and_the_others_of_its_batch_are_not(shards: Shards) -> None:
    async with shards.databases["even"].transaction() as connection:
        await connection.execute(
            "INSERT INTO tenants (name, weight, priority, limits, region) VALUES ($1, 1, 'normal', '{}', 'us')", ODD
        )
    await shards.refresh()
    submission = Submission(ShardedTaskStore(shards, max_length=100), plain_agents())
    running = asyncio.create_task(submission.run())
    try:
        kept, refused = await asyncio.gather(
            *(submission.submit(Wanted(agent="echo"), Submitter(tenant=tenant)) for tenant in (EVEN, ODD)),
            return_exceptions=True,
        )
    finally:
        running.cancel()
        await asyncio.wait([running])

    assert not isinstance(kept, BaseException)
    assert isinstance(refused, Misdirected)
    assert status_of(refused)[0] == 421
    assert "is kept in the region 'us'" in refused.message


async def test_nothing_is_kept_before_a_shard_was_added(shards: Shards) -> None:
    async with shards.databases["even"].transaction() as connection:
        await connection.execute("DELETE FROM shard_slots")
    await shards.refresh()

    with pytest.raises(StoreUnavailable, match="Take one into use with `sutazai shards add NAME`"):
        await ShardedTaskStore(shards, max_length=100).submit([TaskDraft(tenant=EVEN, agent="echo")])


async def test_one_shard_that_is_away_keeps_nobody_else_from_work(shards: Shards) -> None:
    """Deadlines, schedules and the queue of the others go on; only its own tenants are told."""
    async with open_database(Secret("postgresql://u@127.0.0.1:9/none"), timeout_s=0.5) as away:
        half = Shards(shards.databases["even"], {"odd": away, "even": shards.databases["even"]}, region="")
        await half.refresh()
        tasks, queue = ShardedTaskStore(half, max_length=100), ShardedQueue(half, max_length=100)
        (task,) = await tasks.submit([TaskDraft(tenant=EVEN, agent="echo")])

        with pytest.raises(StoreUnavailable):
            await tasks.submit([TaskDraft(tenant=ODD, agent="echo")])
        assert await tasks.expire(datetime.now(UTC), limit=10) == 0
        assert (await ShardedScheduleStore(half).due(limit=10))[1] == []
        await queue.put([Message(task=task.id, queue=QUEUE, tenant=EVEN, agent="echo")])
        async with queue.consume(QUEUE, prefetch=1) as consumer:
            (delivery,) = await consumer.take(1)
        assert delivery.message.task == task.id
