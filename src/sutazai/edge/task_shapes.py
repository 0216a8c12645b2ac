"""How tasks look in the API: what may be sent, and what is told."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sutazai.core.errors import BadRequest
from sutazai.core.request import Priority
from sutazai.core.task import Task
from sutazai.edge.admin_shapes import Body, PriorityName
from sutazai.ports.task_events import KeptEvent
from sutazai.tasks.submit import Wanted

NO_NUL = r"^[^\x00]*$"
Word = Annotated[str, Meta(max_length=255, pattern=NO_NUL)]
Id = Annotated[str, Meta(max_length=64)]
Moment = Annotated[datetime, Meta(tz=True)]
NESTED = ("progress", "checkpoint", "result")
"""Fields of events that hold JSON as text."""


class TaskBody(Body, frozen=True):
    """A task to be submitted."""

    agent: Annotated[str, Meta(min_length=1, max_length=200, pattern=NO_NUL)]
    input: msgspec.Raw = msgspec.Raw(b"{}")
    priority: PriorityName | None = None
    run_at: Moment | None = None
    deadline: Moment | None = None
    idempotency_key: Word | None = None
    parent: Id | None = None
    after: Annotated[tuple[Id, ...], Meta(max_length=100)] | None = None
    webhook: Annotated[str, Meta(max_length=2048)] | None = None
    max_attempts: Annotated[int, Meta(ge=1)] | None = None
    time_limit_s: Annotated[float, Meta(gt=0)] | None = None
    budget_tokens: Annotated[int, Meta(ge=1)] | None = None

    def wanted(self, *, header_key: str) -> Wanted:
        """
        The wish in words of the core.

        Args:
            header_key: what the header `Idempotency-Key` says; empty where there is none.
        """
        key = self.idempotency_key or header_key
        if header_key and key != header_key:
            raise BadRequest(
                "The header `Idempotency-Key` and idempotency_key were not the same. Send one of them.",
                where="idempotency_key",
            )
        return Wanted(
            agent=self.agent,
            input=bytes(self.input),
            priority=None if self.priority is None else Priority[self.priority.upper()],
            run_at=self.run_at,
            deadline=self.deadline,
            idempotency_key=key,
            parent=self.parent or "",
            after=self.after or (),
            webhook=self.webhook or "",
            max_attempts=self.max_attempts,
            time_limit_s=self.time_limit_s,
            budget_tokens=self.budget_tokens,
        )


def told_task(task: Task) -> dict[str, Any]:
    """All of a task that its tenant may know."""
    draft = task.draft
    return told_briefly(task) | {
        "input": _json(draft.input),
        "result": _json(task.result),
        "result_object": task.result_object or None,
        "progress": _json(task.progress),
        "max_attempts": draft.max_attempts,
        "time_limit_s": draft.time_limit_s,
        "after": draft.after,
        "webhook": draft.webhook or None,
        "idempotency_key": draft.idempotency_key or None,
        "budget_tokens": draft.budget_tokens,
    }


def told_briefly(task: Task) -> dict[str, Any]:
    """The line of a list: nothing that may be large."""
    draft = task.draft
    return {
        "id": task.id,
        "object": "task",
        "agent": draft.agent,
        "status": task.status.value,
        "is_cancelling": task.is_cancelling,
        "priority": draft.priority.name.lower(),
        "parent": draft.parent or None,
        "failed_attempts": task.attempts,
        "reason": None if task.reason is None else task.reason.value,
        "error": task.error or None,
        "tokens": task.tokens,
        "worker": task.worker or None,
        "created_at": task.created_at,
        "run_at": task.run_at,
        "deadline": draft.deadline,
        "started_at": task.started_at,
        "ended_at": task.ended_at,
        "version": task.version,
    }


def told_event(event: KeptEvent) -> bytes:
    """An event as JSON on one line, its data as they were written but for a draft, which is the task's to tell."""
    data: dict[str, Any] = msgspec.json.decode(event.data)
    data.pop("draft", None)
    for name in NESTED:
        if isinstance(data.get(name), str):
            data[name] = _json(data[name])
    told = {"task": event.task, "version": event.version, "kind": event.kind, "at": event.at, "data": data}
    return msgspec.json.format(msgspec.json.encode(told), indent=-1)


def _json(text: str) -> msgspec.Raw | None:
    return msgspec.Raw(text.encode()) if text else None
