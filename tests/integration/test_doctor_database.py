"""What `sutazai doctor` says of a database of several servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from tests.postgres_servers import PostgresServer, streaming

from sutazai.cli.checks import Level
from sutazai.cli.checks_pool import database, databases
from sutazai.settings.model import Database, Settings, Shard
from sutazai.settings.secret import Secret


@pytest.fixture
def pair() -> Iterator[Sequence[PostgresServer]]:
    with streaming(replicas=1) as servers:
        yield servers


async def looked_at(pair: Sequence[PostgresServer], *, timeout_s: float = 5.0) -> dict[str, tuple[Level, str]]:
    """Level and message by check."""
    url = Secret(f"postgresql://sutazai:hunter2@{','.join(server.host for server in pair)}/postgres")
    found = await database(url, Database(url=url, timeout_s=timeout_s))

    assert "hunter2" not in str(found)
    return {one.check.removeprefix("database "): (one.level, one.message) for one in found}


async def test_each_server_is_told_with_its_role(pair: Sequence[PostgresServer]) -> None:
    primary, replica = pair
    found = await looked_at(pair)

    assert found["database"] == (Level.OK, "2 servers, and one of them is the primary")
    assert found[primary.host] == (Level.OK, "the primary")
    assert found[replica.host][0] is Level.OK
    assert found[replica.host][1].startswith("a replica, ")


async def test_a_replica_that_is_late_is_told(pair: Sequence[PostgresServer]) -> None:
    primary, replica = pair
    await replica.pause_replay()
    await primary.ask("CREATE TABLE late ()")
    level, message = (await looked_at(pair))[replica.host]

    assert level is Level.WARN
    assert "late by" in message


async def test_a_replica_that_is_away_is_a_warning_and_no_primary_a_failure(pair: Sequence[PostgresServer]) -> None:
    primary, replica = pair
    replica.kill()
    without_replica = await looked_at(pair)
    replica.start()
    primary.kill()
    without_primary = await looked_at(pair, timeout_s=1.0)

    assert without_replica["database"][0] is Level.OK
    assert without_replica[replica.host][0] is Level.WARN
    assert without_primary["database"] == (Level.FAIL, "None of its 2 servers is a primary.")
    assert without_primary[primary.host][0] is Level.WARN
    assert without_primary[replica.host][1] == "a replica; how late cannot be told without a primary"


async def test_shards_are_told_by_name_and_those_of_other_regions_left_alone(pair: Sequence[PostgresServer]) -> None:
    primary, replica = pair
    here = Shard(name="here", url=primary.url, replicas=(replica.url,))
    far = Shard(name="far", url=Secret("postgresql://127.0.0.1:1/name"), region="elsewhere")
    found = {one.check: one.level for one in await databases(Settings(shards=(here, far)))}

    assert found == dict.fromkeys(["shard here", f"shard here {primary.host}", f"shard here {replica.host}"], Level.OK)
