"""`sutazai dead-letters`: tasks that were given up."""

from __future__ import annotations

import sys
from typing import Annotated

import cyclopts
import msgspec

from sutazai.cli.client import REFUSED, GatewayClient, Url, run
from sutazai.cli.printing import complain, print_json, print_table
from sutazai.cli.task_rows import HEADS, TaskRow, found, path_of, rows
from sutazai.core.errors import BadRequest, NodeRejected

app = cyclopts.App(
    name="dead-letters",
    help="""Show tasks that were given up, and try them again.

Example: `sutazai dead-letters requeue --all --agent summarize`""",
)

MAX_AT_ONCE = 100_000
CONFLICT = 409


@app.command(name="list")
def list_(
    *,
    agent: str | None = None,
    limit: int = 50,
    json: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    url: Url = None,
) -> int:
    """
    Print tasks that were given up, newest first, and why.

    Example: `sutazai dead-letters list --agent summarize`

    Parameters
    ----------
    agent
        Only those of this agent.
    limit
        How many at most.
    json
        Print JSON.
    """

    async def work(client: GatewayClient) -> int:
        if not 1 <= limit <= MAX_AT_ONCE:
            raise BadRequest(f"The limit was {limit}. Give a number from 1 to {MAX_AT_ONCE}.")
        tasks = [one async for one in found(client, limit, status="failed", agent=agent)]
        if json:
            print_json(tasks)
        else:
            print_table(HEADS, rows(tasks))
        return 0

    return run(work, url)


@app.command
def requeue(
    *tasks: str,
    everything: Annotated[bool, cyclopts.Parameter(name="--all", negative="")] = False,
    agent: str | None = None,
    url: Url = None,
) -> int:
    """
    Give tasks that were given up all their attempts again.

    Examples: `sutazai dead-letters requeue task_019b...`, `sutazai dead-letters requeue --all --agent summarize`

    Parameters
    ----------
    tasks
        Their ids.
    everything
        All of the tenant, or those of `--agent`.
    agent
        With `--all`: only those of this agent.
    """

    async def work(client: GatewayClient) -> int:
        if bool(tasks) == everything or (agent and not everything):
            raise BadRequest("Give the ids of tasks, or else `--all`, with `--agent NAME` for those of one agent.")
        chosen = list(tasks)
        if everything:
            # Known before the first is tried again: what fails once more meanwhile is left alone.
            letters = [one async for one in found(client, MAX_AT_ONCE, status="failed", agent=agent)]
            chosen = [msgspec.json.decode(one, type=TaskRow).id for one in letters]
        done = 0
        for task in chosen:
            try:
                await client.fetch("POST", f"{path_of(task)}/retry")
                done += 1
            except NodeRejected as error:
                if error.status != CONFLICT:
                    raise
                complain(error.message)
        sys.stdout.write(f"{done} {'task is' if done == 1 else 'tasks are'} tried again.\n")
        return 0 if done == len(chosen) else REFUSED

    return run(work, url)
