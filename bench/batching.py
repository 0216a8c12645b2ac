"""
What it gains when embeddings share calls: the embedded engine behind two gateways, one of which batches.

Both gateways run all the time on one core, and take turns with each number of callers; the engine has the other core
together with the callers. Callers ask different texts, so that only batching makes a difference.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from bench import machine
from bench.crowd import Person, crowd
from bench.findings import Finding
from bench.payload import MODEL, percentile
from bench.peers import Contestant, Recipe, ours, running
from sutazai.adapters.llamacpp.engine import Order, Ready
from sutazai.adapters.llamacpp.process import launch
from sutazai.adapters.llamacpp.spec import TRIAL_MODEL
from sutazai.adapters.llamacpp.supervisor import ENGINE

_CALLERS = (1, 8, 64)
_SECONDS = 2.0
_KEY = "bench"
_SLOTS = 4


def batching(folder: Path, rounds: int) -> Iterator[Finding]:
    """Embeddings a second with and without, and what an idle model's callers wait for it."""
    rates, waits_ms = asyncio.run(_measured(folder, rounds))
    for callers in _CALLERS:
        on, off = rates[callers, True], rates[callers, False]
        yield Finding("batching", f"embeddings with it, {callers} callers", on, "/s")
        yield Finding("batching", f"embeddings without, {callers} callers", off, "/s")
        gains = [with_it / without for with_it, without in zip(on, off, strict=True)]
        yield Finding("batching", f"of that, times what it was, {callers} callers", gains, "x")
    added = [with_it - without for with_it, without in zip(waits_ms[True], waits_ms[False], strict=True)]
    yield Finding("batching", "added to the median wait of a single caller", added, "ms", "<", 0.1)


async def _measured(folder: Path, rounds: int) -> tuple[dict[tuple[int, bool], list[float]], dict[bool, list[float]]]:
    rates: dict[tuple[int, bool], list[float]] = {}
    waits_ms: dict[bool, list[float]] = {}
    async with _two_gateways(folder) as gateways:
        for turn, callers in itertools.product(range(rounds + 1), _CALLERS):
            # who goes first changes from round to round
            for is_on in (True, False) if turn % 2 else (False, True):
                rate, wait_ms = await _ask(gateways[is_on], callers)
                if not turn:
                    continue  # connections are opened in the first
                rates.setdefault((callers, is_on), []).append(rate)
                if callers == 1:
                    waits_ms.setdefault(is_on, []).append(wait_ms)
    return rates, waits_ms


async def _ask(gateway: Contestant, callers: int) -> tuple[float, float]:
    """Embeddings a second, and the median wait in milliseconds."""
    people = [Person(key=gateway.target.key, body=_texts(number), path="/v1/embeddings") for number in range(callers)]
    began = time.monotonic()
    await crowd(gateway.target.port, people, _SECONDS)
    seconds = time.monotonic() - began
    waits = [wait for one in people for wait in one.waits_s()]
    if len(waits) < sum(len(one.answered) for one in people):
        raise RuntimeError("The measurement is void: an embedding failed.")
    return len(waits) / seconds, percentile(waits, 0.5) * 1000


def _texts(caller: int) -> Callable[[int], bytes]:
    return lambda count: msgspec.json.encode({"model": MODEL, "input": f"a tiny model {caller} {count}"})


@asynccontextmanager
async def _two_gateways(folder: Path) -> AsyncIterator[dict[bool, Contestant]]:
    """One that batches and one that does not, before the same engine."""
    allowed = os.sched_getaffinity(0)
    gateway_core, load_core = machine.cores()
    os.sched_setaffinity(0, {load_core})  # the engine inherits it
    try:
        async with AsyncExitStack() as stack:
            url = await stack.enter_async_context(_engine())
            gateways = {}
            for is_on in (True, False):
                recipe = _recipe(url, is_on=is_on)
                starting = running(recipe, nodes=[], folder=folder / recipe.name, core=gateway_core)
                gateways[is_on] = await asyncio.to_thread(starting.__enter__)
                stack.push_async_callback(asyncio.to_thread, starting.__exit__, None, None, None)
            yield gateways
    finally:
        os.sched_setaffinity(0, allowed)


def _recipe(url: str, *, is_on: bool) -> Recipe:
    node = f'[[nodes]]\nurl = "{url}"\nkind = "llamacpp"\napi_key = "{_KEY}"'
    batching = f"[batching]\nmax_requests = {16 if is_on else 1}"
    return ours("batching" if is_on else "not-batching", node, "[cache]\nenabled = false", batching)


@asynccontextmanager
async def _engine() -> AsyncIterator[str]:
    """The address of the trial model, served as `sutazai up` does."""
    order = Order(
        model_path=str(TRIAL_MODEL),
        name=MODEL,
        slots=_SLOTS,
        context_tokens=512,
        threads=1,
        api_key=_KEY,
        drain_s=5.0,
    )
    process = await launch(ENGINE)
    try:
        process.order(msgspec.json.encode(order))
        async with asyncio.timeout(60):
            ready = msgspec.json.decode(await process.first_line(), type=Ready)
        yield ready.url
    finally:
        await process.end(0)
