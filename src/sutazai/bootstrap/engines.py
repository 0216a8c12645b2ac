"""The embedded engine of `sutazai up`: when it is wanted, and how it joins the pool."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import structlog

from sutazai.adapters.llamacpp.spec import EngineSpec, discover_models
from sutazai.adapters.llamacpp.supervisor import EngineSupervisor
from sutazai.adapters.llamacpp.tuned import Tuned, read_tuned
from sutazai.core.errors import EngineFault
from sutazai.core.node import Health
from sutazai.gateway.fleet import Fleet
from sutazai.gateway.membership import Membership
from sutazai.settings.model import Engine, Settings

log = structlog.get_logger("sutazai")

FIRST_ROUND_S = 10.0
"""Until an engine that started is up."""


def is_engine_wanted(settings: Settings, fleet: Fleet) -> bool:
    """Whether the settings, and the nodes that were found, ask for one."""
    engine = settings.engine
    return engine.enabled == "always" or (engine.enabled == "auto" and bool(engine.models or not fleet.states()))


async def start_engines(
    settings: Settings,
    data_dir: Path,
    stack: AsyncExitStack,
    fleet: Fleet,
    membership: Membership,
    group: Callable[[Callable[[], Awaitable[None]], str], None],
) -> str:
    """
    Start the embedded engine for each model and wait until the nodes answer; returns the trial model's name, if used.

    Raises `EngineFault`, but not for the trial model: without it there is still a gateway, only nothing to try.
    """
    try:
        specs = await asyncio.to_thread(engine_specs, settings.engine, data_dir, _log_untuned)
        for spec in specs:
            await _start_engine(spec, settings, stack, fleet, membership, group)
    except EngineFault as fault:
        if settings.engine.models or settings.engine.enabled == "always":
            raise
        log.warning("no embedded engine", why=fault.message)
        return ""
    return "" if settings.engine.models else specs[0].name


def engine_specs(settings: Engine, data_dir: Path, warn: Callable[[str], None]) -> Sequence[EngineSpec]:
    """
    What to serve, with what `sutazai nodes tune --save` kept; without, where that cannot be read, and `warn` says why.

    Blocks. Raises `EngineFault`.
    """
    tuned: Sequence[Tuned] = ()
    try:
        tuned = read_tuned(data_dir)
    except EngineFault as fault:
        warn(fault.message)
    return discover_models(settings, tuned)


def _log_untuned(why: str) -> None:
    log.warning("the engine runs untuned", why=why)


async def _start_engine(
    spec: EngineSpec,
    settings: Settings,
    stack: AsyncExitStack,
    fleet: Fleet,
    membership: Membership,
    group: Callable[[Callable[[], Awaitable[None]], str], None],
) -> None:
    def stopped(name: str, why: str) -> None:
        log.warning("engine stopped", model=name, why=why)
        membership.unembed(name)

    def is_idle() -> bool:
        state = fleet.state(spec.name)
        return state is None or not state.in_flight

    supervisor = EngineSupervisor(
        spec,
        started=lambda node, key: membership.embed(node, key.reveal()),
        stopped=stopped,
        is_idle=is_idle,
        drain_s=settings.server.drain_s,
    )
    log.info("engine starts", model=spec.name, slots=spec.slots, threads=spec.threads, batch_tokens=spec.batch_tokens)
    node, key = await supervisor.start()
    stack.push_async_callback(supervisor.stop)
    group(supervisor.run, f"watch {spec.name}")
    membership.embed(node, key.reveal())
    try:
        async with asyncio.timeout(FIRST_ROUND_S):
            while (state := fleet.state(spec.name)) is None or state.health is not Health.UP:
                await asyncio.sleep(0.01)
    except TimeoutError as error:
        raise EngineFault(
            f"The engine with {spec.name} started, but answered no probe within {FIRST_ROUND_S:g} s. Start again; "
            "`sutazai doctor` tells what this machine has."
        ) from error
