"""Homes of tenants as clients meet them: what would leave a region is refused with 421, and keeps nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from tests.postgres_databases import fresh_database

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.sharded.directory import Directory
from sutazai.adapters.postgres.stores import open_bare, open_shards
from sutazai.settings.model import Database, Shard
from sutazai.settings.secret import Secret
from sutazai.testing.plain_agents import plain_agents

if TYPE_CHECKING:
    from tests.conftest import Dial, StartGateway, StartNode, Wire

SHARDS = (Shard(name="eu-1", region="eu"),)
KEPT = ["/v1/tasks", "/v1/files", "/v1/batches", "/v1/schedules", "/v1/sessions"]


@pytest.fixture
async def settings(data_dir: Path) -> AsyncIterator[Database]:
    """A directory with a shard of the region `eu`."""
    async with fresh_database(data_dir) as url:
        settings = Database(url=Secret(url), region="eu")
        async with open_bare(settings, data_dir) as database, open_shards(database, settings, SHARDS) as shards:
            await migrate.migrate(database, migrate.read())
            await Directory(database, shards).add("eu-1")
        yield settings


@pytest.fixture
async def wire(settings: Database, gateways: StartGateway, fake_nodes: StartNode, dial: Dial) -> Wire:
    """A gateway of the region."""
    gateway = await gateways(await fake_nodes(), agents=plain_agents(), database=settings, shards=SHARDS)
    return await dial(gateway.port)


async def moved_to(wire: Wire, region: str) -> int:
    """The status of naming a home."""
    body = msgspec.json.encode({"region": region})
    head = f"PUT /admin/tenants/local HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    wire.send(head.encode(), body)
    return (await wire.answer()).status


async def test_a_tenant_without_a_home_is_told_how_to_get_one(wire: Wire) -> None:
    wire.post("/v1/tasks", {"agent": "echo", "input": {}})
    refused = await wire.answer()

    assert refused.status == 421
    assert "sutazai tenants set local --region eu" in refused.json["error"]["message"]


@pytest.mark.parametrize("path", KEPT)
async def test_a_tenant_of_another_region_is_sent_there(wire: Wire, path: str) -> None:
    assert await moved_to(wire, "us") == 200
    wire.get(path)
    refused = await wire.answer()

    assert refused.status == 421
    assert "kept in the region 'us', and this is 'eu'" in refused.json["error"]["message"]


async def test_models_answer_every_tenant_for_they_keep_nothing(wire: Wire) -> None:
    wire.post("/v1/chat/completions", {"model": "llama3", "messages": [{"role": "user", "content": "x"}]})

    assert (await wire.answer()).status == 200


async def test_a_tenant_at_home_is_served_and_cannot_leave_its_data_behind(wire: Wire) -> None:
    assert await moved_to(wire, "eu") == 200
    wire.post("/v1/tasks", {"agent": "echo", "input": {}})
    made = await wire.answer()
    wire.get("/v1/tasks")
    listed = await wire.answer()

    assert made.status == 202
    assert [task["id"] for task in listed.json["data"]] == [made.json["id"]]
    assert await moved_to(wire, "us") == 409
