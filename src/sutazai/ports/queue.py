"""
Where a task waits to be started.

A queue carries word of tasks, not the tasks: those are in the `TaskStore`, and a message that comes twice, or for a
task that has ended, does no harm. What a queue must never do is lose one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import msgspec

from sutazai.core.request import Priority


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Word of a task that may be started."""

    task: str
    """Its id; empty where the message was unreadable."""
    queue: str
    tenant: str
    agent: str
    priority: Priority = Priority.NORMAL


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """A message in the hands of one consumer, until it is acknowledged or handed back."""

    message: Message
    tag: object
    """What the queue knows it by."""
    is_redelivered: bool
    """It was delivered before, to a consumer that is gone or handed it back."""
    count: int = 0
    """How often it was delivered before without an acknowledgement, where the queue knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """How one queue stands; None where that kind of queue does not tell."""

    name: str
    kind: str
    """`table`, `quorum`, `classic` or `stream`."""
    waiting: int
    """Messages with no consumer, and of a stream those that it keeps."""
    held: int | None = None
    """Messages with consumers."""
    later: int | None = None
    """Messages whose time has not come."""
    consumers: int


class Consumer(Protocol):
    """
    One reader of one queue.

    Leaving the context that made it hands back what it holds. Methods raise `QueueUnavailable` when the broker is
    away; what was held may then be delivered to another.
    """

    async def take(self, at_most: int) -> Sequence[Delivery]:
        """Wait for at least one. Never more than are free of its `prefetch`. A cancellation loses none."""

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """They are dealt with. One that is not held any more is passed over: it went to another consumer."""

    async def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        """Give them to somebody else, at once."""

    async def hold(self, prefetch: int) -> None:
        """
        Hold so many at most from now on; with 0 nothing more comes.

        What has come already and was not taken is given to somebody else where it is too much. Those that were taken
        stay, and where they are more, nothing comes before they are fewer and this was called again.
        """


class Queue(Protocol):
    """Named queues of a broker."""

    async def put(self, messages: Sequence[Message]) -> Sequence[Message]:
        """
        Hand over; on return all are kept safely but those returned, which the queue was too full for.

        Raises `QueueUnavailable` where nobody can tell about some: put them again, twice does no harm.
        """

    def consume(self, queue: str, *, prefetch: int) -> AbstractAsyncContextManager[Consumer]:
        """
        Read a queue.

        Args:
            prefetch: deliveries held at once, at most.
        """

    async def depth(self, queue: str) -> int:
        """Messages that wait, about."""
