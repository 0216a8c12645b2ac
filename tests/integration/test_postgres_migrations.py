"""The migrations beside the models, and databases that were migrated before Alembic came."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.ext.asyncio import create_async_engine
from tests.postgres_servers import embedded

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import Database, open_database
from sutazai.adapters.postgres.tables import metadata
from sutazai.settings.secret import Secret

LIMIT_S = 5.0
PARTITIONS = "SELECT relname FROM pg_class WHERE relispartition"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with embedded() as (url, _):
        yield url


@pytest.fixture
async def empty(server: str) -> AsyncIterator[Database]:
    """A database without a table."""
    connection: Any = await asyncpg.connect(server)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.close()
    async with open_database(Secret(server), timeout_s=LIMIT_S) as database:
        yield database


def differences(view: sqlalchemy.Connection) -> list[Any]:
    """What would have to be done to make the database as the models say. Partitions are the files' alone."""
    partitions = set(view.scalars(sqlalchemy.text(PARTITIONS)))
    options = {
        "include_name": lambda name, kind, _: not (kind == "table" and name in partitions),
        "compare_type": True,
        "compare_server_default": True,
    }
    found = compare_metadata(MigrationContext.configure(view, opts=options), metadata)
    # A default that takes from a sequence is the file's alone: it is not told back in a form to compare.
    return [one for one in found if "_position'" not in str(getattr(_old_default(one), "arg", ""))]


def _old_default(difference: Any) -> Any:
    changes = difference[0] if isinstance(difference, list) else difference
    return changes[5] if changes[0] == "modify_default" else None


async def revision(database: Database) -> list[str]:
    """Where Alembic says the database is."""
    async with database.transaction() as connection:
        return [row["version_num"] for row in await connection.fetch("SELECT version_num FROM alembic_version")]


async def forget_alembic(database: Database) -> None:
    """As if the migrations had been applied before there was Alembic."""
    async with database.transaction() as connection:
        await connection.execute("DROP TABLE alembic_version")


async def told_apart(url: str) -> list[Any]:
    """The differences, seen by a connection as SQLAlchemy makes it."""
    engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(url))
    try:
        async with engine.connect() as view:
            return await view.run_sync(differences)
    finally:
        await engine.dispose()


async def test_a_migrated_database_is_what_the_models_say(empty: Database, server: str) -> None:
    await migrate.migrate(empty, migrate.read())

    assert await told_apart(server) == []


async def test_a_difference_from_the_models_would_be_seen(empty: Database, server: str) -> None:
    await migrate.migrate(empty, migrate.read())
    async with empty.transaction() as connection:
        await connection.execute(
            "ALTER TABLE keys ALTER tenant DROP NOT NULL; ALTER TABLE usage ALTER errors TYPE integer;"
            " DROP INDEX sessions_over; ALTER TABLE tenants ADD COLUMN colour text; CREATE TABLE more (id integer)"
        )

    found = str(await told_apart(server))
    for name in ("tenant", "errors", "sessions_over", "colour", "more"):
        assert f"'{name}'" in found


async def test_alembic_knows_where_the_database_is(empty: Database) -> None:
    await migrate.migrate(empty, migrate.read())

    assert await revision(empty) == [migrate.read()[-1].revision]


async def test_a_database_from_before_alembic_is_taken_over_as_it_is(empty: Database) -> None:
    await migrate.migrate(empty, migrate.read())
    await forget_alembic(empty)

    assert not await migrate.migrate(empty, migrate.read())
    assert await revision(empty) == [migrate.read()[-1].revision]


async def test_an_older_database_from_before_alembic_goes_on_from_where_it_was(empty: Database) -> None:
    await migrate.migrate(empty, migrate.read()[:1])
    await forget_alembic(empty)

    assert [one.version for one in await migrate.migrate(empty, migrate.read())] == [
        one.version for one in migrate.read()[1:]
    ]
    assert await revision(empty) == [migrate.read()[-1].revision]


async def test_what_is_missing_is_told_and_not_applied(empty: Database) -> None:
    assert await migrate.missing(empty, migrate.read()) == migrate.read()
    assert await migrate.missing(empty, migrate.read()) == migrate.read()

    await migrate.migrate(empty, migrate.read())
    assert not await migrate.missing(empty, migrate.read())


async def test_migrating_leaves_the_connection_as_it_was(empty: Database) -> None:
    """SQLAlchemy would teach it another reading of JSON."""
    await migrate.migrate(empty, migrate.read())

    async with empty.transaction() as connection:
        assert await connection.fetchval("SELECT '{}'::jsonb") == "{}"
