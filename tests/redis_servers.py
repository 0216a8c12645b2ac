"""Real Redis servers for tests: one alone, a trio with Sentinels, a Cluster; and ways to hurt them."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import pytest

from sutazai.settings.model import Redis
from sutazai.settings.secret import Secret

PASSWORD = "p@ss{word}"
QUOTED = "p%40ss%7Bword%7D"
READY_S = 20.0
PATIENT_S = 5.0
"""For what is not about time: a machine that many tests share stands still for a second now and then."""
PORTS = range(11_000, 22_700)
"""A Cluster's servers also listen 10,000 higher, which must stay below the ports of outgoing connections."""


def need_redis() -> None:
    """Skip where there is no Redis; in CI there has to be one."""
    if shutil.which("redis-server") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("redis-server is missing; `make servers` installs it")
        pytest.skip("needs redis-server")


class RedisProcess:
    """One `redis-server`, a child of the test."""

    def __init__(self, folder: Path, *options: str, config: str = "", name: str = "") -> None:
        self.port = free_port()
        self._folder = folder / (name or f"redis-{self.port}")
        self._folder.mkdir(parents=True)
        self._config = config
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, or start it again with what it kept: nothing, unless its options say so."""
        command = ["redis-server"]
        if self._config:
            file = self._folder / "sentinel.conf"
            file.write_text(f"port {self.port}\ndir {self._folder}\n{self._config}")
            command += [str(file), "--sentinel"]
        else:
            command += ["--port", str(self.port), "--dir", str(self._folder), "--save", "", *self._options]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([*command, "--bind", "127.0.0.1"], stdout=log, stderr=log)
        until(self._listens, f"redis-server on port {self.port}")

    def kill(self) -> None:
        """SIGKILL, and wait for its end. Nothing where it has ended already."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stall(self) -> None:
        """SIGSTOP: the kernel goes on to accept connections for it."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def cli(self, *words: str, is_sentinel: bool = False) -> str:
        """What `redis-cli` prints for a command."""
        auth = [] if is_sentinel else ["-a", PASSWORD, "--no-auth-warning"]
        command = ["redis-cli", "-p", str(self.port), *auth, *words]
        return subprocess.run(command, capture_output=True, check=False, timeout=READY_S, text=True).stdout

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    def _signal(self, which: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, which)

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1.0):
            return True
        return False


class Servers:
    """Some servers that belong together."""

    def __init__(self, url: str, servers: Sequence[RedisProcess], sentinels: Sequence[RedisProcess] = ()) -> None:
        self.url = url
        self.servers = servers
        self.sentinels = sentinels

    def settings(self, *, timeout_s: float = PATIENT_S, prefix: str = "sutazai") -> Redis:
        """Settings that lead here. The limit is generous: most tests are not about time."""
        return Redis(url=Secret(self.url), timeout_s=timeout_s, prefix=prefix)

    def master(self) -> RedisProcess:
        """The first that says it is a master."""
        return next(server for server in self.servers if server.cli("ROLE").startswith("master"))


@contextmanager
def one_redis(folder: Path, *options: str) -> Iterator[Servers]:
    """One server with a password."""
    need_redis()
    server = RedisProcess(folder, "--requirepass", PASSWORD, *options)
    try:
        yield Servers(f"redis://:{QUOTED}@{server.address}/1", [server])
    finally:
        server.kill()


@contextmanager
def sentinel_trio(folder: Path) -> Iterator[Servers]:
    """A master, two replicas and three Sentinels, which have no password themselves."""
    need_redis()
    with ExitStack() as stack:
        options = ["--requirepass", PASSWORD, "--masterauth", PASSWORD, "--repl-diskless-sync-delay", "0"]
        master = _started(stack, folder, *options)
        replicas = [_started(stack, folder, *options, "--replicaof", "127.0.0.1", str(master.port)) for _ in "12"]
        config = "\n".join(
            (
                f"sentinel monitor main 127.0.0.1 {master.port} 2",
                f"sentinel auth-pass main {PASSWORD}",
                "sentinel down-after-milliseconds main 1000",
                "sentinel failover-timeout main 5000",
                "",
            )
        )
        sentinels = [_started(stack, folder, config=config) for _ in "123"]
        until(lambda: all(_has_met(each) for each in sentinels), "the Sentinels")
        hosts = ",".join(each.address for each in sentinels)
        yield Servers(f"redis+sentinel://:{QUOTED}@{hosts}/main?db=1", [master, *replicas], sentinels)


@contextmanager
def six_node_cluster(folder: Path) -> Iterator[Servers]:
    """Three masters and a replica of each."""
    need_redis()
    with ExitStack() as stack:
        options = ["--requirepass", PASSWORD, "--masterauth", PASSWORD, "--repl-diskless-sync-delay", "0"]
        clustered = [
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "1000",
            "--cluster-replica-validity-factor",
            "0",
        ]
        nodes = [_started(stack, folder, *options, *clustered) for _ in range(6)]
        addresses = [node.address for node in nodes]
        made = nodes[0].cli("--cluster", "create", *addresses, "--cluster-replicas", "1", "--cluster-yes")
        assert "All 16384 slots covered" in made, made
        until(lambda: all(_has_joined(node) for node in nodes), "the Cluster")
        yield Servers(f"redis+cluster://:{QUOTED}@{','.join(addresses[:2])}", nodes)


class Listener(Protocol):
    """A server on this machine."""

    port: int


class Wall:
    """A TCP proxy before a server that can stop to forward, as a network that is cut does: without a word."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._open = asyncio.Event()
        self._open.set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    def cut(self) -> None:
        """Forward no more; connections stay open, new ones are accepted."""
        self._open.clear()

    def heal(self) -> None:
        """Forward again, and what was held back too."""
        self._open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers.add(to_writer)
        for source, sink in ((reader, to_writer), (to_reader, writer)):
            pump = asyncio.create_task(self._pump(source, sink), name="wall")
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(2**16):
                await self._open.wait()
                sink.write(data)
                await sink.drain()
        sink.close()

    async def _close(self) -> None:
        for pump in list(self._pumps):
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for writer in self._writers:
            writer.close()


@asynccontextmanager
async def wall_before(server: Listener) -> AsyncIterator[Wall]:
    """A `Wall` on a port of its own."""
    wall = Wall(server.port)
    listener = await asyncio.start_server(wall._accept, "127.0.0.1", 0)
    wall.port = listener.sockets[0].getsockname()[1]
    try:
        yield wall
    finally:
        listener.close()
        await wall._close()


def free_port() -> int:
    """A port that is free, and so is the one 10,000 higher."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as first, socket.socket() as second, suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 10_000))
            return port


def until(holds: Callable[[], bool], what: str, within_s: float = READY_S) -> None:
    """Wait until something holds; for fixtures, which may block."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"{what} was not ready within {within_s:g} s"
        time.sleep(0.02)


async def eventually(holds: Callable[[], bool] | Callable[[], Awaitable[bool]], within_s: float = READY_S) -> float:
    """Wait until something holds; how long that took, in seconds."""
    began = time.monotonic()
    async with asyncio.timeout(within_s):
        while True:
            answer = holds()
            if answer if isinstance(answer, bool) else await answer:
                return time.monotonic() - began
            await asyncio.sleep(0.01)


def _started(stack: ExitStack, folder: Path, *options: str, config: str = "") -> RedisProcess:
    server = RedisProcess(folder, *options, config=config)
    stack.callback(server.kill)
    return server


def _has_met(sentinel: RedisProcess) -> bool:
    said = sentinel.cli("SENTINEL", "master", "main", is_sentinel=True).split("\n")
    facts = dict(zip(said[::2], said[1::2], strict=False))
    return (facts.get("num-other-sentinels"), facts.get("num-slaves")) == ("2", "2")


def _has_joined(node: RedisProcess) -> bool:
    facts = node.cli("CLUSTER", "INFO")
    return "cluster_state:ok" in facts and "cluster_known_nodes:6" in facts and "cluster_size:3" in facts
