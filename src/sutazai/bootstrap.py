"""
The composition root: settings in, a running gateway out. The only module that names concrete technologies.

Everything is opened on one `AsyncExitStack` and closed in the opposite order.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import structlog
from prometheus_client.core import Metric

from sutazai.adapters.http.resolve import resolve
from sutazai.adapters.llamacpp.spec import EngineSpec, discover_models
from sutazai.adapters.llamacpp.supervisor import EngineSupervisor
from sutazai.adapters.ollama import OllamaNode
from sutazai.adapters.openai import OpenAINode
from sutazai.adapters.postgres.stores import Stores, open_stores
from sutazai.core.errors import EngineFault, Forbidden, StoreUnavailable, SutazaiError
from sutazai.core.node import Health, Node, NodeKind, NodeState
from sutazai.edge.app import build
from sutazai.edge.auth import Gatekeeper, is_loopback
from sutazai.edge.pool import Pool
from sutazai.edge.server import Server
from sutazai.gateway.accounts import Accounts
from sutazai.gateway.fleet import Fleet
from sutazai.gateway.keeping import Keeping
from sutazai.gateway.ledger import Ledger
from sutazai.gateway.membership import DnsName, Membership, Rhythm, Sources, Wanted
from sutazai.gateway.routed import Patience, Routed
from sutazai.policy.retry import RetryRules
from sutazai.policy.routing import RoutingRules
from sutazai.ports.nodes import NodeClient
from sutazai.settings.model import ModelSettings, Settings
from sutazai.settings.secret import Secret
from sutazai.settings.watch import SettingsWatch
from sutazai.telemetry.logs import AccessLog
from sutazai.telemetry.metrics import Metrics, gauge

log = structlog.get_logger("sutazai")

DEFAULT_MODEL = ModelSettings()
FIRST_ROUND_S = 10.0
"""Beyond the limit of a probe: what nodes may take until all were looked at once."""


class Live:
    """The settings as of now, for the few who must see changes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def model(self, name: str) -> ModelSettings:
        """Settings of one model."""
        return self.settings.models.get(name, DEFAULT_MODEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """A gateway that listens."""

    fleet: Fleet
    port: int
    trial_model: str
    """The model that ships with us, where it is served for want of another; else empty."""
    reload: Callable[[], None]
    """Read the settings file again, soon."""


def routing_rules(settings: Settings) -> RoutingRules:
    """The group that routing needs."""
    return RoutingRules(
        head_start=settings.routing.head_start,
        slow_start_s=settings.routing.slow_start_s,
        failure_penalty_s=settings.routing.failure_penalty_s,
    )


def retry_rules(settings: Settings) -> RetryRules:
    """The group that retries need."""
    retry = settings.retry
    return RetryRules(
        attempts=retry.attempts,
        budget_ratio=retry.budget_ratio,
        budget_minimum_per_s=retry.budget_minimum_per_s,
        backoff_s=retry.backoff_s,
        backoff_max_s=retry.backoff_max_s,
    )


def patience(settings: Settings) -> Patience:
    """The time limits of requests."""
    return Patience(
        first_token_s=settings.timeouts.first_token_s,
        idle_s=settings.timeouts.idle_s,
        total_s=settings.timeouts.total_s,
        max_wait_s=settings.queue.max_wait_s,
        max_waiting=settings.queue.max_waiting,
    )


def rhythm(settings: Settings) -> Rhythm:
    """How often nodes are probed and looked for."""
    return Rhythm(
        probe_s=settings.health.interval_s,
        probe_limit_s=settings.health.timeout_s,
        refresh_s=settings.discovery.refresh_s,
    )


def sources(settings: Settings, environ: Mapping[str, str]) -> Sources:
    """Where nodes come from."""
    listed = [
        Wanted(
            node=Node(
                name=entry.name or urlsplit(entry.url).netloc,
                kind=NodeKind(entry.kind),
                url=entry.url,
                slots=entry.slots,
                models=entry.models,
            ),
            api_key=_revealed(entry.api_key),
        )
        for entry in settings.nodes
    ]
    dns = [
        DnsName(
            name=entry.name,
            port=entry.port,
            kind=NodeKind(entry.kind),
            slots=entry.slots,
            api_key=_revealed(entry.api_key),
        )
        for entry in settings.discovery.dns
    ]
    return Sources(listed=listed, dns=dns, ollama=_ollama_url(environ) if settings.discovery.ollama else None)


def _revealed(secret: Secret | None) -> str | None:
    return None if secret is None else secret.reveal()


def _ollama_url(environ: Mapping[str, str]) -> str:
    """`OLLAMA_HOST` in the forms that Ollama itself understands: a host, a host and port, a URL."""
    host = environ.get("OLLAMA_HOST", "").strip() or "127.0.0.1:11434"
    url = urlsplit(host if "://" in host else f"http://{host}")
    name = url.hostname or "127.0.0.1"
    name = "127.0.0.1" if name in {"0.0.0.0", "::"} else name
    default_port = {"http": 11434, "https": 443}.get(url.scheme, 11434)
    shown = f"[{name}]" if ":" in name else name
    return f"{url.scheme}://{shown}:{url.port or default_port}{url.path.rstrip('/')}"


def connector(live: Live) -> Callable[[Node, str | None], NodeClient]:
    """Makes clients of nodes, by the API they speak."""

    def connect(node: Node, api_key: str | None) -> NodeClient:
        connect_s = live.settings.timeouts.connect_s
        if node.kind is NodeKind.OLLAMA:
            return OllamaNode(node, api_key=api_key, connect_s=connect_s, model_settings=live.model)
        return OpenAINode(node, api_key=api_key, connect_s=connect_s)

    return connect


@asynccontextmanager
async def open_gateway(
    settings: Settings,
    *,
    data_dir: Path,
    settings_path: Path | None,
    environ: Mapping[str, str],
    with_engine: bool,
) -> AsyncIterator[Gateway]:
    """
    A gateway that listens and has probed its nodes once.

    Args:
        with_engine: run the embedded engine as the settings say (`sutazai up`).

    Raises `SettingsError`, `StoreUnavailable`, `Forbidden` (no key for an open address) or `OSError` (address taken).
    Leaving the context stops it politely.
    """
    async with AsyncExitStack() as stack:
        live = Live(settings)
        await asyncio.to_thread(data_dir.mkdir, parents=True, exist_ok=True)
        stores = await stack.enter_async_context(open_stores(settings.database, data_dir))
        gatekeeper = await _gatekeeper(settings, stores)
        metrics = Metrics()
        access_log = _access_log(settings, stack)
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
        fleet.listen(on_health=_log_health)
        membership = Membership(
            fleet, sources(settings, environ), rhythm(settings), connect=connector(live), resolve=resolve
        )
        server: Server

        def is_ready() -> tuple[bool, str]:
            if server.unready:
                return False, "stopping"
            return (True, "ready") if membership.settled.is_set() else (False, "probing nodes")

        pool = Pool(
            fleet=fleet,
            routed=routed,
            keeping=Keeping(fleet, look_again=membership.probe_all),
            metrics=metrics,
            in_flight=lambda: server.in_flight,
            is_ready=is_ready,
        )
        server = Server(
            routed,
            build(pool),
            gatekeeper=gatekeeper,
            accounts=Accounts(metrics, ledger, access_log),
            limits=settings.server,
            keep_alive_s=lambda: live.settings.timeouts.keep_alive_s,
        )
        port = await server.bind()
        metrics.gauges(lambda: _gauges(fleet, routed, server, ledger))

        def applied(new: Settings, changed: tuple[str, ...]) -> None:
            live.settings = new
            fleet.rules = routing_rules(new)
            fleet.failures_to_down = new.health.failures
            routed.adopt(patience=patience(new), retry=retry_rules(new))
            membership.adopt(sources(new, environ), rhythm(new))
            log.info("settings applied", changed=list(changed))

        watch = SettingsWatch(
            path=settings_path,
            environ=environ,
            settings=settings,
            applied=applied,
            needs_restart=lambda groups: log.warning("settings need a restart", groups=groups),
            refused=lambda error: log.error("settings refused; the old ones stay", mistakes=list(error.mistakes)),
        )
        group = await stack.enter_async_context(_background())
        for name, work in (
            ("write usage", ledger.run),
            ("sweep requests", routed.run),
            ("sweep connections", server.run),
            ("keep membership", membership.run),
            ("watch settings", watch.run),
            ("follow keys", lambda: _follow_keys(stores, gatekeeper)),
        ):
            group(work, name)
        with suppress(TimeoutError):  # a name that does not resolve must not keep the others from serving
            async with asyncio.timeout(settings.health.timeout_s + FIRST_ROUND_S):
                await membership.settled.wait()
        trial_model = ""
        if with_engine and _is_engine_wanted(settings, fleet):
            trial_model = await _start_engines(settings, stack, fleet, membership, group)
        await server.serve()
        stack.push_async_callback(server.stop)
        yield Gateway(fleet=fleet, port=port, trial_model=trial_model, reload=watch.poke)


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


def _is_engine_wanted(settings: Settings, fleet: Fleet) -> bool:
    engine = settings.engine
    return engine.enabled == "always" or (engine.enabled == "auto" and bool(engine.models or not fleet.states()))


async def _start_engines(
    settings: Settings,
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
        specs = discover_models(settings.engine)
        for spec in specs:
            await _start_engine(spec, settings, stack, fleet, membership, group)
    except EngineFault as fault:
        if settings.engine.models or settings.engine.enabled == "always":
            raise
        log.warning("no embedded engine", why=fault.message)
        return ""
    return "" if settings.engine.models else specs[0].name


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


async def _gatekeeper(settings: Settings, stores: Stores) -> Gatekeeper:
    """The door, with today's keys. Raises `Forbidden` for an open address without any."""
    is_open = not is_loopback(settings.server.host)
    gatekeeper = Gatekeeper(
        required=settings.auth.required or is_open,
        allowed_hosts=settings.server.allowed_hosts,
        allowed_origins=settings.server.allowed_origins,
    )
    gatekeeper.learn(await stores.keys.all())
    if is_open and not gatekeeper.keys:
        raise Forbidden(
            f"The gateway was to listen on {settings.server.host}, where other machines reach it, and there is no key "
            "yet. Make one with `sutazai keys create NAME`, or listen on 127.0.0.1."
        )
    return gatekeeper


async def _follow_keys(stores: Stores, gatekeeper: Gatekeeper) -> None:
    """Take up keys as they are made and revoked; while the store is away the known ones stay good."""
    async for _ in stores.keys.changes():
        try:
            gatekeeper.learn(await stores.keys.all())
        except StoreUnavailable as error:
            log.warning("keys not read", why=error.message)


def _access_log(settings: Settings, stack: AsyncExitStack) -> AccessLog | None:
    if not settings.logs.access:
        return None
    access_log = AccessLog(sys.stderr, form=log_form(settings))
    access_log.start()
    stack.callback(access_log.stop)
    return access_log


def log_form(settings: Settings) -> Literal["json", "text"]:
    """`json` or `text`, as the settings and the terminal say."""
    if settings.logs.format != "auto":
        return settings.logs.format
    return "text" if sys.stderr.isatty() else "json"


def _note_fault(metrics: Metrics, node: str, model: str, error: SutazaiError) -> None:
    metrics.fault(node, type(error).__name__)
    log.warning("attempt failed", node=node, model=model, why=error.message)


def _log_health(state: NodeState, why: str) -> None:
    if state.health is Health.UP:
        log.info("node up", node=state.node.name, models=len(state.models))
    else:
        log.warning("node down", node=state.node.name, why=why)


def _gauges(fleet: Fleet, routed: Routed, server: Server, ledger: Ledger) -> list[Metric]:
    states = fleet.states()
    named = [((state.node.name,), state) for state in states]
    return [
        gauge(
            "sutazai_node_in_flight",
            "Requests at the node from this gateway.",
            ((name, state.in_flight) for name, state in named),
            ("node",),
        ),
        gauge("sutazai_node_slots", "Requests it works on at once.", ((n, s.slots) for n, s in named), ("node",)),
        gauge(
            "sutazai_node_up",
            "Whether it takes requests.",
            ((n, s.health is Health.UP) for n, s in named),
            ("node",),
        ),
        gauge("sutazai_in_flight", "Inference requests not yet answered.", [((), len(server.in_flight))]),
        gauge("sutazai_waiting", "Requests in line for a slot.", [((), routed.waiting)]),
        gauge("sutazai_connections", "Open client connections.", [((), server.connections)]),
        gauge("sutazai_buffered_bytes", "Request bodies in memory.", [((), server.buffered_bytes)]),
        gauge("sutazai_usage_rows_waiting", "Usage not yet written to the database.", [((), ledger.waiting)]),
    ]
