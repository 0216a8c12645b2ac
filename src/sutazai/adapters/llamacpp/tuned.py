"""
What was measured to be fastest for a model on a machine: `tuned.json` in the folder for data.

`sutazai nodes tune --save` writes it and the next start of the engine reads it. What the settings say goes first. A
file that cannot be read is reported by whoever reads it, and passed over: the engine then runs with its defaults.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from sutazai.core.errors import EngineFault

NAME = "tuned.json"
MIB = 1024**2
MOST_ENTRIES = 100
"""The newest are kept."""

Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class Tuned(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model on one machine."""

    model: str
    """Its name, for people who read the file."""
    model_digest: str
    machine: str
    """The text of a `Machine`."""
    slots: Count
    threads: Count
    batch_tokens: Count
    measured_at: str
    """RFC 3339."""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Literal[1] = 1
    engines: tuple[Tuned, ...] = ()


def read_tuned(folder: Path) -> Sequence[Tuned]:
    """All entries, oldest first; none where nothing was kept yet. Raises `EngineFault` where the file is broken."""
    path = folder / NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=_File).engines
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise EngineFault(f"{path} could not be read ({error.strerror}). Mend that, or remove it.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineFault(
            f"{path} was not understood ({error}). Remove it, and let `sutazai nodes tune NAME --save` make it anew."
        ) from error


def keep_tuned(folder: Path, entry: Tuned) -> Path:
    """
    Put the entry in the place of an older one for this model and machine; a broken file is replaced.

    Raises `EngineFault` where nothing can be written.
    """
    try:
        before = read_tuned(folder)
    except EngineFault:
        before = ()
    others = [one for one in before if (one.model_digest, one.machine) != (entry.model_digest, entry.machine)]
    kept = _File(engines=(*others, entry)[-MOST_ENTRIES:])
    path, draft = folder / NAME, folder / f"{NAME}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(kept)) + b"\n")
        draft.replace(path)  # a reader sees the file of before or the whole new one
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise EngineFault(f"{path} could not be written ({error.strerror}). Check `database.data_dir`.") from error
    return path


def model_digest(path: Path) -> str:
    """
    What tells model files apart: their size and the MiB at both ends.

    All of a large file would take minutes to read at every start. The head of a GGUF file holds all that was said of
    the model, and its end are weights. Raises `OSError`.
    """
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(b"%d " % size_bytes)
        digest.update(file.read(MIB))
        file.seek(max(0, size_bytes - MIB))
        digest.update(file.read(MIB))
    return digest.hexdigest()
