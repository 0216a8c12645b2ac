"""Stores over two shards: even slots are in one database, which is the directory too, and odd ones in another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import Database, open_database
from sutazai.adapters.postgres.sharded.shards import Shards
from sutazai.adapters.postgres.stores import Stores, open_stores
from sutazai.policy.sharding import SLOTS, slot_of
from sutazai.settings.model import Database as DatabaseSettings
from sutazai.settings.model import Shard
from sutazai.settings.secret import Secret

LIMIT_S = 20.0
EMPTY = """
DO $$ DECLARE one name; BEGIN
    FOR one IN SELECT relname FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
            AND relname NOT IN ('schema_migrations', 'alembic_version', 'broadcasts')
    LOOP EXECUTE format('TRUNCATE %I CASCADE', one); END LOOP;
END $$
"""


def addresses(request: pytest.FixtureRequest) -> Sequence[str]:
    """
    Where the stores of a fixture with parameters are: none in memory, and two databases for two shards.

    For a plain fixture: servers start on an event loop of their own.
    """
    match request.param:
        case "memory":
            return ()
        case "two shards":
            return tuple(request.getfixturevalue("two_databases"))
        case "postgres":
            return (str(request.getfixturevalue("server")),)
    return (str(request.getfixturevalue("pooled_server")),)


def tenant_of(parity: int, number: int = 0) -> str:
    """A tenant whose data is in the shard of even slots (0) or in that of odd ones (1)."""
    names = (f"tenant-{one}" for one in range(10_000))
    return [name for name in names if slot_of(name) % 2 == parity][number]


async def make_databases(url: str) -> tuple[str, str]:
    """The addresses of two more databases on a server, with our tables."""
    urls = url.replace("/sutazai?", "/even?"), url.replace("/sutazai?", "/odd?")
    for name, made in zip(("even", "odd"), urls, strict=True):
        await _run(url, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await _run(url, f"CREATE DATABASE {name}")
        async with open_database(Secret(made), timeout_s=LIMIT_S) as database:
            await migrate.migrate(database, migrate.read())
    return urls


@asynccontextmanager
async def two_shards(urls: Sequence[str]) -> AsyncIterator[Shards]:
    """Both databases emptied and made shards."""
    async with (
        open_database(Secret(urls[0]), timeout_s=LIMIT_S) as even,
        open_database(Secret(urls[1]), timeout_s=LIMIT_S) as odd,
    ):
        await divide({"even": even, "odd": odd})
        shards = Shards(even, {"even": even, "odd": odd}, region="")
        await shards.refresh()
        following = asyncio.create_task(shards.run(), name="follow the shards")
        try:
            yield shards
        finally:
            following.cancel()
            await asyncio.wait([following])


@asynccontextmanager
async def sharded_stores(urls: Sequence[str]) -> AsyncIterator[Stores]:
    """The same, opened as a program does."""
    async with two_shards(urls):
        settings = DatabaseSettings(url=Secret(urls[0]), timeout_s=LIMIT_S)
        named = (Shard(name="even"), Shard(name="odd", url=Secret(urls[1])))
        async with open_stores(settings, Path("/nowhere"), shards=named) as stores:
            yield stores


async def divide(databases: Mapping[str, Database]) -> None:
    """Empty them, and give each its slots, as if they had been added and moved. The first one is the directory."""
    for parity, (name, database) in enumerate(databases.items()):
        async with database.transaction() as connection:
            await connection.execute("SET LOCAL session_replication_role = replica")  # the audit log keeps itself
            await connection.execute(EMPTY)
            await connection.execute("INSERT INTO shard_here VALUES ($1)", name)
            await connection.execute(
                f"INSERT INTO slots_here SELECT slot, 'owned' FROM generate_series(0, {SLOTS - 1}) AS slot"  # noqa: S608
                " WHERE slot % 2 = $1",
                parity,
            )
    directory, *_ = databases.values()
    async with directory.transaction() as connection:
        await connection.execute("INSERT INTO shards (name, region) VALUES ('even', ''), ('odd', '')")
        await connection.execute(
            f"INSERT INTO shard_slots SELECT '', slot, (ARRAY['even', 'odd'])[1 + slot % 2]"  # noqa: S608
            f" FROM generate_series(0, {SLOTS - 1}) AS slot"
        )


async def _run(url: str, statement: str) -> None:
    connection: Any = await asyncpg.connect(url, timeout=LIMIT_S)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
