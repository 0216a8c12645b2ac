"""
Results of tasks: small ones are in the row and the event, large ones are objects of their tenant.

An object is written before the event that names it. Where the attempt dies in between, nothing names what it wrote; a
later attempt that completes the task deletes it. The name holds the attempt and the digest, so that of two attempts
neither writes over the other, and what is read back is known to be what was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from typing import Any

import msgspec

from sutazai.core.errors import NotFound, StoreUnavailable
from sutazai.core.task import Completed, Task, uuid_of
from sutazai.ports.objects import ObjectStore, object_name

MAX_RESULT_BYTES = 16 * 2**20
FOLDER = "results"
LEFT_AT_ONCE = 100
"""Objects of earlier attempts that are looked for."""


class Results:
    """Writes results and reads them back."""

    def __init__(self, objects: ObjectStore, *, max_inline_bytes: int) -> None:
        """
        Make it.

        Args:
            max_inline_bytes: larger results become objects.
        """
        self._objects = objects
        self._max_inline_bytes = max_inline_bytes

    async def completed(self, task: Task, output: Any, *, tokens: int) -> Completed:
        """
        The end of the attempt under way, its result kept where that is large.

        Raises `ValueError` for one that is too large, and what `ObjectStore.put` does. Cancelled, it may leave an
        object that nothing names.
        """
        content = msgspec.json.encode(output)
        fence = task.deliveries
        if len(content) > MAX_RESULT_BYTES:
            raise ValueError(f"the result had {len(content):,} bytes, and at most {MAX_RESULT_BYTES:,} are kept")
        if fence > 1:
            await self._forget_earlier(task)
        if len(content) <= self._max_inline_bytes:
            return Completed(fence, content.decode(), tokens=tokens)
        name = _name(task, f"{fence}-{sha256(content).hexdigest()}")
        await self._objects.put(name, content)
        return Completed(fence, "", result_object=name, result_bytes=len(content), tokens=tokens)

    async def whole(self, task: Task) -> Task:
        """The task with its result, wherever that is. Raises `StoreUnavailable`, also where it is lost."""
        if not task.result_object:
            return task
        try:
            content = await self._objects.get(task.result_object)
        except NotFound as error:
            raise StoreUnavailable(
                f"The result of {task.id} was not in the object store here. Give gateways and workers the same "
                "`objects.url`, or bring the object back from a backup."
            ) from error
        if sha256(content).hexdigest() != task.result_object.rpartition("-")[2]:
            raise StoreUnavailable(
                f"The result of {task.id} was not what was written: its digest differs. Bring the object "
                f"{task.result_object} back from a backup."
            )
        return replace(task, result=content.decode())

    async def several(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """The same for several, one after the other."""
        return [await self.whole(task) for task in tasks]

    async def _forget_earlier(self, task: Task) -> None:
        """
        Delete what attempts before this one wrote.

        No event names it: a later attempt began, so none of them completed the task, and none of them can any more.
        """
        with suppress(StoreUnavailable):
            for name in await self._objects.list(_name(task), limit=LEFT_AT_ONCE):
                fence, _, _ = name.rpartition("/")[2].partition("-")
                if int(fence) < task.deliveries:
                    await self._objects.delete(name)


def _name(task: Task, *part: str) -> str:
    """Where the objects of a task are, or one of them."""
    return object_name(task.draft.tenant, FOLDER, uuid_of(task.id).hex, *part)
