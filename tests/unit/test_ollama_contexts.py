"""What is known of context lengths: of a probe and a request the newer one counts, not the one that is heard last."""

from __future__ import annotations

import pytest

from sutazai.adapters.ollama.contexts import Contexts
from sutazai.core.node import LoadedModel


def loaded(context: int) -> dict[str, LoadedModel]:
    return {"m:latest": LoadedModel(name="m:latest", context_tokens=context)}


@pytest.fixture
def contexts() -> Contexts:
    """Of a node that has the model `m` with 4096 tokens."""
    known = Contexts()
    known.learn(loaded(4096), asked_in=known.turn)
    return known


def test_a_probe_that_asked_before_a_load_was_done_does_not_undo_it(contexts: Contexts) -> None:
    asked_in = contexts.turn
    assert contexts.ask("m", 8192)
    contexts.came("m", 8192)
    contexts.learn(loaded(4096), asked_in=asked_in)

    assert contexts.present("m") == 8192


def test_a_probe_that_asked_later_knows_better(contexts: Contexts) -> None:
    contexts.ask("m", 8192)
    contexts.came("m", 8192)
    contexts.learn(loaded(4096), asked_in=contexts.turn)
    assert contexts.present("m") == 4096

    contexts.learn({}, asked_in=contexts.turn)
    assert contexts.present("m") == 0


def test_what_comes_to_one_model_says_nothing_of_another(contexts: Contexts) -> None:
    asked_in = contexts.turn
    contexts.came("other", 2048)
    contexts.learn(loaded(16384), asked_in=asked_in)

    assert (contexts.present("m"), contexts.present("other")) == (16384, 2048)
