"""What every store of tenants does, run over the one in memory and the one in PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest
from tests.shards import addresses

from sutazai.core.errors import BadRequest
from sutazai.core.identity import Limits, Tenant
from sutazai.core.request import Priority

if TYPE_CHECKING:
    from sutazai.adapters.postgres.stores import Stores

NOTICED_S = 5.0
ACME = Tenant(
    name="acme",
    weight=2.5,
    priority=Priority.HIGH,
    limits=Limits(requests_per_minute=600, money_per_month=12.75, concurrent_requests=0, burst_s=10.0),
)


@pytest.fixture(params=["memory", "postgres", "pgbouncer", "two shards"])
def urls(request: pytest.FixtureRequest) -> Sequence[str]:
    return addresses(request)


async def test_a_tenant_is_kept_as_it_was_set(stores: Stores) -> None:
    await stores.tenants.set(ACME)

    assert await stores.tenants.all() == [ACME]


async def test_a_tenant_that_is_set_again_is_replaced_whole(stores: Stores) -> None:
    await stores.tenants.set(ACME)
    await stores.tenants.set(Tenant(name="acme", weight=3.0))

    assert await stores.tenants.all() == [Tenant(name="acme", weight=3.0)]


async def test_tenants_are_listed_by_name(stores: Stores) -> None:
    for name in ("b", "a", "B", "Ä", "a b"):
        await stores.tenants.set(Tenant(name=name))

    assert [tenant.name for tenant in await stores.tenants.all()] == ["B", "a", "a b", "b", "Ä"]


async def test_a_deleted_tenant_is_told_once_and_gone(stores: Stores) -> None:
    await stores.tenants.set(ACME)

    assert await stores.tenants.delete("acme") == ACME
    assert await stores.tenants.delete("acme") is None
    assert await stores.tenants.all() == []


@pytest.mark.parametrize("unknown", ["nobody", "", "a\x00b", "\ud800", "'; DROP TABLE tenants; --"])
async def test_deleting_what_is_not_there_changes_nothing(stores: Stores, unknown: str) -> None:
    await stores.tenants.set(ACME)

    assert await stores.tenants.delete(unknown) is None
    assert await stores.tenants.all() == [ACME]


@pytest.mark.parametrize(
    ("tenant", "where"),
    [
        (Tenant(name=""), "tenant"),
        (Tenant(name="a\nb"), "tenant"),
        (Tenant(name="a" * 65), "tenant"),
        (Tenant(name="a", weight=0.0), "weight"),
        (Tenant(name="a", weight=-1.0), "weight"),
        (Tenant(name="a", weight=float("nan")), "weight"),
        (Tenant(name="a", weight=float("inf")), "weight"),
        (Tenant(name="a", waiting_tasks=-1), "waiting_tasks"),
        (Tenant(name="a", limits=Limits(bytes_per_minute=-1)), "limits.bytes_per_minute"),
        (Tenant(name="a", limits=Limits(money_per_month=float("inf"))), "limits.money_per_month"),
        (Tenant(name="a", limits=Limits(burst_s=1e9)), "limits.burst_s"),
    ],
)
async def test_what_no_tenant_can_be_is_refused(stores: Stores, tenant: Tenant, where: str) -> None:
    with pytest.raises(BadRequest) as caught:
        await stores.tenants.set(tenant)

    assert caught.value.where == where
    assert await stores.tenants.all() == []


async def test_listeners_of_keys_hear_of_tenants(stores: Stores) -> None:
    async with aclosing(stores.keys.changes()) as changes:  # type: ignore[type-var]
        async with asyncio.timeout(NOTICED_S):
            await anext(changes)
            await stores.tenants.set(ACME)
            await anext(changes)
            await stores.tenants.delete("acme")
            await anext(changes)
