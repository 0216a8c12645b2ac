"""`sutazai models`: what the pool has, and the keeping of it on all nodes at once."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated

import cyclopts
import msgspec

from sutazai.cli.client import GatewayClient, Url, run
from sutazai.cli.nodes import Nodes
from sutazai.cli.printing import print_json, print_table, size
from sutazai.cli.progress import PullRecord, shown_progress
from sutazai.core.errors import Forbidden, NodeRejected, NodeUnreachable

app = cyclopts.App(
    name="models",
    help="""List, fetch and remove models on all nodes of the pool.

Example: `sutazai models pull llama3.2`""",
)

PULL_IDLE_S = 180.0
"""An Ollama is silent for up to two minutes while it checks a large file."""
DELETE_S = 45.0
"""The gateway gives its nodes 30 s."""

Json = Annotated[bool, cyclopts.Parameter(negative="", help="Print JSON.")]


class Details(msgspec.Struct, frozen=True):
    """What a node knows of a model in a few words."""

    family: str | None = ""
    parameter_size: str | None = ""
    quantization_level: str | None = ""


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """A model of `/api/tags`."""

    name: str
    size: int = 0
    details: Details = Details()


class Tags(msgspec.Struct, frozen=True):
    """The answer of `/api/tags`."""

    models: tuple[Listed, ...]


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A model in the memory of one node, from `/api/ps`."""

    name: str
    node: str
    size: int = 0
    size_vram: int = 0
    context_length: int = 0
    expires_at: str = ""


class Running(msgspec.Struct, frozen=True):
    """The answer of `/api/ps`."""

    models: tuple[Loaded, ...]


class Shown(msgspec.Struct, frozen=True):
    """What is printed of the answer of `/api/show`."""

    details: Details = Details()
    model_info: dict[str, msgspec.Raw] = {}
    parameters: str = ""
    capabilities: tuple[str, ...] = ()


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A model of the pool, as `models list --json` prints it."""

    name: str
    size_bytes: int
    """0 where no node tells."""
    nodes: tuple[str, ...] | None
    """None where the key may not see them."""
    loaded_on: tuple[str, ...]


@app.command(name="list")
def list_(*, json: Json = False, url: Url = None) -> int:
    """
    Print the models that the pool offers, and where they are.

    The nodes are told to admin keys alone. Examples: `sutazai models list`, `sutazai models list --json`
    """

    async def work(client: GatewayClient) -> int:
        rows = await _rows(client)
        if json:
            print_json(rows)
        else:
            print_table(("NAME", "SIZE", "NODES", "LOADED ON"), [_cells(row) for row in rows])
        return 0

    return run(work, url)


@app.command
def ps(*, json: Json = False, url: Url = None) -> int:
    """
    Print the models that nodes hold in memory, and for how long.

    Examples: `sutazai models ps`, `sutazai models ps --json`
    """

    async def work(client: GatewayClient) -> int:
        running = await client.ask("GET", "/api/ps", shape=Running)
        if json:
            print_json(running.models)
        else:
            heads = ("NAME", "NODE", "SIZE", "IN GPU", "CONTEXT", "UNTIL")
            now = datetime.now(UTC)
            print_table(heads, [_running_cells(loaded, now) for loaded in running.models])
        return 0

    return run(work, url)


@app.command
def show(model: str, /, *, json: Json = False, url: Url = None) -> int:
    """
    Print what a node that has the model knows of it.

    Examples: `sutazai models show llama3.2`, `sutazai models show llama3.2 --json`

    Parameters
    ----------
    model
        As in `sutazai models list`.
    """

    async def work(client: GatewayClient) -> int:
        body = await client.fetch("POST", "/api/show", {"model": model})
        if json:
            print_json(body)
        else:
            print_table(("", model), facts(msgspec.json.decode(body, type=Shown)))
        return 0

    return run(work, url)


@app.command
def pull(model: str, /, *, insecure: bool = False, url: Url = None) -> int:
    """
    Fetch a model on every Ollama node at once.

    Ctrl-C stops it; what was fetched stays for the next time. Example: `sutazai models pull llama3.2`

    Parameters
    ----------
    model
        As the registry calls it.
    insecure
        Let the nodes use a registry without TLS.
    """

    async def work(client: GatewayClient) -> int:
        nodes = await _pull(client, model, insecure=insecure)
        sys.stdout.write(f"{model} is on {', '.join(nodes)}.\n")
        return 0

    return run(work, url)


@app.command(name="rm")
def remove(model: str, /, *more: str, url: Url = None) -> int:
    """
    Remove models from every node that has them.

    Stops at the first that could not be removed. Example: `sutazai models rm llama3.2 qwen2.5`

    Parameters
    ----------
    model
        As in `sutazai models list`.
    more
        Further models.
    """

    async def work(client: GatewayClient) -> int:
        for name in (model, *more):
            await client.fetch("DELETE", "/api/delete", {"model": name}, within_s=DELETE_S)
            sys.stdout.write(f"{name} was removed.\n")
        return 0

    return run(work, url)


async def _rows(client: GatewayClient) -> list[Row]:
    tags, running, places = await asyncio.gather(
        client.ask("GET", "/api/tags", shape=Tags),
        client.ask("GET", "/api/ps", shape=Running),
        _places(client),
    )
    return [
        Row(
            name=model.name,
            size_bytes=model.size,
            nodes=None if places is None else places.get(model.name, ()),
            loaded_on=tuple(loaded.node for loaded in running.models if loaded.name == model.name),
        )
        for model in tags.models
    ]


async def _places(client: GatewayClient) -> dict[str, tuple[str, ...]] | None:
    """The nodes of each model; None where the key may not see them."""
    try:
        found = await client.ask("GET", "/admin/nodes", shape=Nodes)
    except Forbidden:
        return None
    places: dict[str, tuple[str, ...]] = {}
    for node in found.nodes:
        for model in node.models if node.health == "up" else ():
            places[model] = (*places.get(model, ()), node.name)
    return places


async def _pull(client: GatewayClient, model: str, *, insecure: bool) -> Sequence[str]:
    """Follow the pull to its end; the nodes that took part. Raises `SutazaiError`."""
    nodes: Sequence[str] = ()
    wanted = {"model": model, "insecure": insecure, "stream": True}
    async with aclosing(client.lines("/api/pull", wanted, idle_s=PULL_IDLE_S)) as lines:
        with shown_progress() as note:
            async for line in lines:
                record = msgspec.json.decode(line, type=PullRecord)
                if record.error:
                    raise NodeRejected(record.error, node=client.url, status=502)
                if record.status == "success" and not record.nodes:
                    note(PullRecord(nodes=dict.fromkeys(nodes, "success")))
                    return nodes
                nodes = sorted(record.nodes)
                note(record)
    raise NodeUnreachable(
        f"The gateway at {client.url} broke off before {model} was complete. Pull it again; it goes on from there.",
        node=client.url,
    )


def _cells(row: Row) -> list[str]:
    return [row.name, size(row.size_bytes), ", ".join(row.nodes or ()), ", ".join(row.loaded_on)]


def _running_cells(loaded: Loaded, now: datetime) -> list[str]:
    share = f"{loaded.size_vram / loaded.size:.0%}" if loaded.size and loaded.size_vram else ""
    context = str(loaded.context_length or "")
    return [loaded.name, loaded.node, size(loaded.size), share, context, until(loaded.expires_at, now)]


def until(expires_at: str, now: datetime) -> str:
    """How long from `now` (aware) to a time in RFC 3339; empty where a node gave none, or one of year 1."""
    try:
        left_s = (datetime.fromisoformat(expires_at) - now).total_seconds()
    except (ValueError, TypeError):
        return ""
    if left_s < -86_400:  # Ollama's way to say that nothing was said
        return ""
    if left_s > 10 * 365 * 86_400:
        return "for good"
    if left_s < 60:
        return f"{max(0, left_s):.0f} s"
    return f"{left_s / 60:.0f} min" if left_s < 7200 else f"{left_s / 3600:.0f} h"


def facts(shown: Shown) -> list[list[str]]:
    """Rows of what is known; what a node does not tell has none."""
    details = shown.details
    context = next(
        (bytes(value).decode() for key, value in shown.model_info.items() if key.endswith("context_length")),
        "",
    )
    known = (
        ("family", details.family),
        ("parameters", details.parameter_size),
        ("quantization", details.quantization_level),
        ("context length", context if context != "0" else ""),
        ("capabilities", ", ".join(shown.capabilities)),
        *(("option", line) for line in shown.parameters.splitlines()),
    )
    return [[name, value] for name, value in known if value]
