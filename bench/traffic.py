"""
What the stages gain: `python -m bench.traffic [--quick] [--only cache,fairness]`.

Each section starts gateways of its own on loopback, pinned to one core, with nodes that are as slow as models are,
and puts what it measured beside its target. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench import machine
from bench.arena import arena, closed_loop, per_cpu_s
from bench.batching import batching
from bench.crowd import Person, ask, crowd
from bench.findings import Finding, print_findings
from bench.limits import limits as limits_findings
from bench.payload import MODEL, SMALL_BYTES, chat_body, percentile
from bench.peers import Contestant, Recipe, free_port, make_key, ours, require_tools, running
from bench.report import RESULTS, machine_name
from sutazai.core.node import NodeKind
from sutazai.testing.node import FakeNode
from sutazai.testing.script import Answer

_SLOTS = 4
_SERVICE_S = 0.05
_MODEST = 9
_GREEDY_CONNECTIONS = 64
_EQUAL = 100


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description="Measure what the stages gain.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--only", default=",".join(_SECTIONS), help="some of %(default)s")
    arguments = parser.parse_args()
    chosen = [name.strip() for name in arguments.only.split(",")]
    if unknown := [name for name in chosen if name not in _SECTIONS]:
        parser.error(f"--only knows {', '.join(_SECTIONS)}; not {', '.join(unknown)}")
    require_tools()
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="sutazai-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the embedded database runs as a user of its own
        for section in chosen:
            print(f"measuring {section} ...", flush=True)
            place = folder / section
            place.mkdir(mode=0o755)
            allowed = os.sched_getaffinity(0)
            findings += _SECTIONS[section](place, 1 if arguments.quick else 3)
            os.sched_setaffinity(0, allowed)
    print_findings(findings)
    RESULTS.mkdir(exist_ok=True)
    kept = {"measured_at": datetime.now(UTC), "machine": machine_name(), "findings": findings}
    (RESULTS / "traffic.json").write_bytes(msgspec.json.format(msgspec.json.encode(kept)) + b"\n")


def cache(folder: Path, rounds: int) -> Iterator[Finding]:
    """Answers from memory, and from Redis."""
    tiers: dict[str, list[float]] = {"memory": [], "Redis": []}
    with arena(folder) as place, _redis(folder, place.load_core) as redis_url:
        body = folder / "deterministic"
        body.write_bytes(chat_body(SMALL_BYTES, temperature=0))
        recipes = {
            "memory": ours("memory"),
            "Redis": ours("redis", f'[redis]\nurl = "{redis_url}"\n[cache]\nmemory_bytes = 0'),
        }
        for tier, recipe in recipes.items():
            with running(recipe, nodes=place.nodes, folder=folder / recipe.name, core=place.gateway_core) as gateway:
                for turn in range(rounds + 1):
                    load = closed_loop(gateway.target, connections=32, seconds=2, body=body)
                    sample = place.measure("cache", gateway, load, turn=turn)
                    if turn:  # the first fills it
                        tiers[tier].append(per_cpu_s(sample))
    yield Finding("cache", "hits in memory, by one core", tiers["memory"], "/s", ">=", 40_000)
    yield Finding("cache", "hits in Redis, by one core", tiers["Redis"], "/s")


def coalescing(folder: Path, rounds: int) -> Iterator[Finding]:
    """Equal requests at once."""
    calls = [asyncio.run(_equal_requests(folder / str(turn))) for turn in range(rounds)]
    yield Finding("coalescing", f"calls to a node for {_EQUAL} equal requests at once", calls, "", "<=", 1)


async def _equal_requests(folder: Path) -> float:
    async with _slow_pool(ours("equal"), folder, service_s=0.3) as (gateway, node):
        before = len(node.inferences)
        body = chat_body(SMALL_BYTES, temperature=0)
        asked = [ask(gateway.target.port, gateway.target.key, body) for _ in range(_EQUAL)]
        answers = await asyncio.gather(*asked)
        _check(all(one.status == 200 for one in answers), "an equal request failed")
        return float(len(node.inferences) - before)


def fairness(folder: Path, rounds: int) -> Iterator[Finding]:
    """One greedy tenant and nine modest ones."""
    alone, beside, ratios = [], [], []
    for turn in range(rounds):
        without, among = asyncio.run(_modest_p95(folder / str(turn), seconds=6 if rounds == 1 else 12))
        alone.append(without * 1000)
        beside.append(among * 1000)
        ratios.append(among / without)
    yield Finding("fairness", "p95 of the modest by themselves", alone, "ms")
    yield Finding("fairness", "p95 of the modest beside a greedy one", beside, "ms")
    yield Finding("fairness", "of that, times what it was", ratios, "x", "<=", 1.5)


async def _modest_p95(folder: Path, *, seconds: float) -> tuple[float, float]:
    async with _slow_pool(ours("fair", slots=_SLOTS), folder, service_s=_SERVICE_S) as (gateway, _):
        keys = [
            await asyncio.to_thread(make_key, folder / "fair", f"t{number}", f"t{number}")
            for number in range(_MODEST + 1)
        ]
        port = gateway.target.port
        modest = [Person(key=key, body=_body, pause_s=0.1) for key in keys[1:]]
        await crowd(port, modest, seconds)
        without = percentile([wait for one in modest for wait in one.waits_s()], 0.95)
        modest = [Person(key=key, body=_body, pause_s=0.1) for key in keys[1:]]
        greedy = [Person(key=keys[0], body=_body) for _ in range(_GREEDY_CONNECTIONS)]
        await crowd(port, [*modest, *greedy], seconds)
        return without, percentile([wait for one in modest for wait in one.waits_s()], 0.95)


def overload(folder: Path, rounds: int) -> Iterator[Finding]:
    """Three times as many as the pool can answer."""
    kept, refused_ms, attempts = [], [], []
    for turn in range(rounds):
        share, refusal_s, per_request = asyncio.run(_three_times(folder / str(turn), seconds=6))
        kept.append(share)
        refused_ms.append(refusal_s * 1000)
        attempts.append(per_request)
    yield Finding("overload", "answers at three times capacity, share of the peak", kept, "", ">=", 0.8)
    yield Finding("overload", "p99 of a refusal", refused_ms, "ms", "<", 50)
    yield Finding("overload", "attempts for each answer", attempts, "", "<=", 1.2)


async def _three_times(folder: Path, *, seconds: float) -> tuple[float, float, float]:
    recipe = ours("full", "[queue]\nmax_waiting = 16\nmax_wait_s = 1.0", slots=_SLOTS)
    async with _slow_pool(recipe, folder, service_s=_SERVICE_S) as (gateway, node):
        target = gateway.target

        async def rate_of(people: int) -> tuple[float, list[Person]]:
            asking = [Person(key=target.key, body=_body) for _ in range(people)]
            began = time.monotonic()
            await crowd(target.port, asking, seconds)
            return sum(len(one.waits_s()) for one in asking) / (time.monotonic() - began), asking

        peak, _ = await rate_of(_SLOTS + 1)
        before = len(node.inferences)
        # who is refused asks again at once, so far more than three times as much is offered
        flood, asking = await rate_of(3 * (_SLOTS + 16))
        refusals = [one.seconds for person in asking for one in person.answered if one.status in {429, 503}]
        answered = sum(len(one.waits_s()) for one in asking)
        _check(bool(refusals), "nothing was refused")
        return flood / peak, percentile(refusals, 0.99), (len(node.inferences) - before) / answered


def limits(folder: Path, rounds: int) -> Iterator[Finding]:
    """What it costs to count."""
    _, load_core = machine.cores()
    with _redis(folder, load_core) as redis_url:
        yield from limits_findings(folder, rounds, redis_url=redis_url)


def _body(count: int) -> bytes:
    messages = [{"role": "user", "content": f"What is {count} and one?"}]
    return msgspec.json.encode({"model": MODEL, "messages": messages, "temperature": 0.7})


@asynccontextmanager
async def _slow_pool(recipe: Recipe, folder: Path, *, service_s: float) -> AsyncIterator[tuple[Contestant, FakeNode]]:
    """A gateway on its core before one node that takes its time."""
    await asyncio.to_thread(folder.mkdir, mode=0o755)
    allowed = os.sched_getaffinity(0)
    gateway_core, load_core = machine.cores()
    os.sched_setaffinity(0, {load_core})
    async with FakeNode(NodeKind.LLAMACPP, [MODEL], slots=_SLOTS) as node:
        service = random.Random(0)
        node.default = lambda _: Answer(first_token_s=min(6 * service_s, service.expovariate(1 / service_s)))
        starting = running(recipe, nodes=[node.port], folder=folder / recipe.name, core=gateway_core)
        gateway = await asyncio.to_thread(starting.__enter__)
        try:
            yield gateway, node
        finally:
            await asyncio.to_thread(starting.__exit__, *sys.exc_info())
            os.sched_setaffinity(0, allowed)


@contextmanager
def _redis(folder: Path, core: int) -> Iterator[str]:
    """A Redis on the core of the load."""
    port = free_port()
    argv = ["taskset", "-c", str(core), "redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen([*argv, "--dir", str(folder)], stdout=subprocess.DEVNULL, start_new_session=True) as server:
        try:
            time.sleep(0.5)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(f"The measurement is void: {otherwise}.")


_SECTIONS: Mapping[str, Callable[[Path, int], Iterator[Finding]]] = {
    "cache": cache,
    "coalescing": coalescing,
    "batching": batching,
    "fairness": fairness,
    "limits": limits,
    "overload": overload,
}


if __name__ == "__main__":
    main()
