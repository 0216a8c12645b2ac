"""The side of tasks: the queue, the relay to a broker, and a worker."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Mapping
from datetime import UTC, datetime

from sutazai.adapters.postgres.stores import Stores
from sutazai.core.errors import SettingsError
from sutazai.ports.agent import LLM_INFERENCE, TASK_PROCESSING, Agent, Models
from sutazai.settings.model import Settings
from sutazai.settings.model import Tasks as TaskSettings
from sutazai.tasks.context import Surroundings
from sutazai.tasks.worker import Worker, WorkerRules


def make_worker(settings: Settings, stores: Stores, agents: Mapping[str, Agent], models: Models) -> Worker:
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
        default_model=settings.tasks.model,
        wall=lambda: datetime.now(UTC),
    )
    rules = WorkerRules(
        name=f"{socket.gethostname()}:{os.getpid()}",
        slots={name: _slots(settings.tasks, name) for name in sorted({agents[one].queue for one in mine})},
        delivery_limit=settings.tasks.delivery_limit,
        drain_s=settings.tasks.drain_s,
    )
    return Worker(stores.queue, around, rules, mine=mine, random=random.random)


def queue_names(agents: Mapping[str, Agent]) -> frozenset[str]:
    """All queues that tasks can wait in."""
    return frozenset({TASK_PROCESSING, LLM_INFERENCE, *(agent.queue for agent in agents.values())})


def _slots(settings: TaskSettings, queue: str) -> int:
    return settings.llm_slots if queue == LLM_INFERENCE else settings.slots
