"""One attempt: an agent is run within its limits, and whatever comes of that becomes an event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import structlog

from sutazai.core.errors import BudgetSpent, SutazaiError
from sutazai.core.task import Cancelled, Event, FailureReason, Suspended
from sutazai.policy.tasks import on_failure
from sutazai.ports.agent import Agent, Pausing
from sutazai.ports.queue import Consumer, Delivery
from sutazai.tasks.context import Attempt, Surroundings
from sutazai.tasks.room import Room

log = structlog.get_logger("sutazai.tasks")

MAX_ERROR_CHARACTERS = 2000


@dataclass(slots=True, eq=False)
class Running:
    """An attempt under way."""

    delivery: Delivery
    consumer: Consumer
    attempt: Attempt
    room: Room
    began_at: float
    """By the clock of the loop."""
    handle: asyncio.Task[None] | None = None
    has_begun: bool = False
    is_called_off: bool = False
    """Its task is to be cancelled, or another attempt has followed."""
    leaves_with: Event | None = None
    """Its worker stops, and this is what becomes of the task."""

    def call_off(self) -> None:
        """End it; the store knows already that it does not count, or that it is to be cancelled."""
        self.is_called_off = True
        self._cancel()

    def hand_back(self, event: Event) -> None:
        """End it because the worker stops."""
        self.leaves_with = event
        self._cancel()

    @property
    def early_end(self) -> Event | None:
        """What becomes of the task where the attempt was ended from outside; None where it was not."""
        if self.leaves_with is not None:
            return self.leaves_with
        return Cancelled(self.attempt.fence, self.attempt.tokens) if self.is_called_off else None

    def _cancel(self) -> None:
        """One that has not begun finds its early end by itself; cancelled, it would never run to tell of it."""
        if self.handle is not None and self.has_begun:
            self.handle.cancel()


@dataclass(slots=True, eq=False)
class Ended:
    """An attempt that ended, and what that means for its task."""

    running: Running
    event: Event

    @property
    def task(self) -> str:
        """The id of its task."""
        return self.running.attempt.task.id


async def ended_of(running: Running, agent: Agent, around: Surroundings, random: Callable[[], float]) -> Event:
    """
    Run the agent to its end, and keep its result where that is large.

    Raises `CancelledError` where the attempt was cancelled; `Running.early_end` tells whether it alone was.
    """
    attempt = running.attempt
    task, fence = attempt.task, attempt.fence

    def failed(reason: FailureReason, why: str) -> Event:
        return on_failure(
            task, reason, why[:MAX_ERROR_CHARACTERS], tokens=attempt.tokens, now=around.wall(), random=random()
        )

    try:
        input_ = msgspec.json.decode(task.draft.input, type=agent.input_type)
    except msgspec.MsgspecError as error:
        return failed(FailureReason.UNREADABLE, f"The input was not what {agent.name} takes: {error}")
    try:
        async with asyncio.timeout(task.draft.time_limit_s) as limit:
            output = await agent.run(attempt, input_)
        return await around.results.completed(task, output, tokens=attempt.tokens)
    except Pausing:
        return Suspended(fence, len(attempt.waits_for), attempt.tokens)
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if current is None or current.cancelling():
            raise
        # From within: the agent waited for what was cancelled, or its checkpoint was refused because another attempt
        # has followed. Then the store refuses this end too, but the worker has its place back.
        return failed(FailureReason.ERROR, "A cancellation that nobody asked for came out of the agent.")
    except TimeoutError as error:
        if limit.expired():
            return failed(FailureReason.TIMED_OUT, f"It took longer than {task.draft.time_limit_s:g} s.")
        return failed(FailureReason.ERROR, _why(error))
    except BudgetSpent as error:
        return failed(FailureReason.BUDGET, error.message)
    except SutazaiError as error:
        return failed(FailureReason.ERROR, error.message)
    except Exception as error:  # the border of an attempt
        log.exception("agent failed", agent=agent.name, task=task.id)
        return failed(FailureReason.ERROR, _why(error))


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
