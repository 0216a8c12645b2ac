"""Movers of slots that are killed or stand still: nobody waits for them, and those that come back hand nothing over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence

import pytest
from tests.postgres_servers import embedded
from tests.shard_moves import (
    MOVED,
    NEIGHBOUR,
    STEPS,
    all_done,
    filled,
    kill_after,
    moved,
    mover_of,
    rows,
    seen,
    shards_of,
    tasks_of,
)
from tests.shards import make_databases, sharded_stores

from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.sharded.handover import Handover
from sutazai.adapters.postgres.sharded.moving import Moved
from sutazai.adapters.postgres.sharded.watching import GONE_S, LOOK_S, MoveWatch
from sutazai.adapters.postgres.stores import Stores
from sutazai.core.errors import StoreUnavailable
from sutazai.core.task import Task, TaskDraft
from sutazai.policy.sharding import slot_of

pytestmark = pytest.mark.deadline(120)

SLOT = slot_of(MOVED)
SOON_S = 0.01
NEVER_S = 1e9
UNTIL_GONE = int(GONE_S / LOOK_S) + 2
"""Looks: the first one only begins to count."""


@pytest.fixture(scope="module")
def urls() -> Iterator[Sequence[str]]:
    """Two databases on a server of our own."""
    with embedded() as (url, _):
        yield asyncio.run(make_databases(url))


@pytest.fixture
async def stores(urls: Sequence[str]) -> AsyncIterator[Stores]:
    async with sharded_stores(urls) as opened:
        tending = asyncio.create_task(opened.queue.run(), name="tend the queues")
        try:
            yield opened
        finally:
            tending.cancel()
            await asyncio.wait([tending])


class Watch:
    """That of a gateway whose clock we turn."""

    def __init__(self, stores: Stores) -> None:
        self._now = 0.0
        shards = shards_of(stores)
        self._watch = MoveWatch(shards.databases["even"], shards, clock=lambda: self._now)

    async def look(self, *, after_s: float = LOOK_S) -> None:
        self._now += after_s
        await self._watch.look()

    async def until_gone(self) -> None:
        for _ in range(UNTIL_GONE):
            await self.look()


async def owners(stores: Stores) -> tuple[str, list[str]]:
    """Who has the slot by the directory, and who by itself."""
    shards = shards_of(stores)
    await shards.refresh()
    found = []
    for name, database in shards.databases.items():
        async with database.transaction() as connection:
            states = await connection.fetch(database.sql["slot_states"], [SLOT])
        found += [name for row in states if row["state"] == "owned"]
    return shards.owner(SLOT), found


async def unfinished(stores: Stores) -> Sequence[tuple[str, int]]:
    """Movers and beats of moves in the directory."""
    shards = shards_of(stores)
    async with shards.databases["even"].transaction() as connection:
        found = await connection.fetch(shards.databases["even"].sql["slot_moves"], "")
    return [(row["mover"], row["beat"]) for row in found]


async def is_ended(stores: Stores, urls: Sequence[str]) -> bool:
    """Whether all is in the target, and the directory says so."""
    left = set((await rows(urls[1], SLOT)).values())
    return (await owners(stores), left, await unfinished(stores)) == (("even", ["even"]), {0}, [])


@pytest.mark.parametrize("step", STEPS)
async def test_nobody_waits_for_a_mover_that_was_killed_after_any_step(
    step: str, stores: Stores, urls: Sequence[str]
) -> None:
    """A gateway sees it and frees its tenants; the command ends the move later."""
    await filled(stores, MOVED)
    await filled(stores, NEIGHBOUR)
    before, beside = await seen(stores, MOVED), await seen(stores, NEIGHBOUR)
    await kill_after(step, urls)

    await Watch(stores).until_gone()

    has_it = "even" if step in {"owned", "given", "tidied"} else "odd"
    assert await owners(stores) == (has_it, [has_it])
    assert await seen(stores, MOVED) == before
    late = await stores.tasks.submit([TaskDraft(tenant=MOVED, agent="echo")])
    assert [beat for _, beat in await unfinished(stores)] == ([] if step == "tidied" else [0])

    await moved(mover_of(stores))

    assert await is_ended(stores, urls)
    assert (await rows(urls[0], SLOT))["tasks"] == 5 + len(late)
    assert await seen(stores, NEIGHBOUR) == beside
    done = await all_done(stores, count=5)
    assert len({task.id for task in done}) == len(done)
    assert {task.id for task in late} <= {task.id for task in done}


@pytest.mark.parametrize("step", STEPS[:-1])
async def test_a_slow_mover_that_comes_back_hands_nothing_over(step: str, stores: Stores, urls: Sequence[str]) -> None:
    """It was taken for gone while it stood still, and its tenants have worked since; it says so, and ends."""
    await filled(stores, MOVED)
    late: list[Task] = []

    async def stand_still(name: str) -> None:
        if name == step:
            await Watch(stores).until_gone()
            late.extend(await stores.tasks.submit([TaskDraft(tenant=MOVED, agent="echo")]))

    with pytest.raises(StoreUnavailable, match="nother process"):
        await moved(mover_of(stores, after=stand_still, beat_s=NEVER_S))

    has_it = "even" if step in {"owned", "given"} else "odd"
    assert await owners(stores) == (has_it, [has_it])
    assert {task.id for task in late} < {task.id for task in await tasks_of(stores)}
    await moved(mover_of(stores))
    assert await is_ended(stores, urls)
    assert (await rows(urls[0], SLOT))["tasks"] == 5 + 1


async def test_a_mover_that_lives_is_left_alone_however_long_it_takes(stores: Stores, urls: Sequence[str]) -> None:
    await filled(stores, MOVED)
    watch = Watch(stores)

    async def take_long(name: str) -> None:
        for _ in range(UNTIL_GONE):
            await beaten(stores)
            await watch.look()

    await moved(mover_of(stores, after=take_long, beat_s=SOON_S))

    assert await is_ended(stores, urls)


async def beaten(stores: Stores) -> None:
    """Until the mover has given one more sign of life; at once where there is none any more."""
    before = await unfinished(stores)
    while before and await unfinished(stores) == before:
        await asyncio.sleep(SOON_S)


async def test_time_in_which_the_one_who_looks_stood_still_makes_nobody_gone(
    stores: Stores, urls: Sequence[str]
) -> None:
    await filled(stores, MOVED)

    async def look_late(name: str) -> None:
        watch = Watch(stores)
        await watch.look()
        await watch.look(after_s=3600)

    await moved(mover_of(stores, after=look_late, beat_s=NEVER_S))

    assert await is_ended(stores, urls)


@pytest.mark.parametrize("step", ["copied", "fenced", "compared", "owned", "given"])
async def test_several_gateways_and_the_command_at_once_agree(step: str, stores: Stores, urls: Sequence[str]) -> None:
    await filled(stores, MOVED)
    before = await seen(stores, MOVED)
    await kill_after(step, urls)
    watches = [Watch(stores) for _ in range(4)]
    for _ in range(UNTIL_GONE - 2):
        await asyncio.gather(*(watch.look() for watch in watches))

    async def look() -> None:
        for _ in range(4):
            await asyncio.gather(*(watch.look() for watch in watches))

    _, ended = await asyncio.gather(look(), moved(mover_of(stores)), return_exceptions=True)

    assert isinstance(ended, Moved), ended
    assert await is_ended(stores, urls)
    assert await seen(stores, MOVED) == before


def handover_of(stores: Stores) -> Handover:
    even, odd = (shards_of(stores).databases[name] for name in ("even", "odd"))
    return Handover(even, "", source=odd, target=even, slots=[SLOT])


@pytest.mark.parametrize("step", ["fenced", "owned"])
@pytest.mark.parametrize("way", ["there", "there and back", "there again"])
async def test_a_gateway_that_stood_still_after_its_look_changes_nothing_that_came_later(
    step: str, way: str, stores: Stores, urls: Sequence[str]
) -> None:
    """What it saw was of a mover whose move was ended meanwhile, and of later moves too."""
    await filled(stores, MOVED)
    before = await seen(stores, MOVED)
    await kill_after(step, urls)
    handover = handover_of(stores)
    found, [(mover, _)] = await handover.look(), await unfinished(stores)
    await moved(mover_of(stores))
    if way != "there":
        await moved(mover_of(stores), source="even", target="odd")

    async def act(_: str = "") -> None:
        assert await handover.take_back(found) == (frozenset(), frozenset({SLOT} if way == "there" else {}))
        assert await handover.give({SLOT: mover}) == frozenset()

    if way == "there again":
        await moved(mover_of(stores, after=lambda name: act() if name in {"fenced", "compared"} else _nothing()))
    else:
        await act()

    has_it = "odd" if way == "there and back" else "even"
    assert await owners(stores) == (has_it, [has_it])
    assert await seen(stores, MOVED) == before


async def _nothing() -> None:
    return


async def test_gateways_look_by_themselves(stores: Stores, urls: Sequence[str]) -> None:
    """One wrote down that the mover is gone, and went too; another frees the tenants before they are refused."""
    await filled(stores, MOVED)
    await kill_after("compared", urls)
    directory: Database = shards_of(stores).databases["even"]
    async with directory.transaction() as connection:
        await connection.execute("UPDATE shard_moves SET beat = 0")

    await stores.tasks.submit([TaskDraft(tenant=MOVED, agent="echo")])

    assert await owners(stores) == ("odd", ["odd"])
