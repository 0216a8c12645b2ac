"""What may be tried of each kind of node, and how the result is written into the settings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sutazai.adapters.llamacpp.machine import GIB, Machine
from sutazai.adapters.llamacpp.spec import discover_models
from sutazai.bootstrap.tuning import Target, engine_target, node_target
from sutazai.core.node import Node, NodeKind
from sutazai.gateway.membership import Wanted
from sutazai.policy.tuning import Tuning
from sutazai.settings.load import parse
from sutazai.settings.model import Engine, ModelSettings, Settings

MACHINE = Machine(processor="Model T", cpus=12, cores=6, quota=math.inf, memory_bytes=16 * GIB)


async def nobody() -> None:
    """Nobody needs the node."""


def engine(machine: Machine = MACHINE, *, slots: int = 4, threads: int = 5, context_tokens: int = 4096) -> Target:
    made = Settings(engine=Engine(slots=slots, threads=threads, context_tokens=context_tokens))
    [spec] = discover_models(made.engine)
    return engine_target(spec, made, machine, free_bytes=lambda: GIB, check=nobody)


def node(kind: NodeKind, *, slots: int | None = None, told: int | None = None, cores: int | None = None) -> Target:
    wanted = Wanted(node=Node(name='rack "1"', kind=kind, url="http://10.0.0.5:1", slots=slots), api_key=None)
    settings = Settings(models={"m:latest": ModelSettings(load_options={"num_batch": 256, "num_gpu": 9, "numa": True})})
    return node_target(wanted, "m:latest", settings, told_slots=told, cores=cores, check=nobody)


def test_the_engine_is_tried_with_as_many_threads_as_there_are_cores_for_it() -> None:
    assert engine().grid.threads == (1, 2, 4, 5, 6)
    assert engine(replace(MACHINE, quota=2.5), threads=1).grid.threads == (1, 2)


def test_a_batch_of_the_engine_is_no_larger_than_its_context() -> None:
    target = engine(context_tokens=1000)

    assert target.start.batch_tokens == 1000
    assert target.grid.batch_tokens == (128, 256, 512, 1000)


def test_every_axis_holds_what_the_node_has_now() -> None:
    targets = [engine(slots=3), engine(slots=20), node(NodeKind.OLLAMA, slots=3, cores=6), node(NodeKind.OPENAI)]

    for target in targets:
        assert all(value in axis for value, axis in zip(target.start, target.grid, strict=True))
        assert all(list(axis) == sorted(set(axis)) for axis in target.grid)


def test_an_ollama_starts_from_its_load_options_and_its_own_defaults() -> None:
    assert node(NodeKind.OLLAMA, cores=6).start == Tuning(slots=1, threads=6, batch_tokens=256)
    assert node(NodeKind.OLLAMA).grid.threads == (0,)


@pytest.mark.parametrize("kind", [NodeKind.OPENAI, NodeKind.LLAMACPP])
def test_of_other_nodes_only_the_slots_are_tried(kind: NodeKind) -> None:
    target = node(kind, cores=6)

    assert target.grid.threads == target.grid.batch_tokens == (0,)


def test_a_node_that_tells_its_slots_is_not_given_more_at_once() -> None:
    assert node(NodeKind.LLAMACPP, told=6).grid.slots == (1, 2, 4, 6)


def test_what_is_printed_for_a_node_can_be_read_as_settings() -> None:
    settings = parse(node(NodeKind.OLLAMA, cores=6).settings_lines(Tuning(2, 4, 128)), {})

    assert [(one.name, one.slots) for one in settings.nodes] == [('rack "1"', 2)]
    assert settings.models["m:latest"].load_options == {"num_thread": 4, "num_batch": 128, "num_gpu": 9, "numa": True}


def test_what_is_printed_for_the_engine_can_be_read_as_settings() -> None:
    settings = parse(engine().settings_lines(Tuning(2, 4, 128)), {})

    assert (settings.engine.slots, settings.engine.threads, settings.engine.batch_tokens) == (2, 4, 128)
