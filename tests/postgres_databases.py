"""A database of a test's own, on the server that all tests share."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from sutazai.adapters.postgres.embedded import EmbeddedPostgres
from sutazai.adapters.postgres.stores import Stores, open_stores
from sutazai.settings.model import Database
from sutazai.settings.secret import Secret


@asynccontextmanager
async def fresh_database(data_dir: Path) -> AsyncIterator[str]:
    """The address of a new, empty database below `data_dir`'s server; dropped at the end."""
    server = EmbeddedPostgres()
    address = await server.start(data_dir)
    name = f"test_{uuid.uuid4().hex[:12]}"
    try:
        await _execute(address, f'CREATE DATABASE "{name}"')
        yield address.replace("/sutazai?", f"/{name}?")
        await _execute(address, f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        await server.stop()


@asynccontextmanager
async def fresh_stores(data_dir: Path) -> AsyncIterator[Stores]:
    """Stores over a database of one's own."""
    async with fresh_database(data_dir) as url, open_stores(Database(url=Secret(url)), data_dir) as stores:
        yield stores


async def _execute(address: str, statement: str) -> None:
    connection = await asyncpg.connect(address, statement_cache_size=0)
    try:
        async with asyncio.timeout(20):
            await connection.execute(statement)
    finally:
        await connection.close()
