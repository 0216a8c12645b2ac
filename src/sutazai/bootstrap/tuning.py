"""
What can be tuned of a node, by its kind, and how it is run in one tuning after the other.

The embedded engine is tuned in a process of its own, beside the one that serves: whatever ends the tuning, the engine
that serves was never changed. Ollama gets the values as load options of each request. Of others only how many
requests they take at once is ours to choose.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import msgspec

from sutazai.adapters.llamacpp.machine import Machine
from sutazai.adapters.llamacpp.spec import EngineSpec
from sutazai.adapters.llamacpp.supervisor import EngineSupervisor
from sutazai.adapters.openai import OpenAINode
from sutazai.bootstrap import connector
from sutazai.bootstrap.rules import Live
from sutazai.core.errors import EngineFault
from sutazai.core.node import NodeKind
from sutazai.gateway.membership import DEFAULT_SLOTS, Wanted
from sutazai.gateway.tuning import Subject
from sutazai.policy.tuning import Grid, Tuning
from sutazai.ports.nodes import NodeClient
from sutazai.settings.model import ModelSettings, Settings

MOST_SLOTS = 16
"""Tried where nobody has more already: past it each answer is slow, however many there are."""
BATCHES = (128, 256, 512, 1024, 2048)
OLLAMA_BATCH_TOKENS = 512
"""What Ollama takes when nobody says."""
UNKNOWN_CONTEXT_TOKENS = 2048
"""Shorter ones are rare."""
IDLE_DRAIN_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A node that can be tuned."""

    subject: Subject
    grid: Grid
    start: Tuning
    """How it is run now."""
    settings_lines: Callable[[Tuning], str]
    """What to write into the settings file for it."""


def engine_target(
    spec: EngineSpec,
    settings: Settings,
    machine: Machine,
    *,
    free_bytes: Callable[[], int],
    check: Callable[[], Awaitable[None]],
) -> Target:
    """
    The embedded engine of one model.

    Args:
        free_bytes: memory that can be had now.
        check: as of a `Subject`.
    """
    start = Tuning(spec.slots, spec.threads, min(spec.batch_tokens, spec.context_tokens))
    cores = machine.most_threads
    runs = _EngineRuns(spec, connect_s=settings.timeouts.connect_s, free_bytes=free_bytes)
    return Target(
        subject=Subject(
            model=spec.name,
            options={"ignore_eos": True},
            most_prompt_tokens=spec.context_tokens * 3 // 4,
            head_start=settings.routing.head_start,
            opened=runs.opened,
            check=check,
        ),
        grid=Grid(
            slots=_axis(_doubled(max(MOST_SLOTS, start.slots)), start.slots),
            threads=_axis((*_doubled(cores), cores - 1, cores), start.threads),
            batch_tokens=_axis((one for one in BATCHES if one <= spec.context_tokens), start.batch_tokens),
        ),
        start=start,
        settings_lines=lambda best: (
            f"[engine]\nslots = {best.slots}\nthreads = {best.threads}\nbatch_tokens = {best.batch_tokens}"
        ),
    )


def node_target(
    wanted: Wanted,
    model: str,
    settings: Settings,
    *,
    told_slots: int | None,
    cores: int | None,
    check: Callable[[], Awaitable[None]],
) -> Target:
    """
    A node of the pool.

    Args:
        told_slots: what the node says of its slots, if anything.
        cores: of its machine; None leaves its threads alone.
    """
    node = wanted.node
    slots = node.slots or told_slots or DEFAULT_SLOTS[node.kind]
    live = Live(settings)
    is_ollama = node.kind is NodeKind.OLLAMA
    options = live.model(model).load_options
    start = Tuning(
        slots,
        int(options.get("num_thread", cores or 0)) if is_ollama else 0,
        int(options.get("num_batch", OLLAMA_BATCH_TOKENS)) if is_ollama else 0,
    )

    @asynccontextmanager
    async def opened(tuning: Tuning) -> AsyncIterator[NodeClient]:
        client = connector(_Tuned(settings, tuning) if is_ollama else live)(node, wanted.api_key)
        try:
            if is_ollama:
                await client.probe()  # to learn the context length that the model has
            yield client
        finally:
            await client.close()

    return Target(
        subject=Subject(
            model=model,
            options={"ignore_eos": True} if node.kind is NodeKind.LLAMACPP else {},
            most_prompt_tokens=UNKNOWN_CONTEXT_TOKENS * 3 // 4,
            head_start=settings.routing.head_start,
            opened=opened,
            check=check,
        ),
        grid=Grid(
            slots=_axis(_doubled(told_slots or max(MOST_SLOTS, 2 * slots)), slots),
            threads=_axis((*_doubled(cores), cores) if is_ollama and cores else (), start.threads),
            batch_tokens=_axis(BATCHES if is_ollama else (), start.batch_tokens),
        ),
        start=start,
        settings_lines=lambda best: _node_lines(wanted, model, best, options),
    )


class _Tuned(Live):
    """The settings, with the load options of a tuning for every model."""

    def __init__(self, settings: Settings, tuning: Tuning) -> None:
        super().__init__(settings)
        self._options = _load_options(tuning)

    def model(self, name: str) -> ModelSettings:
        settings = super().model(name)
        return msgspec.structs.replace(settings, load_options=settings.load_options | self._options)


class _EngineRuns:
    """Engines of one model, one after the other."""

    def __init__(self, spec: EngineSpec, *, connect_s: float, free_bytes: Callable[[], int]) -> None:
        self._spec = spec
        self._connect_s = connect_s
        self._free_bytes = free_bytes
        self._slot_bytes = 0.0
        """Memory that one more slot takes, as the engines before have shown."""

    @asynccontextmanager
    async def opened(self, tuning: Tuning) -> AsyncIterator[NodeClient]:
        """An engine that answers; gone at the end. Raises `EngineFault`, also where memory would not do."""
        spec = replace(self._spec, slots=tuning.slots, threads=tuning.threads, batch_tokens=tuning.batch_tokens)
        if self._slot_bytes * tuning.slots > self._free_bytes():
            raise EngineFault(f"Memory did not do for {tuning.slots} slots. Free some, or lower engine.context_tokens.")
        supervisor = EngineSupervisor(
            spec, started=_ignore, stopped=_ignore, is_idle=lambda: False, drain_s=IDLE_DRAIN_S
        )
        node, key = await supervisor.start()
        client = OpenAINode(node, api_key=key.reveal(), connect_s=self._connect_s)
        try:
            size_bytes = spec.model_path.stat().st_size
            self._slot_bytes = max(0, supervisor.rss_bytes - size_bytes) / tuning.slots
            yield client
        finally:
            await client.close()
            await supervisor.stop()


def _ignore(*_: object) -> None:
    """Nobody restarts these engines, so nobody need hear of it."""


def _doubled(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `most`."""
    return tuple(1 << power for power in range(most.bit_length()))


def _axis(values: Iterable[int], start: int) -> tuple[int, ...]:
    """The values of an axis with where it is walked from."""
    return tuple(sorted({start, *(value for value in values if value > 0)}))


def _load_options(tuning: Tuning) -> dict[str, int]:
    options = {"num_thread": tuning.threads, "num_batch": tuning.batch_tokens}
    return {name: value for name, value in options.items() if value}


def _node_lines(wanted: Wanted, model: str, best: Tuning, options: Mapping[str, int | float | bool]) -> str:
    node = wanted.node
    lines = ["[[nodes]]", f"url = {_toml(node.url)}", f"kind = {_toml(node.kind.value)}", f"name = {_toml(node.name)}"]
    lines.append(f"slots = {best.slots}")
    if node.kind is NodeKind.OLLAMA:
        lines += ["", f"[models.{_toml(model)}.load_options]"]
        lines += [f"{name} = {_toml(value)}" for name, value in {**options, **_load_options(best)}.items()]
    return "\n".join(lines)


def _toml(value: str | float) -> str:
    """A value in TOML, where texts, numbers and truth are written as in JSON."""
    return msgspec.json.encode(value).decode()
