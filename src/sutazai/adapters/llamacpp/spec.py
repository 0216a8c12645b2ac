"""What an engine is to serve: one model, its room and its limits, worked out from the settings."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sutazai.core.errors import EngineFault

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sutazai.settings.model import Engine

TRIAL_MODEL = Path(__file__).with_name("models") / "sutazai-trial.gguf"

GIB = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """One model to serve in one process."""

    model_path: Path
    name: str
    """The id of the model, and the name of its node."""
    slots: int
    context_tokens: int
    """Of one slot."""
    threads: int
    max_rss_bytes: int


def discover_models(settings: Engine) -> tuple[EngineSpec, ...]:
    """
    One spec for each model of the settings, in their order; the trial model where none is named.

    Raises `EngineFault` where a file is missing or two models would have the same name.
    """
    specs = tuple(_spec(Path(model).expanduser(), settings) for model in settings.models or (str(TRIAL_MODEL),))
    _refuse_twins(spec.name for spec in specs)
    return specs


def _spec(path: Path, settings: Engine) -> EngineSpec:
    check_model(path)
    return EngineSpec(
        model_path=path.resolve(),
        name=path.stem.lower(),
        slots=settings.slots,
        context_tokens=settings.context_tokens,
        threads=settings.threads or max(1, len(os.sched_getaffinity(0)) - 1),
        max_rss_bytes=settings.max_rss_bytes or path.stat().st_size + 2 * GIB,
    )


def check_model(path: Path) -> None:
    """Raise `EngineFault` where the file cannot be read or is of another format."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise EngineFault(
            f"The model file {path} could not be read ({error.strerror}). Correct [engine] models."
        ) from error
    if magic != b"GGUF":
        raise EngineFault(f"The file {path} was not in GGUF format. Name a GGUF file under [engine] models.")


def _refuse_twins(names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise EngineFault(f"{count} engine models were called {name!r}. Rename the files.")
