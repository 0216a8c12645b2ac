"""
How a batch job under way is called off, so that what was answered still becomes files.

Word is left under the id of its task. The batch job and its chunks look for it; chunks are also cancelled, and when
all have ended, the batch job goes on as ever and writes its files. Whoever dies on the way leaves the word behind.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from sutazai.agents.batch_shapes import BATCH_CHUNK
from sutazai.core.task import Task
from sutazai.ports.agent import AgentContext
from sutazai.ports.messages import MessageStore
from sutazai.ports.tasks import TaskFilter, TaskStore

MAX_CHUNKS = 1000


class _Word(Struct, frozen=True):
    """What is left."""

    cancelling_at: int
    """Unix seconds."""


async def call_off(tasks: TaskStore, messages: MessageStore, job: Task, *, by: str, at: int) -> None:
    """Leave word, once, and cancel the chunks that have not ended. May be repeated."""
    tenant = job.draft.tenant
    if await asked_at(messages, job) is None:
        await messages.send(tenant, job.id, sender=by, body=msgspec.json.encode(_Word(at)).decode())
    for chunk in await tasks.page(tenant, TaskFilter(agent=BATCH_CHUNK, parent=job.id), limit=MAX_CHUNKS):
        if not chunk.status.is_end:
            await tasks.cancel(tenant, chunk.id)


async def asked_at(messages: MessageStore, job: Task) -> int | None:
    """When the batch job was first called off, in Unix seconds; None where it was not."""
    left = await messages.received(job.draft.tenant, job.id, after=0)
    return next((at for _, body in left if (at := _time_in(msgspec.json.decode(body))) is not None), None)


async def called_off_at(context: AgentContext, job: str) -> int | None:
    """The same for the agents."""
    left = await context.received(job)
    return next((at for _, body in left if (at := _time_in(body)) is not None), None)


def _time_in(body: Any) -> int | None:
    """None for what another agent sent to this name."""
    try:
        return msgspec.convert(body, _Word).cancelling_at
    except msgspec.ValidationError:
        return None
