"""What a worker has around it whose agents ask no model."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sutazai.ports.agent import Agent
from sutazai.ports.messages import MessageStore
from sutazai.ports.tasks import TaskStore
from sutazai.tasks.context import Surroundings
from sutazai.tasks.results import Results
from sutazai.testing.objects import MemoryObjects


class NoModels:
    """The `Models` that must not be asked."""

    async def chat(self, body: Any, **_: Any) -> Any:
        raise NotImplementedError

    async def ask(self, endpoint: str, body: Any, **_: Any) -> Any:
        raise NotImplementedError

    async def usual(self) -> str:
        raise NotImplementedError


def without_models(store: TaskStore, messages: MessageStore, agents: Mapping[str, Agent]) -> Surroundings:
    """Over these stores; large results are in memory."""
    return Surroundings(
        store=store,
        models=NoModels(),
        messages=messages,
        results=Results(MemoryObjects(), max_inline_bytes=2**18),
        agents=agents,
        default_model="m",
        wall=lambda: datetime.now(UTC),
    )
