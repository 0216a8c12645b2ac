"""
What an agent is, and what it gets.

An agent is an async callable `run(context, input) -> output`. It may be started more than once for the same task:
after a crash, a failure, or when tasks that it waited for have ended. What it asked of models and of child tasks is
then asked again under the same names, and child tasks that exist already are found, not made anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sutazai.core.request import Priority
from sutazai.core.task import Task

TASK_PROCESSING = "task_processing"
LLM_INFERENCE = "llm_inference"

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
EMBEDDING = "/v1/embeddings"
ENDPOINTS = (CHAT, COMPLETION, EMBEDDING)
"""Addresses of OpenAI's API where models answer agents."""


class Pausing(asyncio.CancelledError):
    """
    Leaves an agent whose task waits for others; it is started again when they have ended.

    A cancellation, so that no `except Exception` of an agent keeps it.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a model answered."""

    text: str
    tool_calls: Sequence[Mapping[str, Any]] = ()
    """As OpenAI gives them."""
    message: Mapping[str, Any] = field(default_factory=dict)
    """The whole message, to be sent back in a conversation."""
    model: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    body: Mapping[str, Any] = field(default_factory=dict)
    """The whole answer in OpenAI's form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back, in the form of the address that was asked."""

    body: bytes
    """JSON on one line, with its numbers as the node wrote them."""
    input_tokens: int = 0
    output_tokens: int = 0


class Models(Protocol):
    """The way to the models: the gateway, from within or over HTTP."""

    async def chat(self, body: Mapping[str, Any], *, tenant: str, user: str, priority: Priority) -> Said:
        """
        A chat in OpenAI's form, answered whole. Raises `SutazaiError` as the gateway does.

        `tenant` pays for it, and its limits count.
        """

    async def ask(
        self, endpoint: str, body: Mapping[str, Any], *, tenant: str, user: str, priority: Priority
    ) -> Answer:
        """The same at any of `ENDPOINTS`, with the answer as it came."""

    async def usual(self) -> str:
        """What to ask where nobody named a model: the one that is chosen by the question, else any that is there."""


class AgentContext(Protocol):
    """What an attempt may use. Everything raises `asyncio.CancelledError` once the attempt was called off."""

    task: Task
    fence: int
    """Grows with each attempt: an effect elsewhere that is written with it can refuse older ones."""

    async def chat(self, messages: Sequence[Mapping[str, Any]], *, model: str = "", **options: Any) -> Said:
        """Ask a model through the gateway. Raises `BudgetSpent` past the task's budget."""

    async def ask(self, endpoint: str, body: Mapping[str, Any]) -> Answer:
        """Ask a model at one of `ENDPOINTS`, in the form of that address. Raises `BudgetSpent` as `chat` does."""

    async def progress(self, value: object) -> None:
        """Tell whoever watches how far it is: any JSON value. Soon written, and only the newest where many come."""

    async def checkpoint(self, value: object) -> None:
        """Keep where to go on: any JSON value, written before this returns."""

    @property
    def last_checkpoint(self) -> Any:
        """What was kept by this attempt or one before; None where nothing was."""

    async def spawn(self, agent: str, input: object, *, key: str = "", **draft: Any) -> str:  # noqa: A002
        """
        Submit a child task; its id.

        Args:
            key: its name among the children of this task; left out, it is the number of the call. Under the same key
                there is only ever one child.
        """

    async def join(self, ids: Sequence[str]) -> Sequence[Task]:
        """
        The tasks, once all have ended, in the given order.

        While some have not, this leaves the agent (`Pausing`) and frees its place; the agent is started anew later.
        """

    async def send(self, to: str, body: object) -> None:
        """Tell another agent something, by a task's id or any agreed name; kept in order."""

    async def received(self, name: str, *, after: int = 0) -> Sequence[tuple[int, object]]:
        """What was sent under this name, each with its number, oldest first."""


Run = Callable[[AgentContext, Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """An agent as it is registered."""

    name: str
    run: Run
    input_type: Any
    """What msgspec decodes the input to."""
    output_type: Any
    describes: str
    """One sentence for those who choose."""
    capabilities: frozenset[str] = frozenset()
    """Such as `tools`, `children`; for people and for routing."""
    queue: str = LLM_INFERENCE
    concurrency: int = 8
    """Attempts at once in one worker."""
    time_limit_s: float = 600.0
    max_attempts: int = 3
    is_internal: bool = False
    """Only other agents may ask for it."""
    is_isolated: bool = False
    """Runs in a process of its own, so that a crash takes nothing else along."""
    where: str = ""
    """Where the agent can be imported, as `module:name`; an isolated one needs it."""
