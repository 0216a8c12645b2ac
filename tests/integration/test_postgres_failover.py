"""The primary is killed under writers: what was acknowledged is kept, and nothing is there twice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest
from tests.postgres_servers import PostgresServer, streaming
from tests.redis_servers import eventually

from sutazai.adapters.postgres.database import CommitUnknown, Database, open_database
from sutazai.core.errors import StoreUnavailable

LIMIT_S = 20.0
WRITERS = 8


class Writer:
    """Writes one row after another, each under its number, and goes on when it is told that a row failed."""

    def __init__(self, database: Database, number: int) -> None:
        self.kept: set[int] = set()
        self.unknown: set[int] = set()
        self.refused: set[int] = set()
        self._database = database
        self._next = number * 1_000_000

    async def write(self, enough: asyncio.Event) -> None:
        """One row after another until it is enough."""
        while not enough.is_set():
            self._next += 1
            try:
                async with self._database.transaction() as connection:
                    await connection.execute("INSERT INTO notes VALUES ($1)", self._next)
            except CommitUnknown:
                self.unknown.add(self._next)
            except StoreUnavailable:
                self.refused.add(self._next)
            else:
                self.kept.add(self._next)


@pytest.fixture
def pair() -> Iterator[Sequence[PostgresServer]]:
    """A primary whose commits wait for its replica."""
    with streaming(replicas=1, synchronous_standby_names="*") as servers:
        yield servers


async def test_no_acknowledged_row_is_lost_or_doubled_when_the_primary_is_killed(
    pair: Sequence[PostgresServer],
) -> None:
    primary, replica = pair
    await eventually(lambda: is_synchronous(primary))
    async with open_database(primary.url, replicas=[replica.url], timeout_s=LIMIT_S) as database:
        async with database.transaction() as connection:
            await connection.execute("CREATE TABLE notes (number integer)")
        writers = [Writer(database, number) for number in range(WRITERS)]
        enough = asyncio.Event()
        writing = [asyncio.create_task(writer.write(enough), name="write") for writer in writers]
        await eventually(lambda: all(len(writer.kept) > 2 for writer in writers))
        primary.kill()
        await replica.promote()
        before = [len(writer.kept) for writer in writers]
        took_s = await eventually(
            lambda: all(len(writer.kept) > count for writer, count in zip(writers, before, strict=True))
        )
        enough.set()
        await asyncio.gather(*writing)

        mark = await database.newest("")
        assert mark is not None
        async with database.reading(mark) as connection:
            rows = [row["number"] for row in await connection.fetch("SELECT number FROM notes")]
    assert len(rows) == len(set(rows))
    kept, unknown, refused = (
        set().union(*(getattr(writer, name) for writer in writers)) for name in ("kept", "unknown", "refused")
    )
    assert took_s < 5.0
    assert kept <= set(rows)
    assert not refused & set(rows)
    assert set(rows) <= kept | unknown


async def is_synchronous(primary: PostgresServer) -> bool:
    """Whether the primary waits for its replica by now."""
    return bool(await primary.ask("SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))
