"""A task's events as a stream of server-sent events, which ends with the task."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sutazai.core.errors import StoreUnavailable
from sutazai.core.mark import WRITTEN
from sutazai.core.task import Task
from sutazai.edge.task_shapes import told_event
from sutazai.ports.marks import Marks
from sutazai.ports.tasks import TaskStore
from sutazai.tasks.watch import Bell, Watch

EVENT_STREAM = b"text/event-stream; charset=utf-8"
AT_ONCE = 100
"""Events read in one query."""
COME_BACK_MS = 2000
"""When a client whose stream broke comes back."""
ENDS = frozenset({"task.completed", "task.failed", "task.cancelled"})
ALIVE = b": still here\n\n"
AWAY = b": the database is away; come back\n\n"


class EventReply(Response):
    """
    What happened to a task, and goes on to happen.

    Its bell hangs as long as the reply lasts, however that ends.
    """

    def __init__(
        self, task: Task, store: TaskStore, watch: Watch, marks: Marks, *, seen: int, keep_alive_s: float
    ) -> None:
        super().__init__()
        self._task = task
        self._store = store
        self._watch = watch
        self._marks = marks
        self._seen = seen
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises what happened before anything was said."""
        with self._watch.bell(self._task.id, seen=self._seen) as bell:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await _say(send, b"retry: %d\n\n" % COME_BACK_MS)
            try:
                while not await self._told(bell, send):
                    await self._wait(bell, send)
                if mark := await self._marks.newest(self._task.draft.tenant):
                    await _say(send, b": %b %b\n\n" % (WRITTEN.encode(), str(mark).encode()))
            except StoreUnavailable:
                await _say(send, AWAY)
            await send({"type": "http.response.body", "body": b""})

    async def _told(self, bell: Bell, send: Send) -> bool:
        """
        Tell all that is new; whether that was the end.

        Only the newest of all will do: a bell rings for what a copy may not have yet, and it does not ring again.
        """
        tenant = self._task.draft.tenant
        while True:
            events = await self._store.events(tenant, self._task.id, after=bell.version, limit=AT_ONCE)
            self._marks.note(tenant)  # who asks for the task next is told no less
            for event in events:
                await _say(
                    send, b"id: %d\nevent: %b\ndata: %b\n\n" % (event.version, event.kind.encode(), told_event(event))
                )
                bell.version = event.version
            if len(events) < AT_ONCE:
                return bool(events) and events[-1].kind in ENDS

    async def _wait(self, bell: Bell, send: Send) -> None:
        while True:
            try:
                async with asyncio.timeout(self._keep_alive_s):
                    return await bell.wait()
            except TimeoutError:
                await _say(send, ALIVE)


HEADERS: list[tuple[bytes, bytes]] = [
    (b"content-type", EVENT_STREAM),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


async def _say(send: Send, part: bytes) -> None:
    message: dict[str, Any] = {"type": "http.response.body", "body": part, "more_body": True}
    await send(message)
