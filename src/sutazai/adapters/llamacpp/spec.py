"""What an engine is to serve: one model, its room and its limits, worked out from the settings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sutazai.adapters.llamacpp.machine import Machine, this_machine
from sutazai.adapters.llamacpp.tuned import Tuned, model_digest
from sutazai.core.errors import EngineFault

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sutazai.settings.model import Engine

TRIAL_MODEL = Path(__file__).with_name("models") / "sutazai-trial.gguf"

GIB = 1024**3

USUAL_SLOTS = 4
USUAL_BATCH_TOKENS = 2048


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
    batch_tokens: int = USUAL_BATCH_TOKENS
    """Tokens of prompts computed at once."""
    max_rss_bytes: int


def discover_models(settings: Engine, tuned: Sequence[Tuned] = ()) -> tuple[EngineSpec, ...]:
    """
    One spec for each model of the settings, in their order; the trial model where none is named.

    What the settings leave open is as `tuned` says of the model on this machine, else as usual. Raises `EngineFault`
    where a file is missing or two models would have the same name.
    """
    machine = this_machine()
    paths = [Path(model).expanduser() for model in settings.models or (str(TRIAL_MODEL),)]
    specs = tuple(_spec(path, settings, machine, tuned) for path in paths)
    _refuse_twins(spec.name for spec in specs)
    return specs


def _spec(path: Path, settings: Engine, machine: Machine, tuned: Sequence[Tuned]) -> EngineSpec:
    check_model(path)
    found = tuning_of(path, machine, tuned)
    return EngineSpec(
        model_path=path.resolve(),
        name=path.stem.lower(),
        slots=settings.slots or (found.slots if found else USUAL_SLOTS),
        context_tokens=settings.context_tokens,
        threads=settings.threads or (found.threads if found else machine.usual_threads),
        batch_tokens=settings.batch_tokens or (found.batch_tokens if found else USUAL_BATCH_TOKENS),
        max_rss_bytes=settings.max_rss_bytes or path.stat().st_size + 2 * GIB,
    )


def tuning_of(path: Path, machine: Machine, tuned: Sequence[Tuned]) -> Tuned | None:
    """What was found for this file on this machine."""
    if not tuned:
        return None
    digest = model_digest(path)
    return next((one for one in tuned if (one.model_digest, one.machine) == (digest, str(machine))), None)


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
