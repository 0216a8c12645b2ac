"""Limits that several gateways share, on a real Redis: exact while it is there, a share each while it is not."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from tests.limit_worker import Client, Node
from tests.redis_servers import Servers, eventually

from sutazai.adapters.redis.limits import RedisLimits
from sutazai.adapters.redis.link import RedisLink, Script, open_redis
from sutazai.core.errors import StoreUnavailable
from sutazai.core.identity import Allowance, Limits
from sutazai.core.request import Endpoint, Request
from sutazai.gateway.counts import Counts
from sutazai.gateway.limited import Limited
from sutazai.policy.rate_limit import Kind, bounds_of, month_of
from sutazai.ports.limits import Spent

PROCESSES = 4
START_S = 4.0
"""For a process to start and to find Redis."""
LASTS_S = 3.0
FOLDER = Path(__file__).parents[2]
TIMEOUT_S = 0.02
NOTICED_S = 0.3
"""The longest that a request may wait for limits when Redis is gone: the limit, and a busy machine."""


async def in_processes(servers: Servers, limits: dict[str, float], *, takes_s: float) -> list[dict[str, Any]]:
    """What each of four processes saw that asked as fast as they could."""
    begins = time.monotonic() + START_S
    task = {"url": servers.url, "prefix": uuid.uuid4().hex, "from": begins, "until": begins + LASTS_S}
    running = []
    for number in range(PROCESSES):
        given = json.dumps({"task": {**task, "name": f"g{number}", "takes_s": takes_s}, "limits": limits})
        command = (sys.executable, "-m", "tests.limit_worker", given)
        environment = {**os.environ, "PYTHONPATH": f"{FOLDER}:{FOLDER / 'src'}"}
        running.append(
            await asyncio.create_subprocess_exec(
                *command, cwd=FOLDER, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
        )
    said = await asyncio.gather(*(process.communicate() for process in running))
    assert [process.returncode for process in running] == [0] * PROCESSES, said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.deadline(120)
async def test_four_processes_let_through_exactly_one_limit(redis_alone: Servers) -> None:
    """As fast as they ask: the burst and the time since, one in a hundred more at the most, and hardly any less."""
    per_s, burst_s = 50.0, 2.0

    seen = await in_processes(redis_alone, {"requests_per_minute": per_s * 60, "burst_s": burst_s}, takes_s=0.0)

    spans = [span for one in seen for span in one["spans"]]
    lasted_s = max(ended for _, ended in spans) - min(began for began, _ in spans)
    promised = per_s * burst_s + per_s * lasted_s
    assert sum(one["asked"] for one in seen) > 2 * promised, "They did not ask for more than they may."
    assert 0.9 * promised <= len(spans) <= 1.01 * promised + 1
    assert [one["alone"] for one in seen] == [0] * PROCESSES


@pytest.mark.deadline(120)
async def test_four_processes_never_run_more_at_once_than_they_may(redis_alone: Servers) -> None:
    seen = await in_processes(redis_alone, {"concurrent_requests": 5}, takes_s=0.02)

    steps = sorted(
        (at, step) for one in seen for began, ended in one["spans"] for at, step in ((began, 1), (ended, -1))
    )
    running = most = 0
    for _, step in steps:
        running += step
        most = max(most, running)
    assert 4 <= most <= 5
    assert sum(len(one["spans"]) for one in seen) > LASTS_S / 0.02
    assert [one["unsettled"] for one in seen] == [0] * PROCESSES


@pytest.mark.deadline(120)
async def test_four_processes_never_spend_more_than_a_budget(redis_alone: Servers) -> None:
    """An estimate is set aside for what runs, so that not even the last one goes over; and the truth is counted."""
    budget, estimate, truth = 20_000, 1 + 256, 20

    seen = await in_processes(redis_alone, {"tokens_per_month": budget}, takes_s=0.0)

    spent = sum(len(one["spans"]) for one in seen) * truth
    assert budget - PROCESSES * 4 * estimate <= spent <= budget


@dataclass(slots=True)
class Gateway:
    """The stage over a node that answers at once."""

    limited: Limited
    counts: Counts
    asked: int = 0

    async def ask(self, allowance: Allowance) -> tuple[bool, float]:
        """Whether it was admitted, and how long that took in seconds."""
        self.asked += 1
        began, client = time.monotonic(), Client()
        request = Request(f"{id(self)}-{self.asked}", Endpoint.OPENAI_CHAT, "m", False, b"{}", "acme", "k1", began)
        request.allowance = allowance
        self.limited.start(request, client)
        return await client.answered, time.monotonic() - began


@asynccontextmanager
async def gateway(servers: Servers, timeout_s: float = TIMEOUT_S) -> AsyncIterator[tuple[Gateway, RedisLink]]:
    """One that keeps its limits up."""
    async with open_redis(servers.settings(timeout_s=timeout_s)) as link:
        counts = Counts(clock=time.monotonic, wall_s=time.time)
        shared = RedisLimits(link, gateway=uuid.uuid4().hex)
        limited = Limited(Node(0.0), local=counts, shared=shared, price=lambda _: (0.0, 0.0))
        keeping = asyncio.create_task(limited.run())
        try:
            await eventually(lambda: limited.gateways > 0)
            yield Gateway(limited, counts), link
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])


def allowed(**limits: float) -> Allowance:
    return Allowance(tenant="acme", key_id="k1", of_tenant=Limits(**limits), of_key=Limits())  # type: ignore[arg-type]


@pytest.mark.parametrize("trouble", ["killed", "stalled"])
async def test_without_redis_each_gateway_goes_on_with_its_share(redis_alone: Servers, trouble: str) -> None:
    """At once, without an error; and when it is back, together again."""
    server = redis_alone.servers[0]
    allowance = allowed(requests_per_minute=60, burst_s=10)
    async with gateway(redis_alone), gateway(redis_alone) as (mine, link):
        await mine.limited._turn()
        assert mine.limited.gateways == 2
        (server.kill if trouble == "killed" else server.stall)()

        answers = [await mine.ask(allowance) for _ in range(12)]
        (server.start if trouble == "killed" else server.resume)()
        await eventually(lambda: link.is_up)

        assert 5 <= sum(admitted for admitted, _ in answers) <= 6
        assert sorted(took_s for _, took_s in answers)[-2] < NOTICED_S
        before = mine.limited.alone
        assert before == 12
        await mine.ask(allowance)
        assert mine.limited.alone == before


async def test_without_redis_budgets_are_spent_only_as_far_as_they_are_known(redis_alone: Servers) -> None:
    """Half of what is left for one of two; nothing of one that nobody was told of."""
    known, unknown = allowed(tokens_per_month=20_000), allowed(tokens_per_month=20_000)
    async with gateway(redis_alone), gateway(redis_alone) as (mine, _):
        await mine.limited._turn()
        assert (await mine.ask(known))[0]
        await eventually(lambda: mine.limited.unsettled == 0)
        redis_alone.servers[0].kill()

        spent = [(await mine.ask(known))[0] for _ in range(520)]
        other = Allowance(tenant="other", key_id="k1", of_tenant=unknown.of_tenant, of_key=Limits())
        with pytest.raises(StoreUnavailable, match="could not be looked up"):
            await mine.ask(other)

        assert sum(spent) * 20 == pytest.approx(10_000, abs=600)


async def test_a_redis_that_lost_everything_is_told_by_the_ledger(redis_alone: Servers) -> None:
    allowance = allowed(tokens_per_month=1000)
    async with gateway(redis_alone, timeout_s=1.0) as (mine, link):
        await link.ask(lambda client: client.flushall())
        await mine.limited.seed([Spent("acme", "", 990, 0.0)], month=month_of(time.time()))

        assert not (await mine.ask(allowance))[0]


async def test_a_redis_that_is_full_refuses_nobody(redis_alone: Servers) -> None:
    allowance = allowed(requests_per_minute=60)
    async with gateway(redis_alone, timeout_s=1.0) as (mine, link):
        await link.ask(lambda client: client.config_set("maxmemory", "1"))

        admitted, _ = await mine.ask(allowance)

        assert admitted
        assert mine.limited.alone == 1
        assert link.is_up


async def test_redis_and_we_agree_which_month_it_is(redis_alone: Servers) -> None:
    """The script has a calendar of its own, for it goes by the clock of Redis."""
    source = files("sutazai.adapters.redis").joinpath("limits.lua").read_text("utf-8")
    of_month = source[source.index("local function month_of") : source.index("local this_month")]
    script = Script(of_month + "return month_of(tonumber(ARGV[1]))")
    days = [datetime(year, month, day, tzinfo=UTC) for year in range(1970, 2105) for month, day in DAYS]
    async with open_redis(redis_alone.settings()) as link:
        for day in days:
            begins_s = int(day.timestamp())
            for unix_s in (begins_s - 1, begins_s):
                assert await link.run(script, [link.key("x", slot="x")], [unix_s]) == month_of(unix_s), day


DAYS = [(month, 1) for month in range(1, 13)] + [(2, 28), (12, 31)]


async def test_keys_expire_when_they_mean_nothing_any_more(redis_alone: Servers) -> None:
    limits = Limits(requests_per_minute=6000, concurrent_requests=5)
    monthly = Limits(tokens_per_month=1000)
    async with open_redis(redis_alone.settings(timeout_s=1.0)) as link:
        shared = RedisLimits(link, gateway="g")
        for bounds in (
            bounds_of(Allowance(tenant="short", key_id="k1", of_tenant=limits, of_key=limits)),
            bounds_of(Allowance(tenant="long", key_id="k1", of_tenant=monthly, of_key=Limits())),
        ):
            assert (await shared.take(bounds, "r1", (1, 10, 10, 1, 10, 0.0))).admitted

        async def lasts_s(*parts: str, slot: str) -> int:
            return int(await link.ask(lambda client: client.ttl(link.key(*parts, slot=slot))))

        assert 0 < await lasts_s("limits", "tenant", slot="short") <= 120
        assert 0 < await lasts_s("limits", "key", "k1", slot="short") <= 120
        assert 0 < await lasts_s("places", "key", "k1", slot="short") <= 30
        assert await lasts_s("limits", "tenant", slot="long") > 31 * 86400


async def test_a_clock_of_redis_that_was_set_back_blocks_nobody_for_long(redis_alone: Servers) -> None:
    """As after a failover to a server whose clock is behind: a level that lies in the future drains from now on."""
    allowance = allowed(requests_per_minute=600, burst_s=0.1)
    bounds = bounds_of(allowance)
    async with open_redis(redis_alone.settings(timeout_s=1.0)) as link:
        shared = RedisLimits(link, gateway="g")
        await shared.take(bounds, "r1", (1, 0, 0, 1, 0, 0.0))
        key = link.key("limits", "tenant", slot="acme")
        await link.ask(lambda client: client.hset(key, "at", f"{time.time() + 3600:.6f}"))

        refused = await shared.take(bounds, "r2", (1, 0, 0, 1, 0, 0.0))
        await asyncio.sleep(next(iter(refused.standings())).retry_after_s + 0.01)

        assert not refused.admitted
        assert (await shared.take(bounds, "r3", (1, 0, 0, 1, 0, 0.0))).admitted
        assert [bound.kind for bound in bounds.all] == [Kind.REQUESTS]
