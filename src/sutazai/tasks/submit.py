"""
How a task is submitted: the agent is known, its input is of the agent's kind, and every wish is within bounds.

What is refused here was never kept. Once `submit` has returned, the task is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import msgspec

from sutazai.core.errors import BadRequest, Overloaded, TooLarge, TooManyWaiting, UnknownAgent
from sutazai.core.request import Priority
from sutazai.core.task import Task, TaskDraft, is_task_id
from sutazai.dialects.complaints import decoded
from sutazai.policy.nearest import nearest
from sutazai.ports.agent import Agent
from sutazai.ports.tasks import TaskStore
from sutazai.tasks.bound import WaitingBound
from sutazai.tasks.gather import Gathered

MAX_INPUT_BYTES = 2**20
MAX_AHEAD = timedelta(days=366)
"""How far in the future a task may begin or end."""
MAX_WAITING = 10_000
MAX_KEY_CHARACTERS = 255
MAX_URL_CHARACTERS = 2048
MAX_AFTER = 100
MAX_ATTEMPTS = 100
MAX_TIME_LIMIT_S = 86_400.0
MAX_BUDGET_TOKENS = 2**53

_anything = msgspec.json.Decoder(Any)


class Submitter(msgspec.Struct, frozen=True, kw_only=True):
    """On whose behalf."""

    tenant: str
    user: str = ""
    """The id of the key; empty where none was needed."""
    priority: Priority = Priority.NORMAL
    """What its tasks have; they may ask for less."""
    may_rise: bool = False
    """They may ask for more too."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A task as somebody asks for it; what is None or empty is as the agent says."""

    agent: str
    input: bytes = b"{}"
    """JSON."""
    priority: Priority | None = None
    run_at: datetime | None = None
    deadline: datetime | None = None
    idempotency_key: str = ""
    parent: str = ""
    after: tuple[str, ...] = ()
    webhook: str = ""
    max_attempts: int | None = None
    time_limit_s: float | None = None
    budget_tokens: int | None = None


class Submission:
    """The way into the store. `run` has to run beside it."""

    def __init__(
        self,
        store: TaskStore,
        agents: Mapping[str, Agent],
        *,
        takes_webhooks: bool = True,
        max_waiting: Callable[[str], int] = lambda _: MAX_WAITING,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """
        Args:
            max_waiting: how many tasks of a tenant may wait. Those that agents make count as well, and are never
                refused: they are a part of work under way.
        """
        self._store = store
        self._bound = WaitingBound(store, max_waiting)
        self._gathered = Gathered(store)
        self._takes_webhooks = takes_webhooks
        self._wall = wall
        self._decoders: dict[str, msgspec.json.Decoder[Any]] = {}
        self.agents = agents
        self.run = self._gathered.run

    async def submit(self, wanted: Wanted, by: Submitter) -> Task:
        """
        The task, kept; the earlier one where its idempotency key was used before.

        Raises `UnknownAgent`, `TooLarge`, `BadRequest` (with the field), `TooManyWaiting`, `Overloaded`,
        `StoreUnavailable`.
        """
        draft = self.draft(wanted, by)
        if draft.parent and await self._store.get(by.tenant, draft.parent) is None:
            raise BadRequest(f"`parent` named {draft.parent!r}, which is no task here.", where="parent")
        return await self._keep(draft)

    async def repeat(self, draft: TaskDraft) -> Task:
        """
        A draft that was made before, submitted as its agent is by now.

        Raises as `submit` does, except what is wrong with a wish.
        """
        return await self._keep(replace(draft, queue=self.agent(draft.agent).queue))

    async def _keep(self, draft: TaskDraft) -> Task:
        try:
            async with self._bound.room(draft.tenant):
                return await self._gathered.submit(draft)
        except (TooManyWaiting, Overloaded):
            # Whoever did not hear that it was kept asks again, and takes no room.
            earlier = await self._store.of_key(draft.tenant, draft.idempotency_key) if draft.idempotency_key else None
            if earlier is None:
                raise
            return earlier

    def draft(self, wanted: Wanted, by: Submitter) -> TaskDraft:
        """What is written for this wish. Raises as `submit` does, except where that takes the store."""
        agent = self.agent(wanted.agent)
        run_at, deadline = self._times(wanted)
        return TaskDraft(
            tenant=by.tenant,
            user=by.user,
            agent=agent.name,
            input=self.input(agent, wanted.input),
            queue=agent.queue,
            priority=_priority(wanted.priority, by),
            run_at=run_at,
            deadline=deadline,
            idempotency_key=_key(wanted.idempotency_key),
            parent="".join(_ids("parent", [wanted.parent] if wanted.parent else [])),
            after=_ids("after", wanted.after),
            max_attempts=int(
                _bounded("max_attempts", wanted.max_attempts, 1, MAX_ATTEMPTS, default=agent.max_attempts)
            ),
            time_limit_s=_bounded(
                "time_limit_s", wanted.time_limit_s, 0.001, MAX_TIME_LIMIT_S, default=agent.time_limit_s
            ),
            webhook=self._webhook(wanted.webhook),
            budget_tokens=None
            if wanted.budget_tokens is None
            else int(_bounded("budget_tokens", wanted.budget_tokens, 1, MAX_BUDGET_TOKENS, default=0)),
        )

    def agent(self, name: str) -> Agent:
        """The agent of this name, if clients may ask for it. Raises `UnknownAgent`."""
        agent = self.agents.get(name)
        if agent is None or agent.is_internal:
            raise UnknownAgent(name, nearest(name, [one.name for one in self.agents.values() if not one.is_internal]))
        return agent

    def input(self, agent: Agent, given: bytes) -> str:
        """The input as it is kept. Raises `TooLarge`, or `BadRequest` that names the field."""
        if len(given) > MAX_INPUT_BYTES:
            raise TooLarge(
                f"The input was {len(given):,} bytes and may be {MAX_INPUT_BYTES:,}. Put the rest into a file.",
                where="input",
            )
        decoded(_anything, given, under="input")  # what the type does not look at must be JSON too
        decoder = self._decoders.get(agent.name)
        if decoder is None:
            decoder = self._decoders[agent.name] = msgspec.json.Decoder(agent.input_type)
        decoded(decoder, given, under="input")
        return given.decode()

    def _webhook(self, url: str) -> str:
        if url and not self._takes_webhooks:
            raise BadRequest(
                "No webhook was kept: `webhooks.secret` is not set, so nothing could be signed. Set it, or leave the "
                "webhook out and follow the events of the task.",
                where="webhook",
            )
        return _address(url)

    def _times(self, wanted: Wanted) -> tuple[datetime | None, datetime | None]:
        if wanted.run_at is None and wanted.deadline is None:
            return None, None
        now = self._wall()
        for name, at in (("run_at", wanted.run_at), ("deadline", wanted.deadline)):
            if at is not None and at.tzinfo is None:
                raise BadRequest(f"{name} had no time zone. Write it like `2026-01-31T08:00:00Z`.", where=name)
            if at is not None and at - now > MAX_AHEAD:
                raise BadRequest(f"{name} was more than {MAX_AHEAD.days} days ahead.", where=name)
        run_at = wanted.run_at if wanted.run_at is not None and wanted.run_at > now else None
        if wanted.deadline is not None and wanted.deadline <= (run_at or now):
            raise BadRequest("deadline was over before the task could begin. Give a later one.", where="deadline")
        return run_at, wanted.deadline


def _priority(wanted: Priority | None, by: Submitter) -> Priority:
    if wanted is None:
        return by.priority
    return wanted if by.may_rise else max(wanted, by.priority)


def _key(key: str) -> str:
    if len(key) > MAX_KEY_CHARACTERS or not key.isprintable():
        raise BadRequest(
            f"idempotency_key was not up to {MAX_KEY_CHARACTERS} printable characters.", where="idempotency_key"
        )
    return key


def _ids(name: str, ids: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    if len(ids) > MAX_AFTER:
        raise BadRequest(f"{name} named more than {MAX_AFTER} tasks.", where=name)
    for one in ids:
        if not is_task_id(one):
            raise BadRequest(f"`{name}` named {one[:64]!r}, which is no task here.", where=name)
    return tuple(dict.fromkeys(ids))


def _address(url: str) -> str:
    """The address as it is; whether it may be asked is decided when it is asked, by what its name means then."""
    if not url:
        return ""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_good = False
    if not is_good or len(url) > MAX_URL_CHARACTERS or not (url.isascii() and url.isprintable()) or " " in url:
        raise BadRequest("webhook was no address like `https://example.org/done`.", where="webhook")
    return url


def _bounded(name: str, given: float | None, lowest: float, highest: float, *, default: float) -> float:
    if given is None:
        return default
    if not lowest <= given <= highest:
        raise BadRequest(f"{name} was not from {lowest:g} to {highest:,.15g}.", where=name)
    return given
