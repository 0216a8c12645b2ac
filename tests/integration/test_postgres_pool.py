"""The pool of connections: dead ones, too many callers, and a PgBouncer in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from tests.postgres_servers import PostgresServer, pgbouncer, streaming
from tests.redis_servers import eventually

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import CommitUnknown, Database, PoolRules, open_database
from sutazai.core.errors import StoreUnavailable
from sutazai.settings.secret import Secret

LIMIT_S = 5.0
PREPARED = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT $1%'"


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with streaming(replicas=0) as (alone,):
        yield alone


@pytest.fixture
def bouncer(server: PostgresServer) -> Iterator[Secret]:
    with pgbouncer(f"host=127.0.0.1 port={server.port} dbname=postgres") as url:
        yield url


@pytest.fixture
async def database(server: PostgresServer) -> AsyncIterator[Database]:
    async with open_database(server.url, timeout_s=LIMIT_S) as opened:
        yield opened


async def ask(database: Database) -> int:
    """Who answers."""
    async with database.transaction() as connection:
        return int(await connection.fetchval("SELECT pg_backend_pid()"))


async def test_a_connection_is_used_again(database: Database) -> None:
    assert await ask(database) == await ask(database)


async def test_connections_that_died_meanwhile_are_replaced_unnoticed(
    server: PostgresServer, database: Database
) -> None:
    async with database.transaction(), database.transaction(), database.transaction():
        pass
    await server.ask("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'sutazai'")

    assert await asyncio.gather(*(ask(database) for _ in range(4)))


async def test_without_a_ping_a_connection_that_died_is_told(server: PostgresServer) -> None:
    async with open_database(server.url, timeout_s=LIMIT_S, rules=PoolRules(pre_ping=False)) as database:
        pid = await ask(database)
        await server.ask(f"SELECT pg_terminate_backend({pid}, 5000)")

        with pytest.raises(StoreUnavailable):
            await ask(database)
        assert await ask(database) != pid


async def test_a_server_that_was_killed_and_is_back_is_used_unnoticed(
    server: PostgresServer, database: Database
) -> None:
    await ask(database)
    server.kill()
    server.start()

    assert await ask(database)


async def test_one_statement_is_a_transaction_by_itself_on_a_connection_that_answered(database: Database) -> None:
    """One of its own only where it has to be asked first whether it lives."""
    assert len(await transactions(database)) == 1
    assert len(await transactions(database)) == 2


async def transactions(database: Database) -> set[int]:
    """In which two statements ran."""
    async with database.statement() as connection:
        return {int(await connection.fetchval("SELECT pg_current_xact_id()::text::bigint")) for _ in range(2)}


async def test_one_statement_finds_a_connection_that_was_closed_meanwhile_unnoticed(
    server: PostgresServer, database: Database
) -> None:
    pid = await ask(database)
    await server.ask(f"SELECT pg_terminate_backend({pid}, 5000)")

    async with database.statement() as connection:
        assert await connection.fetchval("SELECT pg_backend_pid()") != pid


async def test_one_statement_that_is_refused_was_not_kept(database: Database) -> None:
    await ask(database)
    with pytest.raises(StoreUnavailable, match="division by zero") as told:
        async with database.statement() as connection:
            await connection.fetchval("SELECT 1 / 0")

    assert not isinstance(told.value, CommitUnknown)


async def test_one_statement_whose_connection_breaks_may_have_been_kept(
    server: PostgresServer, database: Database
) -> None:
    await ask(database)
    asking = asyncio.create_task(sleep(database), name="ask")
    under_way = "FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(10)'"
    await eventually(lambda: is_one(server, f"SELECT count(pg_terminate_backend(pid)) {under_way}"))

    with pytest.raises(CommitUnknown):
        await asking


async def sleep(database: Database) -> None:
    async with database.statement() as connection:
        await connection.fetchval("SELECT pg_sleep(10)")


async def is_one(server: PostgresServer, count: str) -> bool:
    return bool(await server.ask(count) == 1)


async def test_no_more_connections_are_opened_than_the_settings_say(server: PostgresServer) -> None:
    async with open_database(server.url, timeout_s=LIMIT_S, rules=PoolRules(size=2, overflow=1)) as database:
        assert len(set(await asyncio.gather(*(ask(database) for _ in range(20))))) <= 3


async def test_callers_wait_for_a_connection_no_longer_than_their_limit(server: PostgresServer) -> None:
    async with open_database(server.url, timeout_s=LIMIT_S, rules=PoolRules(size=1, overflow=0)) as database:
        async with database.transaction():
            with pytest.raises(StoreUnavailable, match=r"did not answer within 0.05 s"):
                async with database.transaction(within_s=0.05):
                    pass

        assert await ask(database)


async def test_an_old_connection_is_replaced(server: PostgresServer) -> None:
    async with open_database(server.url, timeout_s=LIMIT_S, rules=PoolRules(recycle_s=0)) as database:
        assert await ask(database) != await ask(database)


async def test_an_error_drops_the_connection(database: Database) -> None:
    pid = await ask(database)
    with pytest.raises(StoreUnavailable, match="division by zero"):
        async with database.transaction() as connection:
            await connection.fetchval("SELECT 1 / 0")

    assert await ask(database) != pid


async def test_statements_are_prepared_once_where_nothing_is_in_between(database: Database) -> None:
    async with database.transaction() as connection:
        await connection.fetchval("SELECT $1::int", 1)
    async with database.transaction() as connection:
        assert await connection.fetchval(PREPARED) == 1


async def test_behind_a_pgbouncer_no_statement_is_prepared_under_a_name(bouncer: Secret) -> None:
    async with open_database(bouncer, timeout_s=LIMIT_S) as database:
        for number in range(3):
            async with database.transaction() as connection:
                assert await connection.fetchval("SELECT $1::int", number) == number
        async with database.transaction() as connection:
            assert await connection.fetchval(PREPARED) == 0


async def test_many_callers_share_the_few_servers_of_a_pgbouncer(bouncer: Secret) -> None:
    async with open_database(bouncer, timeout_s=LIMIT_S, rules=PoolRules(size=30)) as database:

        async def several(number: int) -> list[int]:
            found = []
            for _ in range(3):
                async with database.transaction() as connection:
                    await connection.execute("SELECT pg_sleep(0.001)")
                    found.append(await connection.fetchval("SELECT $1::int", number))
            return found

        async def single(number: int) -> list[int]:
            found = []
            for _ in range(3):
                async with database.statement() as connection:
                    found.append(await connection.fetchval("SELECT $1::int", number))
            return found

        for each in (several, single):
            assert await asyncio.gather(*map(each, range(30))) == [[number] * 3 for number in range(30)]


async def test_migrations_run_through_a_pgbouncer(server: PostgresServer, bouncer: Secret) -> None:
    await server.ask("DROP SCHEMA public CASCADE")
    await server.ask("CREATE SCHEMA public")
    async with open_database(bouncer, timeout_s=LIMIT_S) as database:
        applied = await asyncio.gather(*(migrate.migrate(database, migrate.read()) for _ in range(3)))

    assert sum(map(len, applied)) == len(migrate.read())


async def test_a_database_that_is_closed_leaves_no_connection(server: PostgresServer) -> None:
    async with open_database(server.url, timeout_s=LIMIT_S) as database:
        held, dropped = asyncio.Event(), asyncio.Event()
        holding = asyncio.create_task(hold(database, held, dropped), name="hold")
        await held.wait()
    dropped.set()

    with pytest.raises(StoreUnavailable):
        await holding
    here = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sutazai'"
    await eventually(lambda: is_zero(server, here))


async def hold(database: Database, held: asyncio.Event, dropped: asyncio.Event) -> None:
    """Keep a connection until the database is closed, and then use it."""
    async with database.transaction() as connection:
        held.set()
        await dropped.wait()
        await connection.execute("SELECT 1")


async def is_zero(server: PostgresServer, statement: str) -> bool:
    return bool(await server.ask(statement) == 0)
