"""
The composition root: settings in, a running gateway out. The only module that names concrete technologies.

Everything is opened on one `AsyncExitStack` and closed in the opposite order.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import structlog

from sutazai.adapters.http.resolve import resolve
from sutazai.adapters.objects.store import open_objects
from sutazai.adapters.ollama import OllamaNode
from sutazai.adapters.openai import OpenAINode
from sutazai.adapters.postgres.stores import Stores, open_stores
from sutazai.adapters.redis.answers import RedisAnswerStore
from sutazai.adapters.redis.limits import RedisLimits
from sutazai.adapters.redis.link import RedisLink, open_redis
from sutazai.adapters.redis.sessions import RedisSessionStore
from sutazai.bootstrap.engines import is_engine_wanted, start_engines
from sutazai.bootstrap.gauges import database_gauges, gauges, task_gauges
from sutazai.bootstrap.keys import follow_keys, open_door, weight_of
from sutazai.bootstrap.rules import (
    Live,
    default_limits,
    log_form,
    patience,
    retry_rules,
    rhythm,
    routing_rules,
    sources,
    stage_rules,
)
from sutazai.bootstrap.task_edge import make_task_edge
from sutazai.bootstrap.tasks import begin_queue, installed_agents, make_worker, way_to_the_web
from sutazai.bootstrap.upkeep import begin_partitions
from sutazai.core.errors import StoreUnavailable, SutazaiError
from sutazai.core.node import Health, Node, NodeKind, NodeState
from sutazai.edge.app import build, direct
from sutazai.edge.auth import Gatekeeper
from sutazai.edge.errors import status_of
from sutazai.edge.pool import Pool
from sutazai.edge.server import Server
from sutazai.gateway.accounted import Accounted
from sutazai.gateway.accounts import Accounts
from sutazai.gateway.fleet import Fleet
from sutazai.gateway.keeping import Keeping
from sutazai.gateway.ledger import Ledger
from sutazai.gateway.membership import Membership
from sutazai.gateway.models import GatewayModels
from sutazai.gateway.pipeline import Clocks, Knowledge, Pipeline
from sutazai.gateway.routed import Routed
from sutazai.gateway.sessions import Sessions, shortest_context
from sutazai.policy.rate_limit import month_of
from sutazai.ports.agent import Agent
from sutazai.ports.cache import Forgotten
from sutazai.ports.keys import UsageRow
from sutazai.ports.limits import Spent
from sutazai.ports.nodes import NodeClient
from sutazai.ports.web import Web
from sutazai.settings.model import Settings
from sutazai.settings.watch import SettingsWatch
from sutazai.tasks.results import Results
from sutazai.tasks.worker import Worker
from sutazai.telemetry.logs import AccessLog
from sutazai.telemetry.metrics import Metrics

log = structlog.get_logger("sutazai")

FIRST_ROUND_S = 10.0
SEED_S = 60.0
"""Beyond the limit of a probe: what nodes may take until all were looked at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """A gateway that listens."""

    fleet: Fleet
    port: int
    trial_model: str
    """The model that ships with us, where it is served for want of another; else empty."""
    reload: Callable[[], None]
    """Read the settings file again, soon."""


def connector(live: Live) -> Callable[[Node, str | None], NodeClient]:
    """Makes clients of nodes, by the API they speak."""

    def connect(node: Node, api_key: str | None) -> NodeClient:
        connect_s = live.settings.timeouts.connect_s
        if node.kind is NodeKind.OLLAMA:
            return OllamaNode(node, api_key=api_key, connect_s=connect_s, model_settings=live.model)
        return OpenAINode(node, api_key=api_key, connect_s=connect_s)

    return connect


@asynccontextmanager
async def open_gateway(  # noqa: PLR0915 - what is made of what reads best in one piece
    settings: Settings,
    *,
    data_dir: Path,
    settings_path: Path | None,
    environ: Mapping[str, str],
    with_engine: bool,
    agents: Mapping[str, Agent] | None = None,
    web: Web | None = None,
    with_worker: bool = False,
) -> AsyncIterator[Gateway]:
    """
    A gateway that listens and has probed its nodes once.

    Args:
        with_engine: run the embedded engine as the settings say (`sutazai up`).
        agents: those that tasks may be for, by name; None = all that are installed.
        web: the way to the addresses of webhooks; None = as `[web]` says.
        with_worker: also do the tasks (`sutazai up`).

    Raises `SettingsError`, `StoreUnavailable`, `Forbidden` (no key for an open address) or `OSError` (address taken).
    Leaving the context stops it politely.
    """
    async with AsyncExitStack() as stack:
        live = Live(settings)
        await asyncio.to_thread(data_dir.mkdir, parents=True, exist_ok=True)
        stores = await stack.enter_async_context(
            open_stores(
                settings.database,
                data_dir,
                shards=settings.shards,
                max_length=settings.tasks.max_length,
                promote_after_s=settings.tasks.promote_after_s,
            )
        )
        if web is None:
            web = await stack.enter_async_context(way_to_the_web(settings.web))
        objects = await asyncio.to_thread(open_objects, settings.objects, data_dir)
        if agents is None:
            agents = installed_agents(settings.agents, web, stores.files, objects)
        gatekeeper = await open_door(settings, stores)
        metrics = Metrics()
        ledger = Ledger(stores.usage, wall_s=time.time)
        fleet = Fleet(routing_rules(settings), failures_to_down=settings.health.failures)
        routed = Routed(
            fleet,
            patience=patience(settings),
            retry=retry_rules(settings),
            random=random.random,
            later=asyncio.get_running_loop().call_later,
            on_fault=lambda node, model, error: _note_fault(metrics, node, model, error),
        )
        redis = await _redis(settings, stack)
        pipeline = _pipeline(settings, routed, live, gatekeeper, redis)
        admitted = pipeline.admitted
        fleet.listen(on_health=_log_health)
        membership = Membership(
            fleet, sources(settings, environ), rhythm(settings), connect=connector(live), resolve=resolve
        )
        server: Server
        accounts = Accounts(metrics, ledger, _access_log(settings, stack))
        accounted = Accounted(pipeline, accounts, status_of=lambda error: status_of(error)[0], clock=fleet.clock)
        sessions = Sessions(
            stores.sessions if redis is None else RedisSessionStore(stores.sessions, redis),
            accounted,
            rules=settings.sessions,
            context_tokens=lambda model: shortest_context(fleet, model),
            wall=lambda: datetime.now(UTC),
        )

        task_edge = make_task_edge(settings, stores, agents, web, gatekeeper)

        def is_ready() -> tuple[bool, str]:
            if server.unready:
                return False, "stopping"
            return (True, "ready") if membership.settled.is_set() else (False, "probing nodes")

        pool = Pool(
            fleet=fleet,
            routed=routed,
            keeping=Keeping(
                fleet,
                look_again=membership.probe_all,
                forget=lambda model: _forget_model(pipeline, model),
            ),
            metrics=metrics,
            in_flight=lambda: server.in_flight,
            is_ready=is_ready,
            place_of=admitted.place_of,
            keys=stores.keys,
            tenants=stores.tenants,
            usage=stores.usage,
            audit=stores.audit,
            forget=_forget_nothing if pipeline.cached is None else pipeline.cached.forget,
            choice=pipeline.typed.choice,
            sessions=sessions,
            tasks=stores.tasks,
            submission=task_edge.submission,
            watch=task_edge.watch,
            schedules=stores.schedules,
            recurring=task_edge.recurring,
            webhook_secret=task_edge.webhook_secret,
            messages=stores.messages,
            files=stores.files,
            objects=objects,
            marks=stores.marks,
            results=Results(objects, max_inline_bytes=settings.tasks.max_inline_bytes),
            keep_alive_s=lambda: live.settings.timeouts.keep_alive_s,
        )
        server = Server(
            pipeline,
            build(pool),
            direct=direct(pool),
            gatekeeper=gatekeeper,
            accounts=accounts,
            limits=settings.server,
            keep_alive_s=lambda: live.settings.timeouts.keep_alive_s,
            place_of=admitted.place_of,
        )
        port = await server.bind()
        worker: Worker | None = None
        metrics.gauges(
            lambda: chain(
                gauges(pipeline, server, ledger),
                task_gauges(task_queue, worker),
                database_gauges([state for one in stores.databases.values() if (state := one.servers())]),
            )
        )

        def applied(new: Settings, changed: tuple[str, ...]) -> None:
            live.settings = new
            gatekeeper.limit_by(default_limits(new))
            fleet.rules = routing_rules(new)
            fleet.failures_to_down = new.health.failures
            pipeline.adopt(stage_rules(new))
            routed.adopt(patience=patience(new), retry=retry_rules(new))
            membership.adopt(sources(new, environ), rhythm(new))
            log.info("settings applied", changed=list(changed))

        watch = _watch(settings, settings_path, environ, applied)
        group = await stack.enter_async_context(_background())
        for name, work in (
            ("write usage", ledger.run),
            ("sweep requests", routed.run),
            ("sweep those who wait", admitted.run),
            ("renew limits", pipeline.limited.run),
            ("sweep sessions", sessions.run),
            *task_edge.loops,
            ("sweep connections", server.run),
            ("keep membership", membership.run),
            ("watch settings", watch.run),
            ("follow keys", lambda: follow_keys(stores, gatekeeper, live)),
        ):
            group(work, name)
        if pipeline.cached is not None:
            group(pipeline.cached.run, "keep answers")
        task_queue = await begin_queue(settings, stores, agents, stack, group)
        group(lambda: _seed_limits(stores, pipeline, live), "read what was spent")
        await begin_partitions(settings, stores, data_dir, group)
        with suppress(TimeoutError):  # a name that does not resolve must not keep the others from serving
            async with asyncio.timeout(settings.health.timeout_s + FIRST_ROUND_S):
                await membership.settled.wait()
        trial_model = ""
        if with_engine and is_engine_wanted(settings, fleet):
            trial_model = await start_engines(settings, data_dir, stack, fleet, membership, group)
        if with_worker:
            models = GatewayModels(
                accounted,
                next_id=server.next_id,
                clock=fleet.clock,
                allowance=lambda tenant, user: gatekeeper.caller_for(tenant, user).allowance,
                usual=lambda: pipeline.typed.choice() or min(fleet.listed_models(), default=""),
            )
            worker = make_worker(settings, stores, task_queue, agents, models, objects)
            group(worker.run, "do tasks")
            stack.push_async_callback(_drained, worker)
        await server.serve()
        stack.push_async_callback(server.stop)
        yield Gateway(fleet=fleet, port=port, trial_model=trial_model, reload=watch.poke)


async def _drained(worker: Worker) -> None:
    """Let attempts end, or hand them back."""
    worker.stop()
    await worker.ended.wait()


@asynccontextmanager
async def _background() -> AsyncIterator[Callable[[Callable[[], Awaitable[None]], str], None]]:
    """Tasks that run as long as the context; one that fails ends them all."""
    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[None]] = []

        async def run(work: Callable[[], Awaitable[None]]) -> None:
            await work()

        def begin(work: Callable[[], Awaitable[None]], name: str) -> None:
            tasks.append(group.create_task(run(work), name=name))

        try:
            yield begin
        finally:
            for task in tasks:
                task.cancel()


def _pipeline(
    settings: Settings, routed: Routed, live: Live, gatekeeper: Gatekeeper, redis: RedisLink | None
) -> Pipeline:
    knowledge = Knowledge(
        price=live.price,
        is_public=lambda model: live.model(model).public,
        weight=lambda name: weight_of(gatekeeper, name),
    )
    return Pipeline(
        routed,
        stage_rules(settings),
        knowledge,
        Clocks(clock=routed.fleet.clock, wall=time.time, later=asyncio.get_running_loop().call_later),
        answers=None if redis is None else RedisAnswerStore(redis),
        limits=None if redis is None else RedisLimits(redis, gateway=os.urandom(8).hex()),
    )


def _watch(
    settings: Settings,
    path: Path | None,
    environ: Mapping[str, str],
    applied: Callable[[Settings, tuple[str, ...]], None],
) -> SettingsWatch:
    return SettingsWatch(
        path=path,
        environ=environ,
        settings=settings,
        applied=applied,
        needs_restart=lambda groups: log.warning("settings need a restart", groups=groups),
        refused=lambda error: log.error("settings refused; the old ones stay", mistakes=list(error.mistakes)),
    )


async def _redis(settings: Settings, stack: AsyncExitStack) -> RedisLink | None:
    return None if settings.redis.url is None else await stack.enter_async_context(open_redis(settings.redis))


async def _seed_limits(stores: Stores, pipeline: Pipeline, live: Live) -> None:
    """Count from what the ledger says was taken this month; now and then, for months end and a Redis may be emptied."""
    is_known = True
    while True:
        now = datetime.now(UTC)
        month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        try:
            rows = await stores.usage.total(since=month)
            await pipeline.limited.seed(spent_in(rows, live.price), month=month_of(now.timestamp()))
            is_known = True
        except StoreUnavailable as error:
            if is_known:
                log.warning("what was spent this month was not read; budgets go by what is known", why=error.message)
            is_known = False
        except Exception:  # the border of one turn
            log.exception("what was spent was not counted")
        await asyncio.sleep(SEED_S)


def spent_in(rows: Sequence[UsageRow], price: Callable[[str], tuple[float, float]]) -> Sequence[Spent]:
    """The sums of each tenant and each key."""
    sums: dict[tuple[str, str], tuple[int, float]] = {}
    for row in rows:
        for_input, for_output = price(row.model)
        money = (row.input_tokens * for_input + row.output_tokens * for_output) / 1e6
        for owner in {(row.tenant, ""), (row.tenant, row.key_id)}:
            tokens, spent = sums.get(owner, (0, 0.0))
            sums[owner] = tokens + row.input_tokens + row.output_tokens, spent + money
    return [Spent(tenant, key, tokens, money) for (tenant, key), (tokens, money) in sums.items()]


async def _forget_model(pipeline: Pipeline, model: str) -> None:
    """Here at once; where Redis is away, other gateways keep its answers until they are too old."""
    if pipeline.cached is None:
        return
    try:
        await pipeline.cached.forget(Forgotten(model=model))
    except StoreUnavailable as error:
        log.warning("other gateways were not told to forget", model=model, why=error.message)


async def _forget_nothing(_: Forgotten) -> int:
    return 0


def _access_log(settings: Settings, stack: AsyncExitStack) -> AccessLog | None:
    if not settings.logs.access:
        return None
    access_log = AccessLog(sys.stderr, form=log_form(settings))
    access_log.start()
    stack.callback(access_log.stop)
    return access_log


def _note_fault(metrics: Metrics, node: str, model: str, error: SutazaiError) -> None:
    metrics.fault(node, type(error).__name__)
    log.warning("attempt failed", node=node, model=model, why=error.message)


def _log_health(state: NodeState, why: str) -> None:
    if state.health is Health.UP:
        log.info("node up", node=state.node.name, models=len(state.models))
    else:
        log.warning("node down", node=state.node.name, why=why)
