"""The stores that the suites of keys, tenants and the audit log run over: one in memory and one in PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
from tests.postgres_servers import embedded, pgbouncer
from tests.shards import addresses, make_databases, sharded_stores

from sutazai.adapters.postgres.stores import Stores, open_stores
from sutazai.settings.model import Database
from sutazai.settings.secret import Secret
from sutazai.testing.files import MemoryFiles
from sutazai.testing.keys import MemoryStore
from sutazai.testing.sessions import MemorySessions


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a PostgreSQL in a folder of its own."""
    with embedded() as (url, _):
        yield url


@pytest.fixture(scope="session")
def pooled_server(server: str) -> Iterator[str]:
    """The same server, through a PgBouncer in transaction mode."""
    folder = parse_qs(urlsplit(server).query)["host"][0]
    with pgbouncer(f"host={folder} port=5432") as url:
        yield url.reveal()


@pytest.fixture(scope="session")
def two_databases(server: str) -> Sequence[str]:
    """Two more databases on it, with our tables."""
    return asyncio.run(make_databases(server))


@pytest.fixture(params=["memory", "postgres", "pgbouncer"])
def urls(request: pytest.FixtureRequest) -> Sequence[str]:
    """Where the stores are. What tenants' data is kept in runs over two shards too, and names all in its own file."""
    return addresses(request)


@pytest.fixture
async def stores(urls: Sequence[str]) -> AsyncIterator[Stores]:
    """Empty stores."""
    if len(urls) > 1:
        async with sharded_stores(urls) as sharded:
            yield sharded
        return
    if not urls:
        memory = MemoryStore()
        no_tasks: Any = None
        yield Stores(
            keys=memory,
            usage=memory,
            tenants=memory.tenants,
            audit=memory.audit,
            sessions=MemorySessions(),
            tasks=no_tasks,
            queue=no_tasks,
            messages=no_tasks,
            webhooks=no_tasks,
            schedules=no_tasks,
            marks=no_tasks,
            files=MemoryFiles(),
        )
        return
    (url,) = urls
    connection: Any = await asyncpg.connect(url)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.close()
    async with open_stores(Database(url=Secret(url)), Path("/nowhere")) as opened:
        yield opened
