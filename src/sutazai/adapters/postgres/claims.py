"""Word of new tasks that consumers of this process hold from the start, so that nobody has to be woken to take it."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import asyncpg

from sutazai.adapters.postgres.queue import PostgresConsumer, PostgresQueue
from sutazai.core.task import Task, TaskStatus, id_of
from sutazai.ports.queue import Message


class Claims:
    """Those of one transaction. Once it has ended, `keep` or `drop` is called."""

    def __init__(self, queue: PostgresQueue | None) -> None:
        """
        Nothing is claimed yet.

        Args:
            queue: whose consumers may claim.
        """
        self._queue = queue
        self._claimed: list[tuple[PostgresConsumer, uuid.UUID | None, int, dict[int, Message]]] = []

    def claim(self, tasks: Iterable[Task], now: datetime) -> Mapping[str, uuid.UUID | None]:
        """For each queue of tasks that may be started now the consumer that gets them, where one is idle."""
        if self._queue is None:
            return {}
        due = Counter(task.draft.queue for task in tasks if task.status is TaskStatus.PENDING and task.run_at <= now)
        consumers = {}
        for queue, count in due.items():
            consumer = self._queue.idle(queue, count)
            if consumer is not None:
                consumers[queue] = consumer.expect(count)
                self._claimed.append((consumer, consumers[queue], count, {}))
        return consumers

    def written(self, rows: Sequence[asyncpg.Record], tasks: Sequence[Task]) -> None:
        """The rows that were claimed; they hold once the transaction is committed."""
        claimed = {consumer.queue: messages for consumer, _, _, messages in self._claimed}
        by_id = {task.id: task for task in tasks} if rows else {}
        for row in rows:
            if row["id"] is not None:
                message = word_of(by_id[id_of(row["task"])])
                claimed[message.queue][row["id"]] = message

    def keep(self) -> None:
        """It was committed."""
        for consumer, known_as, count, messages in self._claimed:
            consumer.receive(known_as, messages, expected=count)

    def drop(self) -> None:
        """It was not, or nobody knows."""
        for consumer, _, count, _ in self._claimed:
            consumer.doubt(expected=count)


def word_of(task: Task) -> Message:
    """Word that it may be started."""
    draft = task.draft
    return Message(task=task.id, queue=draft.queue, tenant=draft.tenant, agent=draft.agent, priority=draft.priority)
