"""
A context to try agents with: models, children and messages are what a test says, and all that the agent did is kept.

    context = FakeContext(answers=["Hello."])
    output = await run(chat, {"messages": [{"role": "user", "content": "hi"}]}, context)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, TypeAlias

import msgspec

from sutazai.core.task import FailureReason, Task, TaskDraft, TaskStatus, task_id
from sutazai.ports.agent import CHAT, Agent, Answer, Models, Pausing, Said

Planned: TypeAlias = str | Said | Exception | Callable[["Asked"], "str | Said"]
"""What a model answers: words, the whole answer, a failure, or a function of what it was asked."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What an agent asked a model."""

    messages: Sequence[Mapping[str, Any]]
    model: str
    options: Mapping[str, Any]
    endpoint: str = CHAT

    @property
    def text(self) -> str:
        """The content of the last message."""
        return str(self.messages[-1]["content"])


@dataclass(frozen=True, slots=True)
class Child:
    """A task that the agent submitted."""

    agent: str
    input: Any
    key: str
    draft: Mapping[str, Any]
    task: Task


Ends: TypeAlias = Callable[[Child], "object | Exception"]
"""What a child comes to: its result, or a failure."""


@dataclass(slots=True)
class FakeContext:
    """
    An `AgentContext` in memory. It outlives attempts: run the agent with it again, and it is the next attempt.

    Raises `AssertionError` where the agent asks more of the models than was planned.
    """

    answers: Iterable[Planned] = ()
    """One for each time that a model is asked."""
    always: Planned | None = None
    """The answer after those; None = there is none."""
    models: Models | None = None
    """Asked in place of planned answers: real ones, or a gateway with a `FakeNode` behind."""
    children_end: Ends | None = None
    """Ends children when they are waited for; None leaves them waiting."""
    task: Task = field(default_factory=lambda: _task(TaskDraft(tenant="test", agent="test"), 0))
    fence: int = 1
    asked: list[Asked] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)
    """Progress."""
    checkpoints: list[Any] = field(default_factory=list)
    children: dict[str, Child] = field(default_factory=dict)
    """By id, in the order of their making."""
    sent: dict[str, list[object]] = field(default_factory=dict)
    is_cancelled: bool = False
    """Set it, and everything raises `asyncio.CancelledError`."""
    _planned: deque[Planned] = field(init=False)
    _spawned: int = 0

    def __post_init__(self) -> None:
        self._planned = deque(self.answers)

    async def chat(self, messages: Sequence[Mapping[str, Any]], *, model: str = "", **options: Any) -> Said:
        self._check()
        asked = Asked(list(messages), model, options)
        msgspec.json.encode([asked.messages, options])  # it would go over a wire
        self.asked.append(asked)
        if self.models is not None:
            body = {"messages": asked.messages, "model": model, **options}
            draft = self.task.draft
            return await self.models.chat(body, tenant=draft.tenant, user=draft.user, priority=draft.priority)
        return self._next_answer(asked)

    async def ask(self, endpoint: str, body: Mapping[str, Any]) -> Answer:
        self._check()
        options = {name: value for name, value in body.items() if name not in {"messages", "model"}}
        asked = Asked(body.get("messages", ()), body.get("model", ""), options, endpoint)
        self.asked.append(asked)
        said = self._next_answer(asked)
        return Answer(
            body=msgspec.json.encode(said.body), input_tokens=said.input_tokens, output_tokens=said.output_tokens
        )

    def _next_answer(self, asked: Asked) -> Said:
        planned = self._planned.popleft() if self._planned else self.always
        assert planned is not None, f"no answer was planned for the {len(self.asked)}. question: {asked.messages}"
        if isinstance(planned, Exception):
            raise planned
        answer = planned(asked) if callable(planned) else planned
        return _said(answer, asked.model) if isinstance(answer, str) else answer

    async def progress(self, value: object) -> None:
        self._check()
        self.told.append(_through_json(value))

    async def checkpoint(self, value: object) -> None:
        self._check()
        self.checkpoints.append(_through_json(value))

    @property
    def last_checkpoint(self) -> Any:
        return self.checkpoints[-1] if self.checkpoints else None

    async def spawn(self, agent: str, input: object, *, key: str = "", **draft: Any) -> str:  # noqa: A002
        self._check()
        self._spawned += 1
        key = key or str(self._spawned)
        for id_, child in self.children.items():
            if child.key == key:
                return id_
        text = msgspec.json.encode(input).decode()
        task = _task(TaskDraft(tenant="test", agent=agent, input=text, parent=self.task.id), len(self.children) + 1)
        self.children[task.id] = Child(agent, msgspec.json.decode(text), key, draft, task)
        return task.id

    async def join(self, ids: Sequence[str]) -> Sequence[Task]:
        self._check()
        for id_ in ids:
            child = self.children[id_]
            if not child.task.status.is_end and self.children_end is not None:
                self.children[id_] = replace(child, task=_ended(child.task, self.children_end(child)))
        tasks = [self.children[id_].task for id_ in ids]
        if not all(task.status.is_end for task in tasks):
            raise Pausing("It waits for its children.")
        return tasks

    def end(self, id_: str, result: object) -> None:
        """Let one child end now, with its result or a failure."""
        child = self.children[id_]
        self.children[id_] = replace(child, task=_ended(child.task, result))

    async def send(self, to: str, body: object) -> None:
        self._check()
        self.sent.setdefault(to, []).append(_through_json(body))

    async def received(self, name: str, *, after: int = 0) -> Sequence[tuple[int, object]]:
        self._check()
        return [(number, body) for number, body in enumerate(self.sent.get(name, []), 1) if number > after]

    def _check(self) -> None:
        if self.is_cancelled:
            raise asyncio.CancelledError("The attempt was called off.")


async def run(agent: Agent, input: object, context: FakeContext) -> Any:  # noqa: A002 - the agent's word
    """
    One attempt, as a worker makes it: the input comes through JSON and the output goes through it.

    Raises `msgspec.ValidationError` for an input or output that is not of the agent's types.
    """
    context._spawned = 0
    decoded = msgspec.json.decode(msgspec.json.encode(input), type=agent.input_type)
    output = await agent.run(context, decoded)
    return msgspec.json.decode(msgspec.json.encode(output), type=agent.output_type)


def _said(text: str, model: str) -> Said:
    return Said(
        text=text,
        message={"role": "assistant", "content": text},
        model=model or "fake",
        input_tokens=1,
        output_tokens=len(text.split()),
    )


def _ended(task: Task, result: object) -> Task:
    if isinstance(result, Exception):
        return replace(task, status=TaskStatus.FAILED, reason=FailureReason.ERROR, error=str(result))
    return replace(task, status=TaskStatus.COMPLETED, result=msgspec.json.encode(result).decode())


def _task(draft: TaskDraft, number: int) -> Task:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return Task(
        id=task_id(at.timestamp(), number),
        draft=draft,
        version=1,
        status=TaskStatus.PROCESSING if not draft.parent else TaskStatus.PENDING,
        created_at=at,
        run_at=at,
    )


def _through_json(value: object) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))
