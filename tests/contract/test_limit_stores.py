"""What every store of limits does, run over the one in memory and real Redis: alone, behind Sentinels, in a Cluster."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
from tests.redis_servers import PATIENT_S, Servers

from sutazai.adapters.redis.limits import RedisLimits
from sutazai.adapters.redis.link import open_redis
from sutazai.core.identity import Allowance, Limits
from sutazai.policy.rate_limit import Amounts, Bounds, Kind, Verdict, amounts_of, bounds_of, month_of
from sutazai.ports.limits import LimitStore, Settlement, Spent
from sutazai.testing.limits import MemoryLimits

LEASE_S = 1.0
UNLIMITED = Limits()


@dataclass(slots=True)
class Place:
    """A store, as many gateways as are wanted, and its time."""

    gateway: Callable[[], Awaitable[LimitStore]]
    """One more gateway's view of the store."""
    pass_s: Callable[[float], Awaitable[None]]


@pytest.fixture(params=["memory", "alone", "sentinel", "cluster"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """Empty counts."""
    if request.param == "memory":
        yield _in_memory()
        return
    servers: Callable[[str], Servers] = request.getfixturevalue("well_redis")
    settings = servers(request.param).settings(timeout_s=PATIENT_S, prefix=uuid.uuid4().hex[:12])
    async with AsyncExitStack() as stack:

        async def gateway() -> LimitStore:
            link = await stack.enter_async_context(open_redis(settings))
            return RedisLimits(link, gateway=uuid.uuid4().hex, lease_s=LEASE_S)

        yield Place(gateway, asyncio.sleep)


def _in_memory() -> Place:
    now = [1000.0]
    store = MemoryLimits(clock=lambda: now[0], wall_s=time.time, lease_s=LEASE_S, gateways=0)

    async def gateway() -> LimitStore:
        store.gateways += 1
        return store

    async def pass_s(by_s: float) -> None:
        now[0] += by_s

    return Place(gateway, pass_s)


@pytest.fixture
async def store(place: Place) -> LimitStore:
    """One gateway's view."""
    return await place.gateway()


def of(tenant: Limits, key: Limits = UNLIMITED, *, key_id: str = "k1", name: str = "acme") -> Bounds:
    return bounds_of(Allowance(tenant=name, key_id=key_id, of_tenant=tenant, of_key=key))


def a_request(tokens: int = 0, size_bytes: int = 0, money: float = 0.0) -> Amounts:
    return amounts_of(tokens=tokens, size_bytes=size_bytes, money=money)


def ended(tokens: int = 0, size_bytes: int = 0, money: float = 0.0) -> Amounts:
    return amounts_of(tokens=tokens, size_bytes=size_bytes, money=money, places=0)


def settlement(
    bounds: Bounds, request_id: str, estimated: Amounts, true: Amounts, *, was_taken: bool = True
) -> Settlement:
    return Settlement(bounds, request_id, estimated, true, was_taken)


def remaining(verdict: Verdict, kind: Kind, *, is_of_key: bool = False) -> float:
    (found,) = [
        one.remaining for one in verdict.standings() if one.bound.kind is kind and one.bound.is_of_key is is_of_key
    ]
    return found


async def how_many(store: LimitStore, bounds: Bounds, asked: int, amounts: Amounts | None = None) -> int:
    verdicts = [await store.take(bounds, uuid.uuid4().hex, amounts or a_request(1, 1)) for _ in range(asked)]
    return sum(verdict.admitted for verdict in verdicts)


@pytest.mark.parametrize(
    ("limits", "amounts", "fit"),
    [
        (Limits(requests_per_minute=5), a_request(), 5),
        (Limits(requests_per_minute=7), a_request(), 7),
        (Limits(requests_per_minute=600, burst_s=1), a_request(), 10),
        (Limits(requests_per_minute=1, burst_s=1), a_request(), 1),
        (Limits(tokens_per_minute=100), a_request(30), 3),
        (Limits(bytes_per_minute=1000), a_request(0, 250), 4),
        (Limits(concurrent_requests=3), a_request(), 3),
        (Limits(tokens_per_month=100), a_request(33), 3),
        (Limits(money_per_month=1.0), a_request(0, 0, 0.1), 10),
        (Limits(requests_per_minute=0), a_request(), 0),
    ],
    ids=lambda value: "" if isinstance(value, tuple | int) else value.__class__.__name__,
)
async def test_as_many_fit_as_the_limit_says(store: LimitStore, limits: Limits, amounts: Amounts, fit: int) -> None:
    assert await how_many(store, of(limits), 12, amounts) == fit


async def test_a_key_is_held_to_its_own_limit_and_to_its_tenants(store: LimitStore) -> None:
    tenant = Limits(requests_per_minute=5)
    one, two = of(tenant, Limits(requests_per_minute=2), key_id="k1"), of(tenant, key_id="k2")

    assert [await how_many(store, one, 4), await how_many(store, two, 9)] == [2, 3]


async def test_tenants_share_nothing(store: LimitStore) -> None:
    limits = Limits(requests_per_minute=2)

    taken = [await how_many(store, of(limits, name=name), 5) for name in ("acme", "other", "acme:", "{acme}", "é")]

    assert taken == [2, 2, 2, 2, 2]


async def test_a_refusal_takes_from_no_limit(store: LimitStore) -> None:
    """The key has room and the tenant has none, and the other way round."""
    tenant = Limits(requests_per_minute=100, tokens_per_minute=100, concurrent_requests=9, tokens_per_month=500)
    bounds = of(tenant, Limits(requests_per_minute=100, bytes_per_minute=50))
    before = await store.take(bounds, "r1", a_request(10, 10))
    refused = [await store.take(bounds, "r2", a_request(95, 10)), await store.take(bounds, "r3", a_request(10, 45))]

    after = await store.take(bounds, "r4", a_request(10, 10))

    assert [verdict.admitted for verdict in (before, *refused, after)] == [True, False, False, True]
    assert remaining(after, Kind.REQUESTS) == pytest.approx(98, abs=1.99)
    assert remaining(after, Kind.CONCURRENT) == 7
    assert remaining(after, Kind.MONTH_TOKENS) == 480
    assert remaining(after, Kind.BYTES, is_of_key=True) == pytest.approx(30, abs=1.99)


async def test_what_was_taken_comes_back_with_time(store: LimitStore, place: Place) -> None:
    bounds = of(Limits(requests_per_minute=1200, burst_s=0.5))
    assert await how_many(store, bounds, 200) >= 10
    refused = await store.take(bounds, "r1", a_request())
    (standing,) = refused.standings()

    await place.pass_s(standing.retry_after_s + 0.001)

    assert not refused.admitted
    assert standing.retry_after_s <= 0.05
    assert (await store.take(bounds, "r2", a_request())).admitted


async def test_a_request_larger_than_the_burst_waits_for_all_of_it_and_is_paid_back(
    store: LimitStore, place: Place
) -> None:
    bounds = of(Limits(tokens_per_minute=6000, burst_s=1))
    admitted = await store.take(bounds, "r1", a_request(150))
    refused = await store.take(bounds, "r2", a_request(1))

    await place.pass_s(0.6)

    assert admitted.admitted
    assert next(iter(refused.standings())).retry_after_s == pytest.approx(0.51, abs=0.1)
    assert (await store.take(bounds, "r3", a_request(1))).admitted


async def test_an_estimate_is_corrected_by_the_truth(store: LimitStore) -> None:
    """Downwards and upwards, for all that counts tokens or money, and only once."""
    limits = Limits(tokens_per_minute=1000, tokens_per_month=10_000, money_per_month=10.0)
    bounds = of(limits, limits)
    estimated = a_request(100, 5, 1.0)
    for request_id, tokens, money in (("r1", 40, 0.4), ("r2", 300, 3.0)):
        await store.take(bounds, request_id, estimated)
        for _ in range(2):
            await store.settle(settlement(bounds, request_id, estimated, ended(tokens, 5, money)))

    verdict = await store.take(bounds, "r3", a_request(10, 5, 0.1))

    for is_of_key in (False, True):
        assert remaining(verdict, Kind.TOKENS, is_of_key=is_of_key) == pytest.approx(650, abs=40)
        assert remaining(verdict, Kind.MONTH_TOKENS, is_of_key=is_of_key) == 9650
        assert remaining(verdict, Kind.MONTH_MONEY, is_of_key=is_of_key) == pytest.approx(6.5)


async def test_more_than_all_may_turn_out_to_be_taken(store: LimitStore, place: Place) -> None:
    """It is paid back before anything else fits."""
    bounds = of(Limits(tokens_per_minute=6000, burst_s=1))
    await store.take(bounds, "r1", a_request(10))
    await store.settle(settlement(bounds, "r1", a_request(10), ended(150)))
    refused = await store.take(bounds, "r2", a_request(1))

    await place.pass_s(0.6)

    assert not refused.admitted
    assert (await store.take(bounds, "r3", a_request(1))).admitted


async def test_giving_back_never_leaves_more_than_the_limit(store: LimitStore, place: Place) -> None:
    bounds = of(Limits(tokens_per_minute=60_000, burst_s=0.1))
    await store.take(bounds, "r1", a_request(90))
    await place.pass_s(0.15)
    await store.settle(settlement(bounds, "r1", a_request(90), ended(0)))

    verdict = await store.take(bounds, "r2", a_request(60))

    assert remaining(verdict, Kind.TOKENS) <= 100 - 60 + 1e-6


async def test_a_place_is_free_when_its_request_has_ended(store: LimitStore) -> None:
    bounds = of(Limits(concurrent_requests=2), Limits(concurrent_requests=1))
    other = of(Limits(concurrent_requests=2), key_id="k2")
    taken = [(await store.take(one, name, a_request())).admitted for one, name in ((bounds, "r1"), (bounds, "r2"))]
    await store.settle(settlement(bounds, "r1", a_request(), ended()))

    again = [(await store.take(one, name, a_request())).admitted for one, name in ((bounds, "r3"), (other, "r4"))]

    assert (taken, again) == ([True, False], [True, True])
    assert not (await store.take(other, "r5", a_request())).admitted


async def test_a_place_that_nobody_renews_is_free_after_a_while(store: LimitStore, place: Place) -> None:
    """The gateway that held it was killed."""
    bounds = of(Limits(concurrent_requests=2), Limits(concurrent_requests=2))
    for name in ("lost", "kept"):
        await store.take(bounds, name, a_request())
    for _ in range(3):
        await place.pass_s(LEASE_S * 0.5)
        await store.renew([(bounds.allowance, "kept")])

    taken = [(await store.take(bounds, name, a_request())).admitted for name in ("r1", "r2")]

    assert taken == [True, False]


async def test_renewing_brings_no_place_back(store: LimitStore) -> None:
    bounds = of(Limits(concurrent_requests=1))
    await store.take(bounds, "r1", a_request())
    await store.settle(settlement(bounds, "r1", a_request(), ended()))
    await store.renew([(bounds.allowance, "r1")])

    assert (await store.take(bounds, "r2", a_request())).admitted


async def test_a_request_that_the_store_did_not_see_is_charged_at_its_end(store: LimitStore) -> None:
    bounds = of(Limits(tokens_per_month=1000, requests_per_minute=100))
    for _ in range(2):
        await store.settle(settlement(bounds, "r1", a_request(50), ended(70), was_taken=True))
    await store.settle(settlement(bounds, "r2", a_request(50), ended(70), was_taken=False))

    verdict = await store.take(bounds, "r3", a_request(30))

    assert remaining(verdict, Kind.MONTH_TOKENS) == 900
    assert remaining(verdict, Kind.REQUESTS) == pytest.approx(98, abs=1.9)


async def test_a_request_whose_yes_was_lost_is_charged_once(store: LimitStore) -> None:
    bounds = of(Limits(tokens_per_month=1000))
    await store.take(bounds, "r1", a_request(50))
    await store.settle(settlement(bounds, "r1", a_request(50), ended(70), was_taken=False))

    assert remaining(await store.take(bounds, "r2", a_request(30)), Kind.MONTH_TOKENS) == 900


async def test_a_months_sums_are_raised_to_what_the_ledger_has(store: LimitStore) -> None:
    limits = Limits(tokens_per_month=1000, money_per_month=10.0)
    bounds = of(limits, limits)
    await store.take(bounds, "r1", a_request(300, 0, 1.0))
    month = month_of(time.time())
    await store.seed([Spent("acme", "", 500, 0.5), Spent("acme", "k1", 100, 3.0)], month=month)
    await store.seed([Spent("acme", "", 999, 9.9)], month=month - 1)

    verdict = await store.take(bounds, "r2", a_request(100, 0, 1.0))

    assert remaining(verdict, Kind.MONTH_TOKENS) == 400
    assert remaining(verdict, Kind.MONTH_TOKENS, is_of_key=True) == 600
    assert remaining(verdict, Kind.MONTH_MONEY) == pytest.approx(8.0)
    assert remaining(verdict, Kind.MONTH_MONEY, is_of_key=True) == pytest.approx(6.0)


async def test_a_spent_budget_is_there_again_with_the_new_month(store: LimitStore) -> None:
    bounds = of(Limits(tokens_per_month=10))
    await store.take(bounds, "r1", a_request(10))

    refused = await store.take(bounds, "r2", a_request(1))

    now = time.time()
    (standing,) = refused.standings()
    assert not refused.admitted
    assert month_of(now + standing.retry_after_s + 5) == month_of(now) + 1
    assert month_of(now + standing.retry_after_s - 5) == month_of(now)


async def test_all_gateways_see_one_count(place: Place) -> None:
    bounds = of(Limits(requests_per_minute=50, tokens_per_minute=10_000), Limits(concurrent_requests=40))
    stores = [await place.gateway() for _ in range(4)]

    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(how_many(store, bounds, 20)) for store in stores]

    assert sum(task.result() for task in asked) == 40


async def test_the_gateways_that_are_alive_are_counted(place: Place) -> None:
    stores = [await place.gateway() for _ in range(3)]

    counts = [await store.renew([]) for store in stores]

    assert counts[-1] == 3
