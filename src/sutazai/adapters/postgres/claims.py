"""Word of new tasks that consumers of this process hold from the start, so that nobody has to be woken to take it."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import asyncpg

from sutazai.adapters.postgres.queue import PostgresConsumer, PostgresQueue
from sutazai.core.task import Task, TaskStatus, id_of
from sutazai.ports.queue import Message


@dataclass(frozen=True, slots=True)
class _Claim:
    consumer: PostgresConsumer
    known_as: uuid.UUID | None
    """What the rows name as their consumer."""
    expected: int
    messages: dict[int, Message] = field(default_factory=dict)
    """By the numbers of their rows, once these are written."""


class Claims:
    """Those of one transaction. Once it has ended, `keep` or `drop` is called."""

    def __init__(self, queue: PostgresQueue | None) -> None:
        """
        Nothing is claimed yet.

        Args:
            queue: whose consumers may claim.
        """
        self._queue = queue
        self._claims: list[_Claim] = []

    def claim(self, tasks: Iterable[Task], now: datetime) -> Mapping[str, uuid.UUID | None]:
        """For each queue of tasks that may be started now the consumer that gets them, where one is idle."""
        if self._queue is None:
            return {}
        due = Counter(task.draft.queue for task in tasks if task.status is TaskStatus.PENDING and task.run_at <= now)
        made = []
        for queue, count in due.items():
            consumer = self._queue.idle(queue, count)
            if consumer is not None:
                made.append(_Claim(consumer, consumer.expect(count), count))
        self._claims += made
        return {claim.consumer.queue: claim.known_as for claim in made}

    def written(self, rows: Sequence[asyncpg.Record], tasks: Sequence[Task]) -> None:
        """The rows that were claimed; they hold once the transaction is committed."""
        by_queue = {claim.consumer.queue: claim for claim in self._claims}
        by_id = {task.id: task for task in tasks}
        for row in rows:
            if row["id"] is not None:
                message = word_of(by_id[id_of(row["task"])])
                by_queue[message.queue].messages[row["id"]] = message

    def keep(self) -> None:
        """It was committed."""
        for claim in self._claims:
            claim.consumer.receive(claim.known_as, claim.messages, expected=claim.expected)

    def drop(self) -> None:
        """It was not, or nobody knows."""
        for claim in self._claims:
            claim.consumer.doubt(expected=claim.expected)


def word_of(task: Task) -> Message:
    """Word that it may be started."""
    draft = task.draft
    return Message(task=task.id, queue=draft.queue, tenant=draft.tenant, agent=draft.agent, priority=draft.priority)
