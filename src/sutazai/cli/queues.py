"""`sutazai queues`: the queues of tasks, in the database and at the broker."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import cyclopts
import msgspec

from sutazai.adapters.postgres.stores import open_stores
from sutazai.adapters.rabbitmq.queue import open_rabbitmq
from sutazai.adapters.rabbitmq.streams import Entry
from sutazai.adapters.rabbitmq.topology import KNOWN, STREAM
from sutazai.adapters.rabbitmq.topology import definitions as as_definitions
from sutazai.bootstrap.rules import log_form
from sutazai.cli.printing import complain, fitting, print_json, print_table
from sutazai.cli.stores import refuse, with_settings
from sutazai.core.errors import QueueUnavailable
from sutazai.ports.broadcasts import Unseen
from sutazai.ports.queue import QueueState
from sutazai.settings.model import Settings
from sutazai.telemetry.logs import configure

app = cyclopts.App(
    name="queues",
    help="""Show the queues of tasks, and print them for a broker.

Example: `sutazai queues list`""",
)

AT_ONCE = 100


@app.command(name="list")
def list_(*, json: Annotated[bool, cyclopts.Parameter(negative="")] = False) -> int:
    """
    Print each queue with what waits in it and who reads it.

    With RabbitMQ the table of the database comes before it: what waits there is on its way to the broker. Exits with 1
    where the broker is away, after the table was printed.

    Examples: `sutazai queues list`, `sutazai queues list --json`

    Parameters
    ----------
    json
        Print JSON.
    """

    async def work(settings: Settings, data_dir: Path) -> int:
        configure(form=log_form(settings), level="warning")
        async with open_stores(settings.database, data_dir, shards=settings.shards) as stores:
            states = list(await stores.queue.states())
        away = ""
        if settings.rabbitmq.url is not None:
            names = {*KNOWN, STREAM, *(state.name for state in states)}
            try:
                async with open_rabbitmq(settings.rabbitmq) as broker:
                    states += await broker.states(names)
            except QueueUnavailable as error:
                away = error.message
        if json:
            print_json(states)
        else:
            print_table(("QUEUE", "KIND", "WAITING", "HELD", "LATER", "CONSUMERS"), _rows(states))
        return refuse(away) if away else 0

    return with_settings(work)


@app.command
def definitions() -> int:
    """
    Print the queues as JSON that RabbitMQ imports.

    As the settings in `[rabbitmq]` say, for their virtual host. Users and permissions are not in it, so it holds no
    secret. Examples:

    `sutazai queues definitions > sutazai.json`, then `rabbitmqctl import_definitions sutazai.json`

    `sutazai queues definitions | ssh rabbit1 rabbitmqctl import_definitions`
    """

    async def work(settings: Settings, _: Path) -> int:
        sys.stdout.write(as_definitions(settings.rabbitmq).decode())
        return 0

    return with_settings(work)


@app.command
def tail(*, everything: Annotated[bool, cyclopts.Parameter(name="--all", negative="")] = False) -> int:
    """
    Print what the stream `agent_coordination` carries as lines of JSON, until Ctrl-C.

    These are events of tasks and messages of agents, of all tenants; doubles are passed over.

    Examples: `sutazai queues tail`, `sutazai queues tail --all | jq -c 'select(.tenant == "acme")'`

    Parameters
    ----------
    everything
        Begin with the oldest that the stream still has, and not with what comes from now on.
    """

    async def work(settings: Settings, _: Path) -> int:
        configure(form=log_form(settings), level="warning")
        if settings.rabbitmq.url is None:
            return refuse("Without `rabbitmq.url` there is no stream; `sutazai events tail` reads the database.")
        unseen = Unseen()
        since = 0 if everything else None
        async with open_rabbitmq(settings.rabbitmq) as broker, broker.events.read(since) as reader:
            while True:
                for entry in await reader.take(AT_ONCE):
                    sys.stdout.write(fitting(_told(unseen, entry), sys.stdout))
                sys.stdout.flush()

    with suppress(KeyboardInterrupt):
        return with_settings(work)
    return 0


def _told(unseen: Unseen, entry: Entry) -> str:
    try:
        return "".join(f"{msgspec.json.encode(notice).decode()}\n" for notice in unseen.notices_of(entry.body))
    except msgspec.DecodeError:
        complain(f"Entry {entry.offset} of the stream was none of ours.")
        return ""


def _rows(states: Sequence[QueueState]) -> list[list[str]]:
    return [
        [state.name, state.kind, *map(_shown, (state.waiting, state.held, state.later, state.consumers))]
        for state in states
    ]


def _shown(count: int | None) -> str:
    return "" if count is None else str(count)
