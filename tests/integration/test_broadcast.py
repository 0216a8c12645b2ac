"""Events and messages on their way to the stream: nothing is lost, and whoever reads sees all once and in order."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from tests.postgres_databases import fresh_database, fresh_stores
from tests.rabbit_servers import QUOTED, USER, Rabbits, eventually
from tests.redis_servers import wall_before

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.broadcasts import MAX_DATA_BYTES, PostgresBroadcastStore
from sutazai.adapters.postgres.database import open_database
from sutazai.adapters.postgres.messages import PostgresMessageStore
from sutazai.adapters.postgres.stores import Stores, open_stores
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.adapters.rabbitmq.queue import open_rabbitmq
from sutazai.core.errors import QueueUnavailable
from sutazai.core.task import Completed, TaskDraft
from sutazai.ports.broadcasts import LEFT_OUT, BroadcastStore, EventNotice, MessageNotice, Notice, Source, Unseen
from sutazai.ports.tasks import Change, Start
from sutazai.settings.model import Database, Rabbitmq
from sutazai.settings.secret import Secret
from sutazai.tasks.broadcast import Append, Broadcast, Rhythm

pytestmark = pytest.mark.xdist_group("rabbitmq")

BROADCASTER = Path(__file__).parents[1] / "broadcaster.py"
RHYTHM = Rhythm(look_s=0.02, beat_s=0.1, lease_s=0.4, longest_pause_s=0.2)


@pytest.fixture
async def stores(data_dir: Path) -> AsyncIterator[Stores]:
    async with fresh_stores(data_dir) as opened:
        yield opened


@pytest.fixture
def settings(rabbit_node: Rabbits) -> Rabbitmq:
    """A stream of this test's own."""
    rabbit_node.restore()
    return rabbit_node.settings(prefix=uuid.uuid4().hex[:12])


class Told:
    """A stream in memory that can be away, or stand still."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.is_away = False
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def append(self, messages: Sequence[bytes]) -> None:
        await self.goes_on.wait()
        if self.is_away:
            raise QueueUnavailable("The stream is away.")
        self.messages += messages

    def news(self) -> list[Notice]:
        """What a reader sees of it."""
        unseen = Unseen()
        return [notice for message in self.messages for notice in unseen.notices_of(message)]


@pytest.fixture
def told() -> Told:
    return Told()


def broadcast(
    stores: Stores, append: Append, source: Source = Source.EVENTS, *, store: BroadcastStore | None = None
) -> Broadcast:
    return Broadcast(store or stores.broadcasts[0], source, append, wall=lambda: datetime.now(UTC), rhythm=RHYTHM)


@asynccontextmanager
async def carrying(*broadcasts: Broadcast) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(each.run()) for each in broadcasts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def submitted(stores: Stores, count: int, *, tenant: str = "acme") -> list[str]:
    return [task.id for task in await stores.tasks.submit([TaskDraft(tenant=tenant, agent="a")] * count)]


async def kept(stores: Stores) -> list[tuple[str, int]]:
    """Task and version of all events, in the order of their positions."""
    found = await stores.tasks.tail(after=0, limit=100_000)
    return [(event.task, event.version) for event in found]


def named(notices: Sequence[Notice]) -> list[tuple[str, int]]:
    return [(notice.task, notice.version) for notice in notices if isinstance(notice, EventNotice)]


async def test_events_and_messages_reach_the_stream_once_and_in_their_order(stores: Stores, settings: Rabbitmq) -> None:
    tasks = await submitted(stores, 300)
    await stores.tasks.begin([Start(task=tasks[0], may_take_over=False)], worker="w", delivery_limit=5)
    await stores.tasks.change([Change(task=tasks[0], event=Completed(1, '{"answer": 42}', tokens=3))])
    for number in range(100):
        await stores.messages.send(f"tenant{number % 2}", "board", sender=tasks[0], body=f'"word {number}"')

    unseen, seen = Unseen(), list[Notice]()
    async with open_rabbitmq(settings) as queue:
        append = queue.events.append
        async with carrying(*(broadcast(stores, append, source) for source in Source)), queue.events.read() as reader:
            while len(seen) < 402:
                for entry in await reader.take(100):
                    seen += unseen.notices_of(entry.body)

    assert named(seen) == await kept(stores)
    last = [notice for notice in seen if isinstance(notice, EventNotice)][-1]
    assert (last.kind, last.tenant) == ("task.completed", "acme")
    assert msgspec.json.decode(last.data, type=Completed) == Completed(1, '{"answer": 42}', tokens=3)
    messages = [notice for notice in seen if isinstance(notice, MessageNotice)]
    assert [notice.body for notice in messages] == [msgspec.Raw(b'"word %d"' % number) for number in range(100)]
    assert [notice.tenant for notice in messages[:2]] == ["tenant0", "tenant1"]
    assert {(notice.to, notice.sender) for notice in messages} == {("board", tasks[0])}


@pytest.mark.deadline(90)
async def test_carriers_that_are_killed_between_telling_and_writing_it_down_lose_nothing(
    data_dir: Path, settings: Rabbitmq
) -> None:
    assert settings.url is not None
    async with fresh_database(data_dir) as url, open_stores(Database(url=Secret(url)), data_dir) as stores:
        command = [sys.executable, str(BROADCASTER), url, str(data_dir), settings.url.reveal(), settings.prefix]
        deaths = 0

        async def keep_one() -> None:
            nonlocal deaths
            while True:
                process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
                try:
                    await process.wait()
                finally:
                    if process.returncode is None:
                        process.kill()
                        await process.wait()
                deaths += 1

        await submitted(stores, 700)  # three messages of the stream, and each process lives for two
        keeping = [asyncio.create_task(keep_one()) for _ in range(2)]
        unseen, seen, told = Unseen(), list[Notice](), 0
        try:
            async with open_rabbitmq(settings) as queue, queue.events.read() as reader:
                while len(seen) < 700:
                    for entry in await reader.take(100):
                        told += len(entry.body.splitlines())
                        seen += unseen.notices_of(entry.body)
        finally:
            for each in keeping:
                each.cancel()
            await asyncio.wait(keeping)

        assert named(seen) == await kept(stores)
    assert deaths > 0
    assert told > 700


async def test_a_broker_that_is_away_is_told_later(rabbit_node: Rabbits, settings: Rabbitmq, stores: Stores) -> None:
    (node,) = rabbit_node.nodes
    async with wall_before(node) as wall:
        behind_it = msgspec.structs.replace(
            settings,
            url=Secret(f"amqp://{USER}:{QUOTED}@127.0.0.1:{wall.port}"),
            connect_timeout_s=0.3,
            confirm_timeout_s=0.3,
            timeout_s=0.6,
        )
        async with open_rabbitmq(behind_it) as queue, open_rabbitmq(settings) as there:
            one = broadcast(stores, queue.events.append)
            async with carrying(one), there.events.read() as reader:
                unseen = Unseen()
                seen: list[Notice] = []

                async def is_told_of(count: int) -> None:
                    while len(seen) < count:
                        for entry in await reader.take(10):
                            seen.extend(unseen.notices_of(entry.body))

                await submitted(stores, 10)
                await is_told_of(10)
                wall.cut()
                await submitted(stores, 20)

                async def is_late() -> bool:
                    return one.behind == 20 and one.behind_s > 1.0

                await eventually(is_late)
                wall.heal()
                await is_told_of(30)

                async def is_done() -> bool:
                    return one.behind == 0 and one.behind_s == 0.0

                await eventually(is_done)
    assert named(seen) == await kept(stores)


async def test_one_carries_and_the_other_takes_over_when_it_leaves(stores: Stores, told: Told) -> None:
    first, second = broadcast(stores, told.append), broadcast(stores, told.append)
    async with carrying(second):
        async with carrying(first):
            await submitted(stores, 5)
            await eventually(lambda: is_told(told, 5))
            assert sorted((first.carried, second.carried)) == [0, 5]
        await submitted(stores, 5)
        await eventually(lambda: is_told(told, 10))

    assert len(told.messages) >= 2
    assert named(told.news()) == await kept(stores)


class Stalled:
    """A store before which one carrier stands still, from its first message on, until it is let go."""

    def __init__(self, store: BroadcastStore, told: Told) -> None:
        self.shard = store.shard
        self.notices, self.turn, self.take, self.leave = store.notices, store.turn, store.take, store.leave
        self._store = store
        self._told = told
        self.has_begun = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def advance(self, source: Source, fence: int, position: int) -> bool:
        await self.goes_on.wait()
        return await self._store.advance(source, fence, position)

    async def append(self, messages: Sequence[bytes]) -> None:
        self.has_begun.set()
        await self.goes_on.wait()
        await self._told.append(messages)


async def test_a_carrier_that_stood_still_is_overtaken_and_its_doubles_are_passed_over(
    stores: Stores, told: Told
) -> None:
    """It wakes with notices in hand that the next one has told meanwhile, and later ones, too."""
    stalled = Stalled(stores.broadcasts[0], told)
    await submitted(stores, 5)
    async with carrying(broadcast(stores, stalled.append, store=stalled)):
        await stalled.has_begun.wait()
        async with carrying(broadcast(stores, told.append)):
            await eventually(lambda: is_told(told, 5))
            await submitted(stores, 5)
            await eventually(lambda: is_told(told, 10))
            stalled.goes_on.set()
            await submitted(stores, 5)
            await eventually(lambda: is_told(told, 15))

    assert named(told.news()) == await kept(stores)
    assert sum(len(message.splitlines()) for message in told.messages) == 20


async def test_a_stream_that_refuses_leaves_the_turn_to_another_process(stores: Stores, told: Told) -> None:
    cut_off = Told()
    cut_off.is_away = True
    await submitted(stores, 3)
    async with carrying(broadcast(stores, cut_off.append)), carrying(broadcast(stores, told.append)):
        await eventually(lambda: is_told(told, 3))


async def test_what_is_too_large_for_the_stream_is_named_without_its_data(stores: Stores, told: Told) -> None:
    (task,) = await submitted(stores, 1)
    await stores.tasks.begin([Start(task=task, may_take_over=False)], worker="w", delivery_limit=5)
    await stores.tasks.change([Change(task=task, event=Completed(1, "x" * MAX_DATA_BYTES))])
    await stores.messages.send("acme", "board", sender=task, body='"' + "y" * 1_000_000 + '"')

    async with carrying(*(broadcast(stores, told.append, source) for source in Source)):
        await eventually(lambda: is_told(told, 4))

    events = [notice for notice in told.news() if isinstance(notice, EventNotice)]
    (message,) = [notice for notice in told.news() if isinstance(notice, MessageNotice)]
    assert [notice.data == LEFT_OUT for notice in events] == [False, False, True]
    assert len(bytes(message.body)) == 1_000_002


async def test_a_transaction_that_commits_late_is_told_in_its_place(stores: Stores, told: Told) -> None:
    """Positions are given before the commit: the reader waits for whoever may still come with a lower one."""
    async with carrying(broadcast(stores, told.append, Source.MESSAGES)):
        async with stores.databases[""].transaction() as late:
            await late.execute(stores.databases[""].sql["send_message"], "acme", "slow", "", "1")
            await stores.messages.send("acme", "quick", sender="", body="2")
            await asyncio.sleep(10 * RHYTHM.look_s)
            assert told.messages == []
        await eventually(lambda: is_told(told, 2))

    assert [notice.to for notice in told.news() if isinstance(notice, MessageNotice)] == ["slow", "quick"]


async def test_what_was_there_before_the_tables_knew_of_streams_is_not_told(data_dir: Path) -> None:
    files = migrate.read()
    before = next(at for at, one in enumerate(files) if one.name == "broadcasts")
    async with fresh_database(data_dir) as url, open_database(Secret(url), timeout_s=20) as database:
        await migrate.migrate(database, files[:before])
        tasks = PostgresTaskStore(database, max_length=100)
        await tasks.submit([TaskDraft(tenant="acme", agent="a")] * 7)
        await migrate.migrate(database, files)
        (newest,) = [event.position for event in await tasks.tail(after=0, limit=10)][-1:]

        assert (await PostgresBroadcastStore(database).turn(Source.EVENTS)).position == newest


async def test_messages_from_before_there_were_positions_are_told_before_all_others(data_dir: Path, told: Told) -> None:
    """Some that were told, some that were not, and one that was sent after."""
    files = migrate.read()
    before = next(at for at, one in enumerate(files) if one.name == "moves")
    async with fresh_database(data_dir) as url:
        async with open_database(Secret(url), timeout_s=20) as database:
            await migrate.migrate(database, files[:before])
            messages = PostgresMessageStore(database)
            for number in range(1, 6):
                await messages.send("acme", f"board{number % 2}", sender="task_1", body=f"{number}")
            async with database.transaction() as connection:
                await connection.execute("UPDATE broadcasts SET position = 2 WHERE source = 'messages'")

        async with open_stores(Database(url=Secret(url)), data_dir) as stores:
            await stores.messages.send("acme", "board0", sender="task_1", body="6")
            async with carrying(broadcast(stores, told.append, Source.MESSAGES)):
                await eventually(lambda: is_told(told, 4))

    messages_told = [notice for notice in told.news() if isinstance(notice, MessageNotice)]
    assert [notice.body for notice in messages_told] == [msgspec.Raw(b"%d" % number) for number in range(3, 7)]
    assert [notice.position for notice in messages_told] == [notice.number for notice in messages_told] == [3, 4, 5, 6]


async def is_told(told: Told, notices: int) -> bool:
    return len(told.news()) >= notices
