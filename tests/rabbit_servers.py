"""Real RabbitMQ servers for tests: one node, or a cluster of three; and ways to hurt them."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from aiormq.abc import AbstractChannel

from sutazai.settings.model import Rabbitmq
from sutazai.settings.secret import Secret

USER = "sutazai"
PASSWORD = "p@ss-word"
QUOTED = "p%40ss-word"
BIN = Path("/usr/lib/rabbitmq/bin")
READY_S = 90.0
PORTS = range(22_800, 32_000)
"""Below the ports of outgoing connections, above those of the tests' Redis servers."""


def need_rabbitmq() -> None:
    """Skip where there is no RabbitMQ; in CI there has to be one."""
    if not (BIN / "rabbitmq-server").exists() or shutil.which("epmd") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("rabbitmq-server is missing; `make servers` installs it")
        pytest.skip("needs rabbitmq-server")


class RabbitNode:
    """One node, with files, ports and a process group of its own."""

    def __init__(
        self, folder: Path, name: str, epmd_port: int, members: Sequence[str], *, has_management: bool = False
    ) -> None:
        self.name = f"{name}@localhost"
        self.port = free_port()
        self.management_port = free_port() if has_management else 0
        """Of its management plugin; 0 where it has none."""
        self._distribution_port = free_port()
        self._epmd_port = epmd_port
        self._home = folder / "home"
        self._folder = folder / name
        self._process: subprocess.Popen[bytes] | None = None
        self.has_stalled = False
        """Since it was started."""
        self._configure(members)

    def start(self) -> None:
        """Start it, or start it again with what it kept; `wait` tells when it is there."""
        self.has_stalled = False
        with (self._folder / "out").open("ab") as out:
            self._process = subprocess.Popen(
                [*_as_owner(), str(BIN / "rabbitmq-server")],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=self._folder,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it speaks AMQP."""
        until(self._greets, f"{self.name}, see {self._folder}")

    def kill(self) -> None:
        """SIGKILL, and wait for its end. Nothing where it has ended already."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            until(lambda: not _listens(self.port), f"the end of {self.name}")

    def stall(self) -> None:
        """SIGSTOP: the kernel goes on to accept connections for it."""
        self.has_stalled = True
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def control(self, *words: str, tool: str = "rabbitmqctl", given: str = "") -> str:
        """What `rabbitmqctl -q` prints for a command, with something to read."""
        done = subprocess.run(
            [*_as_owner(), str(BIN / tool), "-q", *words],
            env=self._environment(),
            cwd=self._folder,
            capture_output=True,
            check=False,
            input=given,
            timeout=READY_S,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def import_definitions(self, text: bytes) -> None:
        """As from a file."""
        file = self._folder / "definitions.json"
        file.write_bytes(text)
        self.control("import_definitions", str(file))

    def listens(self) -> bool:
        """Whether clients can connect; one that has paused itself lets none."""
        return _listens(self.port)

    @property
    def is_running(self) -> bool:
        """Whether it was started and not killed."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """Of the first of its processes; 0 where it does not run."""
        return 0 if self._process is None else self._process.pid

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    def _signal(self, which: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, which)

    def _greets(self) -> bool:
        """It answers to a protocol that nobody speaks with the one that it speaks."""
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "out").read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
            connection.sendall(b"HELLO!!!")
            return connection.recv(4) == b"AMQP"
        return False

    def _configure(self, members: Sequence[str]) -> None:
        self._folder.mkdir()
        lines = [
            f"listeners.tcp.default = 127.0.0.1:{self.port}",
            f"default_user = {USER}",
            f"default_pass = {PASSWORD}",
            "cluster_partition_handling = pause_minority",
            "net_ticktime = 10",
            "disk_free_limit.absolute = 50MB",
            "log.file.level = warning",
            "log.console = false",
        ]
        if members:
            lines.append("cluster_formation.peer_discovery_backend = classic_config")
            lines += [
                f"cluster_formation.classic_config.nodes.{number} = {member}@localhost"
                for number, member in enumerate(members, 1)
            ]
        if self.management_port:
            lines += [f"management.tcp.port = {self.management_port}", "management.tcp.ip = 127.0.0.1"]
        (self._folder / "rabbitmq.conf").write_text("\n".join([*lines, ""]))
        plugins = "[rabbitmq_management]" if self.management_port else "[]"
        (self._folder / "enabled_plugins").write_text(f"{plugins}.\n")
        (self._folder / "env.conf").write_text("")

    def _environment(self) -> dict[str, str]:
        return {
            "HOME": str(self._home),
            "LANG": "C.UTF-8",
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "data"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_PID_FILE": str(self._folder / "pid"),
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "enabled_plugins"),
            "RABBITMQ_CONF_ENV_FILE": str(self._folder / "env.conf"),
            # The schedulers of an idle node spin, and three of them would take the cores from the tests.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "+sbwt none +sbwtdcpu none +sbwtdio none +S 2:2 -kernel inet_dist_use_interface {127,0,0,1}"
            ),
        }


class Rabbits:
    """Some nodes that belong together."""

    def __init__(self, nodes: Sequence[RabbitNode]) -> None:
        self.nodes = nodes

    def settings(self, *, prefix: str = "", **changes: Any) -> Rabbitmq:
        """Settings that lead here."""
        hosts = ",".join(node.address for node in self.nodes)
        return Rabbitmq(url=Secret(f"amqp://{USER}:{QUOTED}@{hosts}/"), prefix=prefix, **changes)

    def leader_of(self, queue: str) -> RabbitNode:
        """The node that orders what happens to a quorum queue."""
        said = self._running().control("list_queues", "name", "leader", "--no-table-headers")
        leaders = dict(line.split("\t") for line in said.splitlines() if "\t" in line)
        return next(node for node in self.nodes if node.name == leaders[queue])

    def settle(self) -> None:
        """
        Have all nodes write down which quorum queues there are.

        They do so within a second by themselves. One that is killed before starts with an empty log of the queue that
        was declared last, and two of these can outvote the one that has its messages.
        """
        table = "maps:get(directory_rev, maps:get(names, ra_system:fetch(quorum_queues)))"
        for node in self.nodes:
            assert node.control("eval", f"dets:sync({table}).").strip() == "ok"

    def restore(self) -> None:
        """
        Start again what was killed or has stalled, and wait until all are there.

        A node that stalled for longer than `net_ticktime` may have tables of its own from then on: RabbitMQ does not
        always pause it, and never heals it. Queues that are in the tables of one part only are gone when nodes of that
        part are killed and take the tables of another as they start.
        """
        if len(self.nodes) > 1:
            for node in self.nodes:
                if node.has_stalled:
                    node.kill()
        fallen = [node for node in self.nodes if not node.is_running]
        for node in fallen:
            node.start()
        for node in fallen:
            node.wait()
        if fallen:
            until(self._is_whole, "the cluster")

    def _running(self) -> RabbitNode:
        return next(node for node in self.nodes if node.is_running)

    def _is_whole(self) -> bool:
        ask = "{length(rabbit_nodes:all_running()), catch rabbit_node_monitor:partitions()}."
        whole = f"{{{len(self.nodes)},[]}}"
        return all(node.control("eval", ask).strip() == whole for node in self.nodes)


@contextmanager
def rabbits(count: int, *, has_management: bool = False) -> Iterator[Rabbits]:
    """So many nodes, in one cluster."""
    need_rabbitmq()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sutazai-", ignore_cleanup_errors=True)))
        (folder / "home").mkdir()
        cookie = folder / "home" / ".erlang.cookie"
        cookie.write_text(random.randbytes(10).hex())
        cookie.chmod(0o400)
        epmd_port = free_port()
        names = [f"r{number + 1}" for number in range(count)]
        # The first waits for nobody: looking for others that are not there yet would take it five seconds.
        nodes = [
            RabbitNode(folder, name, epmd_port, names if name != names[0] else (), has_management=has_management)
            for name in names
        ]
        _give_to_owner(folder)
        epmd = subprocess.Popen(
            [*_as_owner(), "epmd", "-port", str(epmd_port), "-address", "127.0.0.1"],
            env={"HOME": str(folder / "home"), "PATH": "/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(epmd.wait)
        stack.callback(epmd.kill)
        until(lambda: _listens(epmd_port), "epmd")
        servers = Rabbits(nodes)
        for node in nodes:
            stack.callback(node.kill)
        nodes[0].start()
        nodes[0].wait()
        servers.restore()
        yield servers


@asynccontextmanager
async def plain_channel(settings: Rabbitmq) -> AsyncIterator[AbstractChannel]:
    """A channel of the driver's own, for what the adapter has no words for."""
    assert settings.url is not None
    connection = await aio_pika.connect(settings.url.reveal().split(",", 1)[0].rstrip("/") + "/")
    async with connection:
        yield await (await connection.channel()).get_underlay_channel()


def free_port() -> int:
    """A port that is free."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as candidate, suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait until something holds; for fixtures, which may block."""
    deadline = time.monotonic() + READY_S
    while not holds():
        assert time.monotonic() < deadline, f"{what} was not ready within {READY_S:g} s"
        time.sleep(0.05)


async def eventually(holds: Callable[[], Awaitable[bool]], within_s: float = 20.0) -> float:
    """Wait until something holds; how long that took, in seconds."""
    began = time.monotonic()
    async with asyncio.timeout(within_s):
        while not await holds():
            await asyncio.sleep(0.02)
    return time.monotonic() - began


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False


def _as_owner() -> list[str]:
    """RabbitMQ's own user where we are root: files that root made would be in its way later."""
    if os.getuid() != 0:
        return []
    return ["setpriv", "--reuid=rabbitmq", "--regid=rabbitmq", "--init-groups", "--"]


def _give_to_owner(folder: Path) -> None:
    if os.getuid() == 0:
        for path in [folder, *folder.rglob("*")]:
            shutil.chown(path, "rabbitmq", "rabbitmq")
