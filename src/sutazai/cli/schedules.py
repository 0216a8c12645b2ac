"""`sutazai schedules`: tasks that are submitted again and again."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Annotated, Literal
from urllib.parse import quote, urlencode

import cyclopts
import msgspec

from sutazai.cli.client import GatewayClient, Url, run
from sutazai.cli.printing import print_json, print_table
from sutazai.cli.task_rows import PAGE, moment
from sutazai.cli.tasks import json_input
from sutazai.core.errors import BadRequest

app = cyclopts.App(
    name="schedules",
    help="""Submit tasks again and again.

Example: `sutazai schedules add '30 4 * * *' research '{"question": "..."}' --timezone Europe/Berlin`""",
)

Json = Annotated[bool, cyclopts.Parameter(negative="")]
PATH = "/v1/schedules"
HEADS = ("SCHEDULE", "CRON", "TIME ZONE", "AGENT", "NEXT", "LAST", "LAST TASK OR ERROR")


class ScheduleRow(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown of one schedule; the gateway tells more."""

    id: str
    cron: str
    timezone: str
    agent: str
    due_at: datetime
    last_due_at: datetime | None = None
    last_task: str | None = None
    last_error: str | None = None


class SchedulePage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `GET /v1/schedules`."""

    data: tuple[msgspec.Raw, ...]
    has_more: bool
    last_id: str | None


@app.command(name="list")
def list_(*, json: Json = False, url: Url = None) -> int:
    """
    Print all schedules, when each is due next, and what came of its last time.

    Example: `sutazai schedules list`

    Parameters
    ----------
    json
        Print JSON.
    """

    async def work(client: GatewayClient) -> int:
        found: list[msgspec.Raw] = []
        query = {"limit": str(PAGE)}
        while True:
            page = await client.ask("GET", f"{PATH}?{urlencode(query)}", shape=SchedulePage)
            found += page.data
            if not page.has_more or not page.last_id:
                break
            query["after"] = page.last_id
        if json:
            print_json(found)
        else:
            print_table(HEADS, [_cells(msgspec.json.decode(one, type=ScheduleRow)) for one in found])
        return 0

    return run(work, url)


@app.command
def add(
    cron: str,
    agent: str,
    input: Annotated[str, cyclopts.Parameter(allow_leading_hyphen=True)] = "{}",  # noqa: A002 - the word of the API
    /,
    *,
    timezone: str = "UTC",
    priority: Literal["high", "normal", "low"] | None = None,
    webhook: str | None = None,
    json: Json = False,
    url: Url = None,
) -> int:
    """
    Add a schedule and print its id.

    What was missed while no gateway ran is made up for by its latest time alone.

    Example: `sutazai schedules add '*/10 8-18 * * MON-FRI' summarize '{"text": "..."}' --timezone Europe/Berlin`

    Parameters
    ----------
    cron
        Minute, hour, day of the month, month, day of the week.
    agent
        Who is to do it.
    input
        JSON for the agent; `-` reads it from standard input.
    timezone
        What the times mean.
    priority
        high, normal or low.
    webhook
        An address that is told the end of each task.
    json
        Print the whole schedule as JSON.
    """

    async def work(client: GatewayClient) -> int:
        given = {
            "cron": cron,
            "timezone": timezone,
            "agent": agent,
            "input": json_input(input),
            "priority": priority,
            "webhook": webhook,
        }
        body = await client.fetch("POST", PATH, {name: value for name, value in given.items() if value is not None})
        if json:
            print_json(body)
        else:
            made = msgspec.json.decode(body, type=ScheduleRow)
            sys.stdout.write(f"{made.id}\n")
            sys.stderr.write(f"It is due at {moment(made.due_at)} for the first time.\n")
        return 0

    return run(work, url)


@app.command
def delete(*schedules: str, url: Url = None) -> int:
    """
    Delete schedules; tasks that they made stay.

    Example: `sutazai schedules delete sched_5f3c...`

    Parameters
    ----------
    schedules
        Their ids.
    """

    async def work(client: GatewayClient) -> int:
        if not schedules:
            raise BadRequest("Give the id of a schedule; `sutazai schedules list` shows them.")
        for schedule in schedules:
            await client.fetch("DELETE", f"{PATH}/{quote(schedule, safe='')}")
            sys.stdout.write(f"{schedule} is deleted.\n")
        return 0

    return run(work, url)


def _cells(row: ScheduleRow) -> list[str]:
    came = row.last_error or row.last_task or ""
    return [row.id, row.cron, row.timezone, row.agent, moment(row.due_at), moment(row.last_due_at), came]
