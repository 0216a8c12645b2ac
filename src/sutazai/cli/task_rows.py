"""Tasks as the command line knows them: what the gateway tells of one, tables, and pages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from urllib.parse import quote, urlencode

import msgspec
from rich.text import Text

from sutazai.cli.client import GatewayClient
from sutazai.cli.printing import Cell

PATH = "/v1/tasks"
PAGE = 100
HEADS = ("TASK", "AGENT", "STATUS", "FAILURES", "CREATED", "ENDED", "WHY")
STYLES = {"completed": "green", "failed": "bold red", "processing": "cyan"}
MAX_WHY = 80


class TaskRow(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown of one task; the gateway tells more."""

    id: str
    agent: str
    status: str
    failed_attempts: int
    created_at: datetime
    ended_at: datetime | None = None
    reason: str | None = None
    error: str | None = None
    result: msgspec.Raw = msgspec.Raw(b"null")


class TaskPage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `GET /v1/tasks`."""

    data: tuple[msgspec.Raw, ...]
    has_more: bool
    last_id: str | None


_row = msgspec.json.Decoder(TaskRow)


def path_of(task: str) -> str:
    """The address of a task, whatever the user typed."""
    return f"{PATH}/{quote(task, safe='')}"


async def found(client: GatewayClient, limit: int, **which: str | None) -> AsyncIterator[msgspec.Raw]:
    """At most so many tasks, newest first, as the gateway tells them; page after page."""
    wanted = {name: value for name, value in which.items() if value}
    while limit > 0:
        query = urlencode(wanted | {"limit": min(limit, PAGE)})
        page = await client.ask("GET", f"{PATH}?{query}", shape=TaskPage)
        for one in page.data:
            yield one
        limit -= len(page.data)
        if not page.has_more or not page.last_id:
            return
        wanted["after"] = page.last_id


def rows(tasks: Sequence[msgspec.Raw]) -> list[list[Cell]]:
    """The rows of the table."""
    return [cells(_row.decode(task)) for task in tasks]


def cells(task: TaskRow) -> list[Cell]:
    """One row."""
    why = " ".join(part for part in (f"{task.reason}:" if task.reason else "", task.error or "") if part)
    return [
        task.id,
        task.agent,
        Text(task.status, style=STYLES.get(task.status, "")),
        str(task.failed_attempts),
        moment(task.created_at),
        moment(task.ended_at),
        why if len(why) <= MAX_WHY else f"{why[:MAX_WHY]}…",
    ]


def moment(at: datetime | None) -> str:
    """A time to the second; empty where there is none."""
    return "" if at is None else at.isoformat(timespec="seconds").replace("+00:00", "Z")
