"""`sutazai nodes tune`: finds with how many slots and threads and how large a batch a node is fastest."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import exp, inf
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Annotated
from urllib.parse import urlsplit

import cyclopts
import msgspec
import uvloop

from sutazai.adapters.llamacpp.machine import this_machine
from sutazai.adapters.llamacpp.spec import EngineSpec
from sutazai.adapters.llamacpp.tuned import Tuned, keep_tuned, model_digest
from sutazai.bootstrap import connector
from sutazai.bootstrap.engines import engine_specs
from sutazai.bootstrap.rules import Live, sources
from sutazai.bootstrap.tuning import Target, engine_target, node_target
from sutazai.cli.checks import available_bytes
from sutazai.cli.client import ANSWER_S, GatewayClient, NoGateway, Url, gateway_url, guarded
from sutazai.cli.printing import Cell, complain, print_json, print_table
from sutazai.core.errors import BadRequest, EngineFault, Forbidden, Overloaded, Unauthorized, UnknownModel
from sutazai.core.node import Node, NodeKind, NodeReport
from sutazai.edge.auth import is_loopback
from sutazai.gateway.membership import Wanted
from sutazai.gateway.tuning import Outcome
from sutazai.gateway.tuning import tune as measure
from sutazai.policy.nearest import nearest
from sutazai.policy.tuning import TOO_NOISY, Sample, Tuning, noise
from sutazai.settings.load import data_dir, find, load
from sutazai.settings.model import Engine, Settings
from sutazai.settings.secret import Secret

HEADS = ("SLOTS", "THREADS", "BATCH", "ANSWERS TOKENS/S", "PROMPTS TOKENS/S", "SPEED", "")
BAR_CHARACTERS = 20
PATH = "/admin/nodes"
LEAST_BUDGET_S = 5.0
MOST_CORES = 4096
RETRY_S = 60.0


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateway tells of a node, as far as it matters here."""

    name: str
    url: str
    in_flight: int


class _Rows(msgspec.Struct, frozen=True):
    nodes: tuple[_Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The node that was named."""

    target: Target
    spec: EngineSpec | None
    """Of the embedded engine; None for other nodes."""


def tune(
    name: str,
    *,
    model: str | None = None,
    budget_s: float = 120.0,
    cores: int | None = None,
    dry_run: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    force: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    save: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    json: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    url: Url = None,
) -> int:
    """
    Measure with how many slots and threads and how large a batch a node is fastest.

    Asks the node itself, for real, and prints the settings. The embedded engine is measured in a process beside the
    one that serves. An Ollama loads the model again for each other number of threads or size of batch.
    Examples: `sutazai nodes tune sutazai-trial --save`, `sutazai nodes tune rack-1 --model llama3.2`

    Parameters
    ----------
    name
        The node, as `sutazai nodes` shows it; the embedded engine's is the name of its model.
    model
        The model to ask. Left out: the only one, or the only one in memory.
    budget_s
        Seconds that it may take; the best of what was measured by then is taken.
    cores
        Physical cores of an Ollama's machine. Left out: those of this machine if it runs here, else its threads are
        left alone.
    dry_run
        Only print what could be tried.
    force
        Measure although others use the node, or nobody can tell.
    save
        Keep the result for the next start of `sutazai up`. For the embedded engine alone.
    json
        Print JSON.
    """

    async def work() -> int:
        if not LEAST_BUDGET_S <= budget_s < inf:  # a NaN is in no range
            raise BadRequest(f"A budget of {budget_s:g} s cannot be. Give at least {LEAST_BUDGET_S:g}.")
        if cores is not None and not 1 <= cores <= MOST_CORES:
            raise BadRequest(f"{cores} cores cannot be. Give how many the node's machine has.")
        settings = load(find(os.environ, Path.cwd()), os.environ)
        folder = data_dir(settings, os.environ, os.geteuid() == 0)
        gateway = None if force else _gateway(settings, url)
        try:
            found = await _find(name, model, cores, settings, folder, gateway, force=force)
            if save and found.spec is None:
                raise BadRequest(
                    "`--save` was for the embedded engine alone. Measure without, and put what is printed into the "
                    "settings, where every gateway reads it."
                )
            if dry_run:
                _print_plan(name, found.target, as_json=json)
                return 0
            outcome = await _measured(found, budget_s)
        finally:
            if gateway is not None:
                gateway.close()
        kept: Path | EngineFault | None = None
        if save and found.spec is not None:
            try:
                kept = await asyncio.to_thread(_keep, found.spec, outcome.best, folder)
            except EngineFault as fault:
                kept = fault  # what was measured is told first, for it took a while
        if json:
            print_json(_plain(name, found.target, outcome, kept))
        else:
            _print(found, outcome, kept, settings.engine)
        if isinstance(kept, EngineFault):
            raise kept
        return 0

    return guarded(lambda: uvloop.run(work()))


async def _find(
    name: str,
    model: str | None,
    cores: int | None,
    settings: Settings,
    folder: Path,
    gateway: GatewayClient | None,
    *,
    force: bool,
) -> _Found:
    """What is called that. Raises `BadRequest`, `UnknownModel` or a fault of the node."""
    specs: Mapping[str, EngineSpec] = {}
    if settings.engine.enabled != "never":
        found_specs = await asyncio.to_thread(engine_specs, settings.engine, folder, complain)
        specs = {spec.name: spec for spec in found_specs}
    known = sources(settings, os.environ)
    nodes = {entry.node.name: entry for entry in known.listed}
    if known.ollama is not None and not nodes:
        found = Node(name="ollama", kind=NodeKind.OLLAMA, url=known.ollama, source="found")
        nodes[found.name] = Wanted(node=found, api_key=None)
    if name in specs and name not in nodes:
        if model not in {None, name}:
            raise BadRequest(f"The embedded engine {name} had no other model. Leave out `--model`.")
        spec = specs[name]
        target = engine_target(
            spec,
            settings,
            this_machine(),
            free_bytes=available_bytes,
            check=lambda: _check(gateway, lambda row: row.name == name),
        )
        return _Found(target=target, spec=spec)
    if name not in nodes:
        close = nearest(name, [*nodes, *specs])
        hint = f"Did you mean {' or '.join(close)}?" if close else f"There are {', '.join([*nodes, *specs])}."
        raise BadRequest(f"No node was called {name[:200]!r}. {hint}")
    return _Found(target=await _node(nodes[name], model, cores, settings, gateway, force=force), spec=None)


async def _node(
    entry: Wanted,
    model: str | None,
    cores: int | None,
    settings: Settings,
    gateway: GatewayClient | None,
    *,
    force: bool,
) -> Target:
    node = entry.node
    client = connector(Live(settings))(node, entry.api_key)
    try:
        async with asyncio.timeout(ANSWER_S):
            report = await client.probe()
    except TimeoutError as error:
        raise BadRequest(f"{node.name} did not answer within {ANSWER_S:g} s at {node.url}. See if it runs.") from error
    finally:
        await client.close()
    busy = (report.running or 0) + (report.waiting or 0)
    if busy and not force:
        raise _busy(node.name, busy)
    host = urlsplit(node.url).hostname or ""
    return node_target(
        entry,
        _model(node, report, model),
        settings,
        told_slots=report.slots,
        cores=cores or (this_machine().most_threads if is_loopback(host) else None),
        check=lambda: _check(gateway, lambda row: row.url == node.url),
    )


def _model(node: Node, report: NodeReport, wanted: str | None) -> str:
    """The full name of the model to ask."""
    offered = [one for one in report.models if not node.models or one.removesuffix(":latest") in node.models]
    if wanted is not None:
        same = [one for one in offered if one.removesuffix(":latest") == wanted.removesuffix(":latest")]
        if not same:
            raise UnknownModel(wanted, nearest(wanted, offered))
        return same[0]
    in_memory = [one for one in offered if report.loaded and one in report.loaded]
    for few in (in_memory, offered):
        if len(few) == 1:
            return few[0]
    if not offered:
        raise BadRequest(f"{node.name} had no model. `sutazai models pull` fetches one.")
    raise BadRequest(f"{node.name} had {len(offered)} models. Choose with `--model`: {', '.join(offered[:20])}.")


# others who use the node


def _gateway(settings: Settings, url: str | None) -> GatewayClient | None:
    """The gateway that may be using the node; None where nobody could know its port."""
    if not (url or os.environ.get("SUTAZAI_URL") or settings.server.port):
        return None
    key = os.environ.get("SUTAZAI_KEY", "").strip()
    return GatewayClient(gateway_url(url, os.environ, Path.cwd()), Secret(key) if key else None)


async def _check(gateway: GatewayClient | None, is_ours: Callable[[_Row], bool]) -> None:
    """Raise `Overloaded` where the gateway has requests at the node; one that does not run has none."""
    if gateway is None:
        return
    try:
        rows = await gateway.ask("GET", PATH, shape=_Rows)
    except NoGateway:
        return
    except (Unauthorized, Forbidden) as error:
        raise type(error)(
            f"{error.message} Or measure without asking whether others use the node: `--force`."
        ) from error
    for row in filter(is_ours, rows.nodes):
        if row.in_flight:
            raise _busy(row.name, row.in_flight)


def _busy(name: str, count: int) -> Overloaded:
    return Overloaded(
        f"{name} worked on {_counted(count, 'request')} of others, which measuring would slow. "
        "Try again later, or add `--force`.",
        retry_after_s=RETRY_S,
    )


# measuring


async def _measured(found: _Found, budget_s: float) -> Outcome:
    target, subject = found.target, found.target.subject
    if found.spec is None and any(len(axis) > 1 for axis in target.grid[1:]):
        complain(f"The node will load {subject.model} again for each other number of threads and size of batch.")
    began, most, taken = monotonic(), target.grid.most_samples, 0

    def note(sample: Sample) -> None:
        nonlocal taken
        taken += 1
        spent_s = monotonic() - began
        left_s = max(0.0, min(budget_s - spent_s, (most - taken) * spent_s / taken))
        complain(
            f"{taken} of at most {most}, {left_s:.0f} s left at most: {_words(sample.tuning)}: "
            f"{sample.generated_per_s:.0f} tokens/s, prompts {sample.prompt_per_s:.0f}"
        )

    await subject.check()
    return await measure(subject, target.grid, target.start, budget_s=budget_s, clock=monotonic, note=note)


def _keep(spec: EngineSpec, best: Tuning, folder: Path) -> Path:
    entry = Tuned(
        model=spec.name,
        model_digest=model_digest(spec.model_path),
        machine=str(this_machine()),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        **best._asdict(),
    )
    return keep_tuned(folder, entry)


# printing


def _words(tuning: Tuning) -> str:
    """Without what is left to the node."""
    words = [_counted(tuning.slots, "slot")]
    if tuning.threads:
        words.append(_counted(tuning.threads, "thread"))
    if tuning.batch_tokens:
        words.append(f"batch {tuning.batch_tokens}")
    return ", ".join(words)


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' if count != 1 else ''}"


def _print_plan(name: str, target: Target, *, as_json: bool) -> None:
    plan = {"node": name, "model": target.subject.model, "start": target.start._asdict()}
    if as_json:
        print_json(plan | {"grid": target.grid._asdict(), "most_samples": target.grid.most_samples})
        return
    axes = "".join(f"{axis}: {', '.join(map(str, values))}\n" for axis, values in target.grid._asdict().items())
    sys.stdout.write(
        f"{name} with {target.subject.model} would be measured from {_words(target.start)} on, at most "
        f"{target.grid.most_samples} times, among\n{axes}"
    )


def _print(found: _Found, outcome: Outcome, kept: Path | EngineFault | None, engine: Engine) -> None:
    target, best = found.target, outcome.best
    print_table(HEADS, _rows(outcome))
    if not outcome.is_complete:
        complain("The time was up before all was tried; more may be found with a larger `--budget-s`.")
    if (differed := noise(outcome.samples)) > TOO_NOISY:
        complain(f"Samples of one and the same tuning differed by {differed:.0%}: something else uses the machine.")
    if best == outcome.start:
        sys.stdout.write("\nNothing was faster than what it has.\n")
    sys.stdout.write(f"\n{target.settings_lines(best)}\n")
    if not isinstance(kept, Path):
        return
    sys.stdout.write(f"\nKept in {kept}; the next start of `sutazai up` takes it.\n")
    if by_hand := [field for field in Tuning._fields if getattr(engine, field)]:
        complain(f"The settings name {', '.join(by_hand)} under [engine], and go first. Remove that there.")
    if found.spec is not None and best.batch_tokens < outcome.start.batch_tokens:
        complain(f"Inputs of embeddings may then have at most {best.batch_tokens} tokens.")


def _rows(outcome: Outcome) -> list[list[Cell]]:
    """One for each tuning, in the order in which they were tried, with a bar for its speed."""
    by_tuning: dict[Tuning, list[Sample]] = {}
    for sample in outcome.samples:
        by_tuning.setdefault(sample.tuning, []).append(sample)
    scores = {tuning: median(sample.score for sample in samples) for tuning, samples in by_tuning.items()}
    top = max(scores.values(), default=0.0)
    return [
        [
            *(str(value) if value else "" for value in tuning),
            f"{median(sample.generated_per_s for sample in samples):.0f}",
            f"{median(sample.prompt_per_s for sample in samples):.0f}",
            "#" * round(BAR_CHARACTERS * exp(scores[tuning] - top)),
            " ".join(["now"] * (tuning == outcome.start) + ["best"] * (tuning == outcome.best)),
        ]
        for tuning, samples in by_tuning.items()
    ]


def _plain(name: str, target: Target, outcome: Outcome, kept: Path | EngineFault | None) -> dict[str, object]:
    return {
        "node": name,
        "model": target.subject.model,
        "start": outcome.start._asdict(),
        "best": outcome.best._asdict(),
        "is_complete": outcome.is_complete,
        "samples": [
            sample.tuning._asdict()
            | {"generated_per_s": round(sample.generated_per_s, 1), "prompt_per_s": round(sample.prompt_per_s, 1)}
            for sample in outcome.samples
        ],
        "settings": target.settings_lines(outcome.best),
        "kept_in": str(kept) if isinstance(kept, Path) else None,
    }
