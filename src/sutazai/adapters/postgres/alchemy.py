"""SQLAlchemy's view of a connection that is already open and inside a transaction: for Alembic, which needs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import sqlalchemy
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import StaticPool
from sqlalchemy.util import await_only

from sutazai.adapters.postgres.database import Connection

T = TypeVar("T")


class AsIs(PGDialect_asyncpg):
    """The dialect, but the connection keeps its own reading of JSON: the stores decode it themselves."""

    supports_statement_cache = True

    def on_connect(self) -> None:
        """Do nothing to a new connection."""


registry.register("postgresql.as_is", __name__, AsIs.__name__)


async def within(connection: Connection, work: Callable[[sqlalchemy.Connection], T]) -> T:
    """
    Do blocking-looking work on the connection.

    What it does belongs to the transaction that is open: to SQLAlchemy the connection commits by itself, so it
    begins and ends nothing. Statements have no name, so a PgBouncer in transaction mode may stand in between.
    """

    async def as_it_is(*_: object, **__: object) -> Connection:
        return connection

    engine = create_async_engine(
        "postgresql+as_is://",
        connect_args={
            "async_creator_fn": as_it_is,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": str,
        },
        isolation_level="AUTOCOMMIT",
        poolclass=StaticPool,  # never closes what is not its own
    )
    async with engine.connect() as view:
        return await view.run_sync(work)


def run_script(view: sqlalchemy.Connection, script: str, *, within_s: float) -> None:
    """Run a text of many statements, which only PostgreSQL's simple protocol takes in one go."""
    driver: Connection = view.connection.driver_connection
    await_only(driver.execute(script, timeout=within_s))
