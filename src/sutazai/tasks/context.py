"""What an attempt may use, bound to its task and its fence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from sutazai.core.errors import BadRequest, BudgetSpent
from sutazai.core.task import Checkpointed, Progressed, Task, TaskDraft
from sutazai.ports.agent import Agent, Answer, Models, Pausing, Said
from sutazai.ports.messages import MessageStore
from sutazai.ports.tasks import Change, TaskStore
from sutazai.tasks.results import Results

MAX_CHECKPOINT_BYTES = 1024 * 1024
MAX_CHILDREN = 1000
BUDGET_RETRY_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all attempts of a worker share."""

    store: TaskStore
    models: Models
    messages: MessageStore
    agents: Mapping[str, Agent]
    results: Results
    default_model: str
    """Empty: the gateway's choice."""
    wall: Callable[[], datetime]


class Attempt:
    """The `AgentContext` of one attempt."""

    def __init__(self, task: Task, around: Surroundings) -> None:
        self.task = task
        self.fence = task.deliveries
        self.tokens = 0
        """Taken of models by this attempt."""
        self.waits_for: tuple[str, ...] = ()
        """The tasks for whose end it left."""
        self.unwritten_progress: str | None = None
        self._around = around
        self._spawned = 0
        self._checkpoint = task.checkpoint

    async def chat(self, messages: Sequence[Mapping[str, Any]], *, model: str = "", **options: Any) -> Said:
        self._check_budget()
        draft = self.task.draft
        body = {"model": model or await self._usual_model(), "messages": list(messages), **options}
        said = await self._around.models.chat(body, tenant=draft.tenant, user=draft.user, priority=draft.priority)
        self.tokens += said.input_tokens + said.output_tokens
        return said

    async def ask(self, endpoint: str, body: Mapping[str, Any]) -> Answer:
        self._check_budget()
        draft = self.task.draft
        asked = {**body, "model": body.get("model") or await self._usual_model()}
        answer = await self._around.models.ask(
            endpoint, asked, tenant=draft.tenant, user=draft.user, priority=draft.priority
        )
        self.tokens += answer.input_tokens + answer.output_tokens
        return answer

    def _check_budget(self) -> None:
        budget = self.task.draft.budget_tokens
        if budget is not None and self.task.tokens + self.tokens >= budget:
            raise BudgetSpent(
                f"The task took {self.task.tokens + self.tokens} tokens, all that its budget had. "
                "Submit it again with a larger `budget_tokens`.",
                retry_after_s=BUDGET_RETRY_S,
            )

    async def _usual_model(self) -> str:
        return self._around.default_model or await self._around.models.usual()

    async def progress(self, value: object) -> None:
        self.unwritten_progress = _json(value, "progress")

    async def checkpoint(self, value: object) -> None:
        text = _json(value, "checkpoint")
        await self._write(Checkpointed(self.fence, text))
        self._checkpoint = text

    @property
    def last_checkpoint(self) -> Any:
        """What was kept last."""
        return msgspec.json.decode(self._checkpoint) if self._checkpoint else None

    async def spawn(self, agent: str, input: object, *, key: str = "", **draft: Any) -> str:  # noqa: A002
        self._spawned += 1
        if self._spawned > MAX_CHILDREN:
            raise BadRequest(f"The task had {MAX_CHILDREN} children, all that it may. Let children have children.")
        known = self._around.agents.get(agent)
        if known is None:
            raise BadRequest(f"The task asked for the agent {agent[:64]!r}, which is not there.", where="agent")
        own = self.task.draft
        child = TaskDraft(
            tenant=own.tenant,
            user=own.user,
            agent=agent,
            input=_json(input, "input"),
            queue=known.queue,
            priority=own.priority,
            parent=self.task.id,
            idempotency_key=f"{self.task.id}/{key or self._spawned}",
            **{"max_attempts": known.max_attempts, "time_limit_s": known.time_limit_s, "deadline": own.deadline}
            | draft,
        )
        return (await self._around.store.submit([child]))[0].id

    async def join(self, ids: Sequence[str]) -> Sequence[Task]:
        found = {task.id: task for task in await self._around.store.several(self.task.draft.tenant, ids)}
        missing = [task_id for task_id in ids if task_id not in found]
        if missing:
            raise BadRequest(f"The task waited for {missing[0][:64]!r}, which is not there.")
        if all(task.status.is_end for task in found.values()):
            return await self._around.results.several([found[task_id] for task_id in ids])
        self.waits_for = tuple(dict.fromkeys(ids))
        raise Pausing

    async def send(self, to: str, body: object) -> None:
        await self._around.messages.send(self.task.draft.tenant, to, sender=self.task.id, body=_json(body, "message"))

    async def received(self, name: str, *, after: int = 0) -> Sequence[tuple[int, object]]:
        rows = await self._around.messages.received(self.task.draft.tenant, name, after=after)
        return [(number, msgspec.json.decode(body)) for number, body in rows]

    def take_progress(self) -> Change | None:
        """What the agent told since the last call."""
        text, self.unwritten_progress = self.unwritten_progress, None
        return None if text is None else Change(task=self.task.id, event=Progressed(self.fence, text))

    async def _write(self, event: Checkpointed) -> None:
        (done,) = await self._around.store.change([Change(task=self.task.id, event=event)])
        if done is None:  # another attempt goes on with the task
            raise asyncio.CancelledError


def _json(value: object, what: str) -> str:
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, msgspec.EncodeError, UnicodeEncodeError) as error:
        raise BadRequest(f"The {what} could not be written as JSON: {error}") from error
    if len(text) > MAX_CHECKPOINT_BYTES:
        raise BadRequest(f"The {what} had {len(text):,} characters; at most {MAX_CHECKPOINT_BYTES:,} are kept.")
    return text
