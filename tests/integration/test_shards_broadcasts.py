"""What agents tell each other reaches the stream while their tenant moves between shards: all of it, in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
from tests.postgres_servers import embedded
from tests.rabbit_servers import eventually
from tests.shard_moves import MOVED, moved, mover_of
from tests.shards import make_databases, sharded_stores, tenant_of

from sutazai.adapters.postgres.stores import Stores
from sutazai.core.errors import QueueUnavailable, StoreUnavailable
from sutazai.ports.broadcasts import MessageNotice, Source, Unseen
from sutazai.tasks.broadcast import Append, Broadcast, Rhythm

pytestmark = pytest.mark.deadline(120)

RHYTHM = Rhythm(look_s=0.02, beat_s=0.1, lease_s=0.4, longest_pause_s=0.2)
THERE_ALREADY = tenant_of(0)
"""In the shard that the other one is moved to."""
NAMES = ("anna", "bert")


@pytest.fixture(scope="module")
def urls() -> Iterator[Sequence[str]]:
    """Two databases on a server of our own."""
    with embedded() as (url, _):
        yield asyncio.run(make_databases(url))


@pytest.fixture
async def stores(urls: Sequence[str]) -> AsyncIterator[Stores]:
    async with sharded_stores(urls) as opened:
        yield opened


class Told:
    """A stream in memory, and who reads it."""

    def __init__(self) -> None:
        self.is_away: set[str] = set()
        """Shards whose carrier does not reach it."""
        self.times = 0
        """How often notices were told."""
        self.bodies: dict[tuple[str, str], list[int]] = {}
        """What was new to a reader who knows messages by tenant, name and number, in the order of the stream."""
        self._highest: dict[tuple[str, str], int] = {}
        self._unseen = Unseen()

    def append_of(self, shard: str) -> Append:
        async def append(messages: Sequence[bytes]) -> None:
            if shard in self.is_away:
                raise QueueUnavailable("The stream is away.")
            for message in messages:
                self._read(message)

        return append

    def _read(self, message: bytes) -> None:
        for notice in self._unseen.notices_of(message):
            assert isinstance(notice, MessageNotice)
            self.times += 1
            name = notice.tenant, notice.to
            if notice.number > self._highest.get(name, 0):
                self._highest[name] = notice.number
                self.bodies.setdefault(name, []).append(int(bytes(notice.body)))


@asynccontextmanager
async def carrying(stores: Stores, told: Told) -> AsyncIterator[None]:
    """One carrier for each shard."""
    broadcasts = [
        Broadcast(store, Source.MESSAGES, told.append_of(store.shard), wall=lambda: datetime.now(UTC), rhythm=RHYTHM)
        for store in stores.broadcasts
    ]
    tasks = [asyncio.create_task(one.run()) for one in broadcasts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def say(stores: Stores, tenant: str, *bodies: int) -> None:
    for body in bodies:
        for name in NAMES:
            await stores.messages.send(tenant, name, sender="task_1", body=f"{body}")


async def test_messages_that_wait_for_the_stream_are_told_from_the_new_shard(stores: Stores) -> None:
    """Their old rows are gone, and what was told from the new shard has higher numbers than theirs."""
    told = Told()
    told.is_away = {"odd"}
    expected = {(tenant, name): list(range(20)) for tenant in (MOVED, THERE_ALREADY) for name in NAMES}
    async with carrying(stores, told):
        await say(stores, THERE_ALREADY, *range(19))
        await eventually(lambda: is_told(told, THERE_ALREADY, 19))
        await say(stores, MOVED, *range(19))
        await moved(mover_of(stores))
        await say(stores, MOVED, 19)
        await say(stores, THERE_ALREADY, 19)
        await eventually(lambda: is_told(told, MOVED, 20))
        await eventually(lambda: is_told(told, THERE_ALREADY, 20))

    assert told.bodies == expected


async def test_what_is_said_during_moves_there_and_back_is_told_in_order(stores: Stores) -> None:
    """Also where some moves fail after all was copied."""
    told, said, is_over = Told(), 0, asyncio.Event()

    async def talk() -> None:
        nonlocal said
        while not is_over.is_set():
            await say(stores, MOVED, said)
            await say(stores, THERE_ALREADY, said)
            said += 1

    async def fail(step: str) -> None:
        if step == "compared":
            raise StoreUnavailable("It was to fail.")

    async with carrying(stores, told):
        talking = asyncio.create_task(talk())
        for source, target in (("odd", "even"), ("even", "odd")) * 3:
            with pytest.raises(StoreUnavailable):
                await moved(mover_of(stores, after=fail), source=source, target=target)
            told.is_away = {source}
            await moved(mover_of(stores), source=source, target=target)
            told.is_away = set()
        is_over.set()
        await talking
        await eventually(lambda: is_told(told, MOVED, said))
        await eventually(lambda: is_told(told, THERE_ALREADY, said))

    assert told.bodies == {(tenant, name): list(range(said)) for tenant in (MOVED, THERE_ALREADY) for name in NAMES}
    assert told.times > 2 * 2 * said


async def is_told(told: Told, tenant: str, count: int) -> bool:
    """Whether the last of so many has come."""
    return all(count - 1 in told.bodies.get((tenant, name), ()) for name in NAMES)
