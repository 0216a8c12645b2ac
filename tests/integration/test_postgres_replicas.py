"""A primary and its replicas: who is asked, what is seen, and what happens when one of them is gone."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest
from tests.postgres_servers import PostgresServer, paused, streaming
from tests.redis_servers import eventually

from sutazai.adapters.postgres.database import Database, open_database
from sutazai.core.errors import StoreUnavailable
from sutazai.core.mark import BEGINNING, Mark
from sutazai.settings.secret import Secret

LIMIT_S = 20.0
LAG_S = 1.0
SLACK_S = 2.0
WHO = "SELECT inet_server_port()"

Servers = Sequence[PostgresServer]


@pytest.fixture(scope="module")
def well() -> Iterator[Servers]:
    """Servers that are hurt only for a moment."""
    with streaming(replicas=2) as servers:
        yield servers


@pytest.fixture
def trio() -> Iterator[Servers]:
    """Servers of this test's own."""
    with streaming(replicas=2) as servers:
        yield servers


@asynccontextmanager
async def opened(servers: Servers, *, limit_s: float = LIMIT_S) -> AsyncIterator[Database]:
    """The database, once all servers of it are known."""
    primary, *replicas = servers
    async with open_database(
        primary.url, replicas=[each.url for each in replicas], timeout_s=limit_s, max_lag_s=LAG_S
    ) as database:
        await writer(database)
        yield database


async def writer(database: Database) -> int:
    """The port of the server that writes."""
    async with database.transaction() as connection:
        return int(await connection.fetchval(WHO))


async def reader(database: Database, after: Mark = BEGINNING) -> int:
    """The port of the server that reads."""
    async with database.reading(after) as connection:
        return int(await connection.fetchval(WHO))


async def made(database: Database, number: int) -> Mark:
    """Write a row; the mark for those who are to see it."""
    async with database.transaction() as connection:
        await connection.execute("CREATE TABLE IF NOT EXISTS notes (number integer)")
        await connection.execute("INSERT INTO notes VALUES ($1)", number)
    mark = await database.newest("")
    assert mark is not None
    return mark


async def seen(database: Database, number: int, after: Mark) -> bool:
    """Whether the row is there for a reader."""
    async with database.reading(after) as connection:
        return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM notes WHERE number = $1)", number))


async def test_the_primary_writes_and_replicas_read(well: Servers) -> None:
    primary, *replicas = well
    async with opened(well) as database:
        ports = {replica.port for replica in replicas}
        await eventually(lambda: reads_from(database, *ports))

        assert await writer(database) == primary.port


async def reads_from(database: Database, *ports: int) -> bool:
    """Whether one of these is the reader now."""
    return await reader(database) in ports


async def test_roles_are_found_wherever_the_address_stands(well: Servers) -> None:
    primary, first, second = well
    hosts = ",".join((first.host, second.host, primary.host))
    async with open_database(Secret(f"postgresql://sutazai@{hosts}/postgres"), timeout_s=LIMIT_S) as database:
        assert await writer(database) == primary.port
        async with database.own_connection() as connection:
            assert await connection.fetchval(WHO) == primary.port


async def test_a_reader_cannot_write(well: Servers) -> None:
    async with opened(well) as database:
        with pytest.raises(StoreUnavailable, match="read-only"):
            async with database.reading() as connection:
                await connection.execute("CREATE TABLE never (id integer)")


async def test_who_wrote_reads_it_though_replicas_stand_still(well: Servers) -> None:
    primary, *replicas = well
    async with opened(well) as database:
        await made(database, 0)
        async with paused(*replicas):
            mark = await made(database, 1)

            assert await seen(database, 1, mark)
            assert await reader(database, mark) == primary.port

        ports = {replica.port for replica in replicas}
        await eventually(lambda: reads_after(database, mark, *ports))
        assert await seen(database, 1, mark)


async def reads_after(database: Database, mark: Mark, *ports: int) -> bool:
    """Whether one of these may answer who holds the mark."""
    return await reader(database, mark) in ports


async def test_a_hundred_writes_are_each_read_by_who_wrote_them(well: Servers) -> None:
    async with opened(well) as database:
        for number in range(100, 200):
            assert await seen(database, number, await made(database, number))


async def test_a_reader_of_a_replica_sees_one_moment(well: Servers) -> None:
    _, first, second = well
    async with opened(well) as database:
        mark = await made(database, 7)
        await eventually(lambda: reads_after(database, mark, first.port, second.port))
        async with database.reading(mark) as connection:
            assert await connection.fetchval(WHO) in {first.port, second.port}
            later = await made(database, 8)
            await eventually(lambda: reads_after(database, later, first.port, second.port))

            assert await connection.fetchval("SELECT count(*) FROM notes WHERE number = 8") == 0
        assert await seen(database, 8, later)


async def test_a_late_replica_is_not_asked(well: Servers) -> None:
    _, first, second = well
    async with opened(well) as database:
        async with paused(first):
            await made(database, 2)

            await eventually(lambda: reads_from(database, second.port))
            began = time.monotonic()
            while time.monotonic() - began < 2 * LAG_S:
                await made(database, 3)
                port = await reader(database)
                assert port != first.port or time.monotonic() - began < LAG_S + 0.5
        await eventually(lambda: reads_from(database, first.port, second.port))


async def test_a_killed_replica_is_not_missed(trio: Servers) -> None:
    primary, first, second = trio
    async with opened(trio) as database:
        await eventually(lambda: reads_from(database, first.port, second.port))
        first.kill()
        assert await reader(database) in {primary.port, second.port}
        second.kill()
        assert await reader(database) == primary.port

        first.start()
        await eventually(lambda: reads_from(database, first.port))


async def test_what_a_replica_does_not_end_is_asked_of_the_primary(trio: Servers) -> None:
    primary, *replicas = trio
    async with opened(trio) as database:
        ports = {replica.port for replica in replicas}
        await eventually(lambda: reads_from(database, *ports))
        slow = "SELECT inet_server_port() AS port, pg_sleep(CASE WHEN pg_is_in_recovery() THEN 60 ELSE 0 END)"
        reading = asyncio.create_task(database.rows(slow, tenant="somebody", seen=BEGINNING), name="read")
        for _ in replicas:  # one after the other is asked, and goes away
            await eventually(lambda: is_asleep(*replicas))
            (asked,) = [one for one in replicas if await is_asleep(one)]
            asked.kill()

        assert [row["port"] for row in await reading] == [primary.port]
        state = database.servers()
        assert state is not None
        assert state.misses == len(replicas)


async def is_asleep(*servers: PostgresServer) -> bool:
    """Whether one of these has a reader that sleeps."""
    asleep = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    return any([await server.ask(asleep) for server in servers if server.is_running])


async def test_a_silent_replica_is_not_waited_for(well: Servers) -> None:
    primary, *replicas = well
    async with opened(well) as database:
        await eventually(lambda: reads_from(database, *(replica.port for replica in replicas)))
        for replica in replicas:
            replica.stall()
        try:
            began = time.monotonic()
            assert await reader(database) == primary.port
            assert time.monotonic() - began < 2 * LAG_S + SLACK_S
        finally:
            for replica in replicas:
                replica.resume()


async def test_without_a_primary_replicas_read_on_and_writers_are_told(trio: Servers) -> None:
    primary, *replicas = trio
    async with opened(trio, limit_s=3.0) as database:
        mark = await made(database, 1)
        ports = {replica.port for replica in replicas}
        await eventually(lambda: reads_after(database, mark, *ports))
        primary.kill()

        for _ in range(3):
            assert await seen(database, 1, mark)
        with pytest.raises(StoreUnavailable, match="No primary was found"):
            await writer(database)
        assert await reader(database) in ports


async def test_a_silent_primary_stops_no_reader(trio: Servers) -> None:
    primary, *replicas = trio
    async with opened(trio) as database:
        ports = {replica.port for replica in replicas}
        await eventually(lambda: reads_from(database, *ports))
        primary.stall()
        began = time.monotonic()
        while time.monotonic() - began < 2 * LAG_S:
            before = time.monotonic()
            assert await reader(database) in ports
            assert time.monotonic() - before < SLACK_S


async def test_writers_find_the_replica_that_was_promoted(trio: Servers) -> None:
    primary, first, _ = trio
    async with opened(trio) as database:
        mark = await made(database, 1)
        await eventually(lambda: reads_after(database, mark, first.port))
        primary.kill()
        await first.promote()

        began = time.monotonic()
        assert await writer(database) == first.port
        assert time.monotonic() - began < 5.0
        assert await seen(database, 1, await made(database, 2))


async def test_a_replica_with_what_the_new_primary_never_had_is_not_read(trio: Servers) -> None:
    """It is ahead of the new primary, in a log that was given up."""
    primary, first, second = trio
    async with open_database(primary.url, timeout_s=LIMIT_S) as alone:
        async with alone.transaction() as connection:
            await connection.execute("CREATE TABLE notes (number integer)")
        await eventually(lambda: has_notes(first))
        first.stall()
        async with alone.transaction() as connection:
            await connection.execute("INSERT INTO notes SELECT 0 FROM generate_series(1, 200000)")
        await eventually(lambda: has_notes(second, 200_000))
    primary.kill()
    first.resume()
    await first.promote()

    async with opened((first, second)) as database:
        mark = await made(database, 1)
        began = time.monotonic()
        while time.monotonic() - began < 2 * LAG_S:
            assert await seen(database, 1, mark)
            assert await reader(database) == first.port


async def has_notes(server: PostgresServer, count: int = 0) -> bool:
    """Whether the table is there, with so many rows."""
    there: bool = await server.ask("SELECT to_regclass('notes') IS NOT NULL")
    return there and bool(await server.ask("SELECT count(*) FROM notes") == count)


async def test_a_primary_that_comes_back_from_before_is_not_written_to(trio: Servers) -> None:
    primary, first, _ = trio
    async with opened(trio) as database:
        primary.kill()
        await first.promote()
        assert await writer(database) == first.port
        primary.start()

        began = time.monotonic()
        while time.monotonic() - began < LAG_S:
            assert await writer(database) == first.port


async def test_a_transaction_that_began_is_not_tried_again(trio: Servers) -> None:
    primary, *_ = trio
    async with opened(trio) as database:

        async def cut_off() -> None:
            async with database.transaction() as connection:
                primary.kill()
                await connection.fetchval("SELECT 1")

        with pytest.raises(StoreUnavailable, match="Nothing of the transaction was kept"):
            await cut_off()


async def test_one_server_needs_no_mark(well: Servers) -> None:
    async with open_database(well[0].url, timeout_s=LIMIT_S) as database:
        assert await database.newest("") is None
        assert await reader(database) == well[0].port


@pytest.mark.parametrize("second", ["127.0.0.1:2", "127.0.0.1:hunter2"])
async def test_where_none_is_a_primary_the_reason_is_told_once_and_no_password(second: str) -> None:
    url = Secret(f"postgresql://me:hunter2@127.0.0.1:1,{second}/name")
    async with open_database(url, timeout_s=0.5) as database:
        with pytest.raises(StoreUnavailable, match=r"No primary was found.*not reached") as caught:
            await writer(database)

    assert caught.value.message.count("Check that PostgreSQL runs") == 1
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
