"""The side of tasks: the agents, the queue with its relay to a broker, and workers."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from sutazai.adapters.objects.store import open_objects
from sutazai.adapters.openai.gateway_models import open_models
from sutazai.adapters.postgres.statistics import Statistics
from sutazai.adapters.postgres.stores import Stores, open_stores
from sutazai.adapters.process.isolated import isolated
from sutazai.adapters.rabbitmq.queue import RabbitQueue, open_rabbitmq
from sutazai.adapters.web.guarded import open_web
from sutazai.agents import batch_agents, builtin, tools_with, with_entry_points
from sutazai.agents.batch import Stores as BatchStores
from sutazai.bootstrap.rules import refill_rhythm
from sutazai.bootstrap.upkeep import begin_partitions
from sutazai.core.errors import SettingsError, SutazaiError
from sutazai.core.request import Dialect
from sutazai.edge.errors import answer_to
from sutazai.policy.prefetch import NONE_WAITS, PrefetchRules
from sutazai.ports.agent import LLM_INFERENCE, TASK_PROCESSING, Agent, Models
from sutazai.ports.broadcasts import Source
from sutazai.ports.files import FileStore
from sutazai.ports.objects import ObjectStore
from sutazai.ports.queue import Queue
from sutazai.ports.web import Web
from sutazai.settings.model import Agents as AgentSettings
from sutazai.settings.model import Rabbitmq as RabbitmqSettings
from sutazai.settings.model import Settings
from sutazai.settings.model import Tasks as TaskSettings
from sutazai.settings.model import Web as WebSettings
from sutazai.tasks.broadcast import Broadcast
from sutazai.tasks.context import Surroundings
from sutazai.tasks.dead_letters import DeadLetters
from sutazai.tasks.depths import Depths
from sutazai.tasks.refill import Refill
from sutazai.tasks.relay import Relay
from sutazai.tasks.results import Results
from sutazai.tasks.sweep import sweep
from sutazai.tasks.worker import Worker, WorkerRules

Begin = Callable[[Callable[[], Awaitable[None]], str], None]
"""Starts a named piece of background work."""


def way_to_the_web(settings: WebSettings) -> AbstractAsyncContextManager[Web]:
    """Requests to public addresses, and to those that the settings allow."""
    return open_web(allowed=settings.allowed, limit_s=settings.timeout_s, max_bytes=settings.max_page_bytes)


def installed_agents(settings: AgentSettings, web: Web, files: FileStore, objects: ObjectStore) -> Mapping[str, Agent]:
    """Those that ship with SutazAI and those of installed packages, by name."""
    tools = tools_with(
        web=web if settings.http_get else None,
        folder=Path(settings.files_dir) if settings.files_dir else None,
    )
    batch = batch_agents(BatchStores(files=files, objects=objects), _refusal)
    registry = with_entry_points((*builtin(tools), *batch))
    return {agent.name: isolated(agent) if agent.is_isolated else agent for agent in registry}


def _refusal(error: SutazaiError) -> tuple[int, bytes]:
    told = answer_to(error, Dialect.OPENAI)
    return told.status, told.body


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerSide:
    """What goes to a broker and comes from it."""

    queue: RabbitQueue
    dead_letters: DeadLetters
    broadcasts: Sequence[Broadcast]
    """What carries to its stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskQueue:
    """What workers read, and how much waits in it."""

    queue: Queue
    depths: Depths
    refill: Refill
    worker: str
    """The name of the one in this process, where there is one."""
    broker: BrokerSide | None = None
    """None where the queue is the table."""


def _name_of_worker() -> str:
    """A name for this process that no other one has, and none had: host and process come again in containers."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"


async def begin_queue(
    settings: Settings, stores: Stores, agents: Mapping[str, Agent], stack: AsyncExitStack, begin: Begin
) -> TaskQueue:
    """The queue that workers read, tended; with a broker the table of PostgreSQL is its outbox."""
    names = sorted({TASK_PROCESSING, LLM_INFERENCE, *(agent.queue for agent in agents.values())})
    begin(stores.queue.run, "tend the queue")
    if stores.clock is not None:
        begin(stores.clock.run, "ask the database for its time")
    begin(lambda: sweep(stores.tasks, stores.wall), "look at deadlines of tasks")
    for database in stores.databases.values():
        begin(Statistics(database, every_s=settings.tasks.statistics_s).run, "count what agents did")
    broker = await _begin_broker(settings.rabbitmq, stores, names, stack, begin) if settings.rabbitmq.url else None
    queue = stores.queue if broker is None else broker.queue
    worker = _name_of_worker()
    refill = Refill(
        stores.refills,
        stores.tasks,
        queue,
        names,
        worker=worker,
        wall=stores.wall,
        rhythm=refill_rhythm(settings),
    )
    await refill.beat()  # before the first task can name this worker
    begin(refill.run, "look for tasks without word")
    depths = Depths([stores.queue] if broker is None else [stores.queue, broker.queue], names)
    begin(depths.run, "look how many tasks wait")
    return TaskQueue(queue=queue, depths=depths, refill=refill, worker=worker, broker=broker)


async def _begin_broker(
    settings: RabbitmqSettings, stores: Stores, names: Sequence[str], stack: AsyncExitStack, begin: Begin
) -> BrokerSide:
    queue = await stack.enter_async_context(open_rabbitmq(settings))
    begin(Relay(stores.queue, queue, names).run, "carry word of tasks to the broker")
    dead_letters = DeadLetters(queue, stores.tasks)
    begin(dead_letters.run, "end what the broker gave up")
    broadcasts = [
        Broadcast(store, source, queue.events.append, wall=stores.wall)
        for store in stores.broadcasts
        for source in Source
    ]
    for each in broadcasts:
        begin(each.run, f"carry {each.source} of {each.shard or 'the database'} to the stream")
    return BrokerSide(queue=queue, dead_letters=dead_letters, broadcasts=broadcasts)


def make_worker(
    settings: Settings,
    stores: Stores,
    tasks: TaskQueue,
    agents: Mapping[str, Agent],
    models: Models,
    objects: ObjectStore,
) -> Worker:
    """A worker as the settings say. Raises `SettingsError` where they name an agent that is not there."""
    mine = frozenset(settings.tasks.agents) or frozenset(agents)
    unknown = sorted(mine - agents.keys())
    if unknown:
        known = ", ".join(sorted(agents))
        raise SettingsError([f"tasks.agents named {unknown[0]!r}, which is not installed; there are: {known}."])
    around = Surroundings(
        store=stores.tasks,
        models=models,
        messages=stores.messages,
        agents=agents,
        results=Results(objects, max_inline_bytes=settings.tasks.max_inline_bytes),
        default_model=settings.tasks.model,
        wall=stores.wall,
    )
    rules = WorkerRules(
        name=tasks.worker,
        slots={name: _slots(settings.tasks, name) for name in sorted({agents[one].queue for one in mine})},
        prefetch=_prefetch(settings),
        delivery_limit=settings.tasks.delivery_limit,
        drain_s=settings.tasks.drain_s,
    )
    return Worker(tasks.queue, around, rules, mine=mine, random=random.random)


@asynccontextmanager
async def open_worker(settings: Settings, *, data_dir: Path, gateway_url: str) -> AsyncIterator[Worker]:
    """
    A worker by itself, which asks models through a gateway; `run` it, and `stop` it.

    Raises `SettingsError` or `StoreUnavailable`.
    """
    async with AsyncExitStack() as stack:
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
        web = await stack.enter_async_context(way_to_the_web(settings.web))
        objects = await asyncio.to_thread(open_objects, settings.objects, data_dir)
        agents = installed_agents(settings.agents, web, stores.files, objects)
        key = settings.tasks.gateway_key
        models = await stack.enter_async_context(open_models(gateway_url, key=None if key is None else key.reveal()))
        tasks: list[asyncio.Task[None]] = []

        async def run(work: Callable[[], Awaitable[None]]) -> None:
            await work()

        stack.push_async_callback(_end, tasks)
        await begin_partitions(
            settings, stores, data_dir, lambda work, name: tasks.append(asyncio.create_task(run(work), name=name))
        )
        queue = await begin_queue(
            settings, stores, agents, stack, lambda work, name: tasks.append(asyncio.create_task(run(work), name=name))
        )
        yield make_worker(settings, stores, queue, agents, models, objects)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _prefetch(settings: Settings) -> PrefetchRules:
    """A table hands out word of a task within a millisecond, so none has to wait here."""
    broker = settings.rabbitmq
    if broker.url is None:
        return NONE_WAITS
    return PrefetchRules(slow=broker.prefetch_slow, fast=broker.prefetch_fast)


def _slots(settings: TaskSettings, queue: str) -> int:
    return settings.llm_slots if queue == LLM_INFERENCE else settings.slots
