"""`sutazai nodes`: the pool as the gateway sees it, once or live."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import cyclopts
import msgspec
from rich.console import Group
from rich.live import Live
from rich.text import Text

from sutazai.cli.client import GatewayClient, Url, run
from sutazai.cli.printing import Cell, console, print_json, print_table, table
from sutazai.core.errors import NodeUnreachable

app = cyclopts.App(name="nodes")
app.command(
    "sutazai.cli.nodes_tune:tune",
    name="tune",
    help="Measure how a node is fastest.\n\nExample: `sutazai nodes tune sutazai-trial --save`",
)

PATH = "/admin/nodes"
REFRESH_S = 1.0
HEADS = ("NODE", "KIND", "HEALTH", "IN FLIGHT", "LOAD", "MODELS (* LOADED)", "LAST ERROR")
STYLES = {"up": "green", "down": "bold red"}


class NodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown of one node; the gateway tells more."""

    name: str
    kind: str
    health: str
    in_flight: int
    slots: int
    load: float
    """1.0 is a full node."""
    last_error: str
    models: tuple[str, ...]
    loaded: tuple[str, ...] | None
    """None where the node holds in memory all that it lists."""


class Nodes(msgspec.Struct, frozen=True):
    """The answer of `/admin/nodes`."""

    nodes: tuple[NodeRow, ...]


@app.default
def nodes(
    *,
    watch: Annotated[bool, cyclopts.Parameter(name=("--watch", "-w"), negative="")] = False,
    json: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    url: Url = None,
) -> int:
    """
    Print the nodes of the pool, how busy they are and what they have.

    Needs an admin key where keys are needed. Examples: `sutazai nodes`, `sutazai nodes --watch`

    Parameters
    ----------
    watch
        Go on until Ctrl-C, with new figures each second. Prints once where the output is no terminal.
    json
        Print JSON, once, with all that the gateway knows.
    """

    async def work(client: GatewayClient) -> int:
        if json:
            print_json(await client.fetch("GET", PATH))
        elif watch and sys.stdout.isatty():
            await _watch(client)
        else:
            print_table(HEADS, cells(await client.ask("GET", PATH, shape=Nodes)))
        return 0

    return run(work, url)


def cells(found: Nodes) -> list[list[Cell]]:
    """The rows of the table."""
    return [
        [
            node.name,
            node.kind,
            Text(node.health, style=STYLES.get(node.health, "yellow")),
            f"{node.in_flight}/{node.slots}",
            f"{node.load:.2f}",
            ", ".join(_marked(node)),
            node.last_error,
        ]
        for node in found.nodes
    ]


def _marked(node: NodeRow) -> list[str]:
    """The models in Ollama's short form, with a star on those that are in memory."""
    loaded = node.models if node.loaded is None else node.loaded
    return [model.removesuffix(":latest") + "*" * (model in loaded) for model in node.models]


async def _watch(client: GatewayClient) -> None:
    """Until cancelled; a gateway that is away for a moment leaves the last figures standing."""
    newest = table(HEADS, cells(await client.ask("GET", PATH, shape=Nodes)))
    with Live(newest, console=console(), auto_refresh=False) as live:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                newest = table(HEADS, cells(await client.ask("GET", PATH, shape=Nodes)))
                live.update(newest, refresh=True)
            except NodeUnreachable as error:
                live.update(Group(newest, Text(error.message, style="yellow")), refresh=True)
