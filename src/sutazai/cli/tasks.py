"""`sutazai tasks`: submit work for agents, look at it, end it, try it again, and watch it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from typing import Annotated, Any, Literal, cast

import cyclopts
import msgspec

from sutazai.cli.client import REFUSED, GatewayClient, Url, run
from sutazai.cli.printing import complain, fitting, print_json, print_table
from sutazai.cli.task_rows import HEADS, PATH, TaskRow, found, moment, path_of, rows
from sutazai.core.errors import BadRequest, NodeFault, NodeRejected, NodeUnreachable

app = cyclopts.App(
    name="tasks",
    help="""Submit and watch the work of agents.

Example: `sutazai tasks list --status failed`""",
)

Json = Annotated[bool, cyclopts.Parameter(negative="")]
Status = Literal["waiting", "pending", "processing", "completed", "failed", "cancelled"]
MAX_LISTED = 10_000
IDLE_S = 60.0
"""The gateway gives signs of life far more often."""
COME_BACK_S = 1.0
MAX_RETURNS = 30
"""How often in a row a broken stream is taken up again without a new event."""


class TaskEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of the stream."""

    version: int
    kind: str
    at: datetime
    data: dict[str, Any]


_event = msgspec.json.Decoder(TaskEvent)
_ENDS = {"task.completed", "task.failed", "task.cancelled"}


@app.command
def submit(
    agent: str,
    input: Annotated[str, cyclopts.Parameter(allow_leading_hyphen=True)] = "{}",  # noqa: A002 - the word of the API
    /,
    *,
    priority: Literal["high", "normal", "low"] | None = None,
    run_at: str | None = None,
    deadline: str | None = None,
    idempotency_key: str | None = None,
    parent: str | None = None,
    after: tuple[str, ...] = (),
    webhook: str | None = None,
    max_attempts: int | None = None,
    time_limit_s: float | None = None,
    budget_tokens: int | None = None,
    wait: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    json: Json = False,
    url: Url = None,
) -> int:
    """
    Submit a task and print its id.

    Examples: `sutazai tasks submit summarize '{"text": "..."}' --wait`,
    `sutazai tasks submit research - --priority low < question.json`

    Parameters
    ----------
    agent
        Who is to do it; `GET /v1/agents` lists them.
    input
        JSON for the agent; `-` reads it from standard input.
    priority
        high, normal or low.
    run_at
        Not before this time, like 2026-01-31T08:00:00Z.
    deadline
        Of no use after this time.
    idempotency_key
        Of two submissions with the same one only the first makes a task.
    parent
        The task that this one belongs to.
    after
        A task that must have completed before; give it once for each.
    webhook
        An address that is told when the task has ended.
    max_attempts
        How often it is tried.
    time_limit_s
        How long one attempt may take.
    budget_tokens
        Tokens that all its attempts together may take.
    wait
        Wait for the end and print the result. Exits with 1 where there is none.
    json
        Print the whole task as JSON.
    """

    async def work(client: GatewayClient) -> int:
        given = {
            "agent": agent,
            "input": json_input(input),
            "priority": priority,
            "run_at": run_at,
            "deadline": deadline,
            "idempotency_key": idempotency_key,
            "parent": parent,
            "after": after or None,
            "webhook": webhook,
            "max_attempts": max_attempts,
            "time_limit_s": time_limit_s,
            "budget_tokens": budget_tokens,
        }
        body = await client.fetch("POST", PATH, {name: value for name, value in given.items() if value is not None})
        task = msgspec.json.decode(body, type=TaskRow)
        if wait:
            return await _waited(client, task.id, json=json)
        if json:
            print_json(body)
        else:
            sys.stdout.write(f"{task.id}\n")
        return 0

    return run(work, url)


@app.command(name="list")
def list_(
    *,
    status: Status | None = None,
    agent: str | None = None,
    parent: str | None = None,
    after: str | None = None,
    limit: int = 50,
    json: Json = False,
    url: Url = None,
) -> int:
    """
    Print tasks, newest first.

    Examples: `sutazai tasks list`, `sutazai tasks list --status failed --agent summarize --json`

    Parameters
    ----------
    status
        Only tasks that stand so.
    agent
        Only those of this agent.
    parent
        Only the children of this task.
    after
        Only older ones than this task: the rest of an earlier list.
    limit
        How many at most.
    json
        Print JSON.
    """

    async def work(client: GatewayClient) -> int:
        if not 1 <= limit <= MAX_LISTED:
            raise BadRequest(f"The limit was {limit}. Give a number from 1 to {MAX_LISTED}.")
        tasks = [one async for one in found(client, limit, status=status, agent=agent, parent=parent, after=after)]
        if json:
            print_json(tasks)
        else:
            print_table(HEADS, rows(tasks))
        return 0

    return run(work, url)


@app.command
def show(task: str, /, *, json: Json = False, url: Url = None) -> int:
    """
    Print all that is known of a task.

    Example: `sutazai tasks show task_019b...`

    Parameters
    ----------
    task
        Its id.
    json
        Print JSON.
    """

    async def work(client: GatewayClient) -> int:
        body = await client.fetch("GET", path_of(task))
        if json:
            print_json(body)
            return 0
        for name, value in msgspec.json.decode(body, type=dict[str, msgspec.Raw]).items():
            text = bytes(value).decode()
            if text != "null" and name != "object":
                sys.stdout.write(fitting(f"{name:<16} {_plain(text)}\n", sys.stdout))
        return 0

    return run(work, url)


@app.command
def cancel(*tasks: str, url: Url = None) -> int:
    """
    End tasks that wait, and ask those that run to end.

    Example: `sutazai tasks cancel task_019b...`

    Parameters
    ----------
    tasks
        Their ids.
    """

    async def work(client: GatewayClient) -> int:
        _some(tasks)
        for task in tasks:
            now = await client.ask("DELETE", path_of(task), shape=TaskRow)
            told = "is asked to end" if now.status == "processing" else f"is {now.status}"
            sys.stdout.write(f"{now.id} {told}.\n")
        return 0

    return run(work, url)


@app.command
def retry(*tasks: str, url: Url = None) -> int:
    """
    Give failed or cancelled tasks all their attempts again.

    Example: `sutazai tasks retry task_019b...`

    Parameters
    ----------
    tasks
        Their ids.
    """

    async def work(client: GatewayClient) -> int:
        _some(tasks)
        for task in tasks:
            now = await client.ask("POST", f"{path_of(task)}/retry", shape=TaskRow)
            sys.stdout.write(f"{now.id} is {now.status}.\n")
        return 0

    return run(work, url)


@app.command
def tail(task: str, /, *, json: Json = False, url: Url = None) -> int:
    """
    Print what happens to a task, from its beginning to its end.

    Goes on where it was when the connection breaks. Exits with 1 where the task did not complete.

    Example: `sutazai tasks tail task_019b...`

    Parameters
    ----------
    task
        Its id.
    json
        Print each event as a line of JSON.
    """

    async def work(client: GatewayClient) -> int:
        last = ""
        async with aclosing(_events(client, task)) as events:
            async for event, line in events:
                last = event.kind
                data = msgspec.json.encode(event.data).decode()
                told = line.decode() if json else f"{moment(event.at)}   {event.kind}   {data}"
                sys.stdout.write(fitting(f"{told}\n", sys.stdout))
                sys.stdout.flush()
        return 0 if last == "task.completed" else REFUSED

    return run(work, url)


async def _events(client: GatewayClient, task: str) -> AsyncGenerator[tuple[TaskEvent, bytes], None]:
    """
    Every event of a task until it has ended, each with its JSON.

    A stream that breaks is taken up behind the last event; one that never began is an error.
    """
    seen, returns = 0, 0
    while True:
        try:
            async for event, line in _stream(client, task, seen):
                seen, returns = event.version, 0
                yield event, line
                is_end = event.kind in _ENDS
            if seen and is_end:
                return
        except NodeFault as error:
            is_lasting = isinstance(error, NodeRejected) and error.status < 500
            if is_lasting or not seen or returns >= MAX_RETURNS:
                raise
        returns += 1
        if returns > MAX_RETURNS:
            raise NodeUnreachable(f"The events of {task} broke off {returns} times.", node=client.url)
        await asyncio.sleep(COME_BACK_S)


async def _stream(client: GatewayClient, task: str, seen: int) -> AsyncGenerator[tuple[TaskEvent, bytes], None]:
    headers = [b"last-event-id: %d" % seen] if seen else []
    lines = client.lines(f"{path_of(task)}/events", None, idle_s=IDLE_S, method="GET", headers=headers)
    async with aclosing(lines):
        async for line in lines:
            if line.startswith(b"data: "):
                yield _event.decode(line[6:]), line[6:]


async def _waited(client: GatewayClient, task: str, *, json: bool) -> int:
    """Print the result once it is there."""
    async with aclosing(_events(client, task)) as events:
        async for _ in events:
            pass
    body = await client.fetch("GET", path_of(task))
    ended = msgspec.json.decode(body, type=TaskRow)
    if json:
        print_json(body)
    elif ended.status == "completed":
        print_json(bytes(ended.result))
    else:
        complain(f"{task} is {ended.status}: {ended.error or 'it was ended on request'}")
    return 0 if ended.status == "completed" else REFUSED


def json_input(given: str) -> msgspec.Raw:
    """JSON as it is, or for `-` what standard input holds. Raises `BadRequest` for what is none."""
    try:
        text = sys.stdin.read() if given == "-" else given
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise BadRequest(
            f'The input was no JSON: {error}. Quote it for the shell like \'{{"text": "hi"}}\'.'
        ) from error
    return msgspec.Raw(text.encode())


def _some(tasks: tuple[str, ...]) -> None:
    if not tasks:
        raise BadRequest("Give the id of a task; `sutazai tasks list` shows them.")


def _plain(text: str) -> str:
    """A string without its quotes, anything else as JSON."""
    return cast("str", msgspec.json.decode(text)) if text.startswith('"') else text
