"""Tasks as rows and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import asyncpg
import msgspec

from sutazai.adapters.postgres.database import Connection, Database
from sutazai.core.mark import Mark
from sutazai.core.task import (
    Event,
    FailureReason,
    Task,
    TaskDraft,
    TaskStatus,
    created_at_of,
    digits_of,
    id_of,
    is_task_id,
)
from sutazai.ports.task_events import KeptEvent, encode

Columns = list[list[Any]]
"""Arrays for `unnest`, one a column. Ids are given as their digits, which the driver reads faster than a UUID."""

_draft = msgspec.json.Decoder(TaskDraft)
_encoder = msgspec.json.Encoder()


def task_of(row: asyncpg.Record) -> Task:
    """The task in a row."""
    return Task(
        id=id_of(row["id"]),
        draft=_draft.decode(row["draft"]),
        version=row["version"],
        status=TaskStatus(row["status"]),
        created_at=row["created_at"],
        run_at=row["run_at"],
        attempts=row["attempts"],
        deliveries=row["deliveries"],
        losses=row["losses"],
        waits_for=row["waits_for"],
        worker=row["worker"],
        is_cancelling=row["is_cancelling"],
        result=row["result"],
        result_object=row["result_object"],
        progress=row["progress"],
        checkpoint=row["checkpoint"],
        reason=None if row["reason"] is None else FailureReason(row["reason"]),
        error=row["error"],
        tokens=row["tokens"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
    )


def event_of(row: asyncpg.Record) -> KeptEvent:
    """The event in a row."""
    return KeptEvent(**{**row, "task": id_of(row["task"])})


def new_rows(tasks: Sequence[Task]) -> Columns:
    """For `submit_tasks`."""
    drafts = [task.draft for task in tasks]
    return [
        [digits_of(task.id) for task in tasks],
        [draft.tenant for draft in drafts],
        [draft.user for draft in drafts],
        [draft.agent for draft in drafts],
        [draft.queue for draft in drafts],
        [draft.priority.value for draft in drafts],
        [digits_of(draft.parent) if draft.parent else None for draft in drafts],
        [_encoder.encode(draft).decode() for draft in drafts],
        [task.waits_for for task in tasks],
        [draft.run_at for draft in drafts],
        [draft.deadline for draft in drafts],
    ]


_MAY_STAY: tuple[Callable[[Task], Any], ...] = (
    attrgetter("run_at"),
    attrgetter("attempts"),
    attrgetter("deliveries"),
    attrgetter("losses"),
    attrgetter("waits_for"),
    attrgetter("worker"),
    attrgetter("is_cancelling"),
    attrgetter("result"),
    attrgetter("result_object"),
    attrgetter("progress"),
    attrgetter("checkpoint"),
    lambda task: None if task.reason is None else task.reason.value,
    attrgetter("error"),
    attrgetter("tokens"),
    attrgetter("started_at"),
    attrgetter("ended_at"),
)
"""Columns of `change_tasks` that are as they were after most changes, in its order."""


def changed_rows(tasks: Sequence[Task], before: Sequence[Task]) -> Columns:
    """For `change_tasks`; a column that is in no row different from before is empty."""
    columns: Columns = [
        [digits_of(task.id) for task in tasks],
        [task.created_at for task in tasks],
        [task.version for task in tasks],
        [task.status.value for task in tasks],
    ]
    for value in _MAY_STAY:
        column = list(map(value, tasks))
        columns.append([] if column == list(map(value, before)) else column)
    return columns


def event_rows(events: Sequence[tuple[Task, Event]]) -> Columns:
    """For `change_tasks` and `add_events`: whose they are, of which kind, and what they tell."""
    encoded = [encode(event) for _, event in events]
    return [
        [task.draft.tenant for task, _ in events],
        [kind for kind, _, _ in encoded],
        [schema for _, schema, _ in encoded],
        [data for _, _, data in encoded],
    ]


def keys(ids: Sequence[str]) -> Columns:
    """The columns that find tasks; ids that are none are left out."""
    found = [task_id for task_id in ids if is_task_id(task_id)]
    return [[digits_of(task_id) for task_id in found], [created_at_of(task_id) for task_id in found]]


async def read(database: Database, tenant: str, ids: Sequence[str], *, seen: Mark | None = None) -> Sequence[Task]:
    """Those of the tenant."""
    rows = await database.rows(database.sql["tasks_by_id"], tenant, *keys(ids), tenant=tenant, seen=seen)
    return [task_of(row) for row in rows]


async def read_in(connection: Connection, database: Database, tenant: str | None, ids: Sequence[str]) -> Sequence[Task]:
    """Those of the tenant, or of any, within a transaction."""
    rows = await connection.fetch(database.sql["tasks_by_id"], tenant, *keys(ids))
    return [task_of(row) for row in rows]
