"""
What limits cost: the same load on three gateways, one without limits, one that counts by itself, one with a Redis.

Limits on requests and on tokens, of key and tenant, so high that nobody reaches them. All three run at the same time on
one core and take turns; Redis has the other core together with the load, and its own CPU time beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from redis import Redis

from bench.arena import Sample, arena, closed_loop
from bench.findings import Finding
from bench.payload import SMALL_BYTES
from bench.peers import Recipe, ours, running

_SECONDS = 2.0
_CONNECTIONS = 32
_HIGH = 1_000_000_000
_LIMITS = f"[limits]\nrequests_per_minute = {_HIGH}\ntokens_per_minute = {_HIGH}"
_NO_CACHE = "[cache]\nenabled = false"


def limits(folder: Path, rounds: int, *, redis_url: str) -> Iterator[Finding]:
    """CPU time of a request in each of the three, and of Redis for one that it is asked about."""
    spent_us: dict[str, list[float]] = {}
    in_redis_us: list[float] = []
    redis = Redis.from_url(redis_url)
    with arena(folder) as place, ExitStack() as stack:
        gateways = [
            stack.enter_context(
                running(recipe, nodes=place.nodes, folder=folder / recipe.name, core=place.gateway_core)
            )
            for recipe in _recipes(redis_url)
        ]
        body = place.body(SMALL_BYTES)
        for turn in range(rounds + 1):
            for gateway in gateways:
                redis.config_resetstat()
                load = closed_loop(gateway.target, connections=_CONNECTIONS, seconds=_SECONDS, body=body)
                sample = place.measure("limits", gateway, load, turn=turn)
                if not turn:
                    continue  # connections are opened in the first
                spent_us.setdefault(gateway.target.name, []).append(_cpu_us(sample))
                if gateway.target.name == "shared":
                    in_redis_us.append(redis.info("commandstats")["cmdstat_evalsha"]["usec"] / sample.count)
    base = spent_us["unlimited"]
    yield Finding("limits", "CPU of a request without", base, "us")
    for name, told in (("alone", "counted by the gateway"), ("shared", "counted in Redis")):
        added = [after - before for after, before in zip(spent_us[name], base, strict=True)]
        yield Finding("limits", f"added when {told}", added, "us")
    yield Finding("limits", "of Redis' own CPU for each request", in_redis_us, "us")


def _recipes(redis_url: str) -> tuple[Recipe, ...]:
    return (
        ours("unlimited", _NO_CACHE),
        ours("alone", _NO_CACHE, _LIMITS),
        ours("shared", _NO_CACHE, _LIMITS, f'[redis]\nurl = "{redis_url}"'),
    )


def _cpu_us(sample: Sample) -> float:
    return sample.cpu_s / sample.count * 1e6
