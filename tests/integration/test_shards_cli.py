"""`sutazai shards` by hand, as docs/howto/shards.md has it: from one database to two, and tenants with a home."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tests.postgres_servers import embedded
from tests.shards import LIMIT_S

from sutazai.adapters.postgres.stores import open_stores
from sutazai.core.errors import Conflict, Misdirected, StoreUnavailable
from sutazai.core.identity import Tenant
from sutazai.core.task import TaskDraft
from sutazai.policy.sharding import SLOTS, slot_of
from sutazai.ports.tasks import TaskFilter
from sutazai.settings.load import parse
from sutazai.settings.model import Settings

pytestmark = pytest.mark.deadline(120)

SOURCE = Path(__file__).parents[2] / "src"
TENANTS = [f"tenant-{number}" for number in range(6)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with embedded() as (url, _):
        yield url


@pytest.fixture
def urls(server: str) -> tuple[str, ...]:
    """Three empty databases."""

    async def make() -> None:
        connection: Any = await asyncpg.connect(server, timeout=LIMIT_S)
        for name in ("first", "second", "third"):
            await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()

    asyncio.run(make())
    return tuple(server.replace("/sutazai?", f"/{name}?") for name in ("first", "second", "third"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def written(folder: Path, url: str, *shards: tuple[str, str | None], region: str = "") -> Settings:
    """A settings file with these shards, all of one region."""
    own = f'region = "{region}"\n'
    text = f'[database]\nurl = "{url}"\n{own}' + "".join(
        f'\n[[shards]]\nname = "{name}"\n{own}' + (f'url = "{at}"\n' if at else "") for name, at in shards
    )
    (folder / "sutazai.toml").write_text(text, "utf-8")
    return parse(text, {})


def sutazai(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "sutazai", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={"PYTHONPATH": str(SOURCE), "PATH": os.defpath, "HOME": "/nowhere"},
        timeout=100,
    )
    assert done.returncode == code, (done.stdout, done.stderr)
    return done


def shards(folder: Path) -> dict[str, int]:
    found = json.loads(sutazai(folder, "shards", "list", "--json").stdout)
    assert found["moves"] == []
    return {one["name"]: one["slots"] for one in found["shards"]}


async def submit(settings: Settings, *tenants: str) -> None:
    async with open_stores(settings.database, Path("/nowhere"), shards=settings.shards) as stores:
        await stores.tasks.submit([TaskDraft(tenant=tenant, agent="echo") for tenant in tenants])


async def tasks_of(settings: Settings, tenant: str) -> int:
    async with open_stores(settings.database, Path("/nowhere"), shards=settings.shards) as stores:
        return len(await stores.tasks.page(tenant, TaskFilter(), limit=100))


def test_one_database_becomes_two_and_each_tenant_keeps_its_tasks(folder: Path, urls: tuple[str, ...]) -> None:
    asyncio.run(submit(written(folder, urls[0]), *TENANTS))
    both = written(folder, urls[0], ("main", None), ("second", urls[1]))

    assert "the shard 'main' is in use, with 4,096 slots" in sutazai(folder, "shards", "add", "main").stdout.lower()
    added = sutazai(folder, "shards", "add", "second")
    assert "would move 2,048 of 4,096 slots" in added.stderr
    planned = json.loads(sutazai(folder, "shards", "rebalance", "--dry-run", "--json").stdout)
    assert sum(len(one["slots"]) for one in planned) == SLOTS // 2
    assert shards(folder) == {"main": SLOTS, "second": 0}

    moved = json.loads(sutazai(folder, "shards", "rebalance", "--json").stdout)

    assert shards(folder) == {"main": SLOTS // 2, "second": SLOTS // 2}
    full = [one for one in moved if len(one["slots"]) == 1]
    assert sum(one["rows"]["tasks"] for one in full) > 0
    assert "even already" in sutazai(folder, "shards", "rebalance").stderr
    for tenant in TENANTS:
        assert asyncio.run(tasks_of(both, tenant)) == 1
    assert asyncio.run(_rows(urls[0])) + asyncio.run(_rows(urls[1])) == len(TENANTS)


def test_a_tenant_is_moved_by_name_and_back_by_slot(folder: Path, urls: tuple[str, ...]) -> None:
    settings = written(folder, urls[0], ("main", None), ("second", urls[1]))
    sutazai(folder, "shards", "add", "main")
    sutazai(folder, "shards", "add", "second")
    asyncio.run(submit(settings, "acme"))

    planned = sutazai(folder, "shards", "move", "acme", "--to", "second", "--dry-run").stdout
    assert planned.split()[:3] == ["SLOTS", "FROM", "TO"]
    assert shards(folder)["second"] == 0
    table = sutazai(folder, "shards", "move", "acme", "--to", "second").stdout.splitlines()[1].split()
    assert table[:6] == [str(slot_of("acme")), "main", "second", "1", "1", "0"]
    assert shards(folder)["second"] == 1
    assert asyncio.run(tasks_of(settings, "acme")) == 1
    sutazai(folder, "shards", "move", "--slot", str(slot_of("acme")), "--to", "main")
    assert shards(folder)["second"] == 0
    assert "already" in sutazai(folder, "shards", "move", "acme", "--to", "main").stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("add", "nowhere"), "No shard 'nowhere' is in `[[shards]]`"),
        (("add", "second"), "The first shard must be where the data is"),
        (("move", "acme", "--to", "second"), "No shard 'second' is in use"),
        (("move", "--to", "second"), "Name either a tenant or a slot"),
        (("move", "--slot", "4096", "--to", "second"), "from 0 to 4095"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(
    folder: Path, urls: tuple[str, ...], arguments: tuple[str, ...], why: str
) -> None:
    asyncio.run(submit(written(folder, urls[0]), "acme"))
    written(folder, urls[0], ("main", None), ("second", urls[1]))

    done = sutazai(folder, "shards", *arguments, code=1)

    assert why in done.stderr
    assert done.stdout == ""


def test_a_process_without_the_shards_does_not_start_once_there_are_some(folder: Path, urls: tuple[str, ...]) -> None:
    """It would write where nobody looks."""
    written(folder, urls[0], ("main", None))
    sutazai(folder, "shards", "add", "main")

    with pytest.raises(StoreUnavailable, match="the settings name none"):
        asyncio.run(submit(written(folder, urls[0]), "acme"))
    assert "`[database]` keeps all data" in sutazai(folder, "shards", "list", code=1).stderr


def test_shards_whose_addresses_were_exchanged_are_told_apart(folder: Path, urls: tuple[str, ...]) -> None:
    written(folder, urls[0], ("one", urls[1]), ("two", urls[2]))
    sutazai(folder, "shards", "add", "one")
    sutazai(folder, "shards", "add", "two")

    with pytest.raises(StoreUnavailable, match="The url of the shard 'one' led to the shard 'two'"):
        asyncio.run(submit(written(folder, urls[0], ("one", urls[2]), ("two", urls[1])), "acme"))


def test_a_region_keeps_the_data_of_those_alone_whose_home_it_is(folder: Path, urls: tuple[str, ...]) -> None:
    """Two regions share a directory; neither opens the other's shard, and a request in the wrong one is refused."""
    eu = written(folder, urls[0], ("eu-1", urls[1]), region="eu")
    sutazai(folder, "shards", "add", "eu-1")
    us = written(folder, urls[0], ("us-1", urls[2]), region="us")
    sutazai(folder, "shards", "add", "us-1")

    sutazai(folder, "tenants", "set", "acme", "--region", "us")
    asyncio.run(submit(us, "acme"))

    with pytest.raises(Misdirected, match="kept in the region 'us', and this is 'eu'"):
        asyncio.run(submit(eu, "acme"))
    with pytest.raises(Misdirected, match="has no home region"):
        asyncio.run(submit(eu, "rival"))
    assert (asyncio.run(_rows(urls[1])), asyncio.run(_rows(urls[2]))) == (0, 1)
    assert shards(folder) == {"eu-1": SLOTS, "us-1": SLOTS}


async def _set(settings: Settings, region: str) -> None:
    async with open_stores(settings.database, Path("/nowhere"), shards=settings.shards) as stores:
        await stores.tenants.set(Tenant(name="acme", region=region))


def test_a_home_cannot_be_changed_while_there_is_data(folder: Path, urls: tuple[str, ...]) -> None:
    us = written(folder, urls[0], ("us-1", urls[2]), region="us")
    sutazai(folder, "shards", "add", "us-1")
    eu = written(folder, urls[0], ("eu-1", urls[1]), region="eu")
    sutazai(folder, "shards", "add", "eu-1")

    asyncio.run(_set(eu, "us"))  # nothing was kept yet
    with pytest.raises(Conflict, match="The home of the tenant 'acme' is 'us'"):
        asyncio.run(_set(eu, "eu"))
    asyncio.run(_set(us, "eu"))
    asyncio.run(submit(eu, "acme"))

    with pytest.raises(Conflict, match="has data in 'eu'"):
        asyncio.run(_set(eu, "us"))


async def _rows(url: str) -> int:
    connection: Any = await asyncpg.connect(url, timeout=LIMIT_S)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM tasks"))
    finally:
        await connection.close()
