"""
Three hosts with PostgreSQL below Patroni and a member of etcd each, for tests that hurt them.

On loopback a host is a set of ports. With namespaces each has a network of its own, and can be cut off from the others.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.postgres_servers import USER, folder_of_programs, need, started
from tests.redis_servers import free_port, until

from sutazai.adapters.postgres.wheel import Programs
from sutazai.settings.secret import Secret

PATRONI = Path(__file__).parents[1] / ".venv-patroni"
HOSTS = 3
TTL_S = 20
"""How long the right to write lasts that a primary has to renew; Patroni allows no less."""
READY_S = 90.0
ANSWER_S = 2.0
SUBNET = "10.231.7"
NAME = f"sz{os.getpid() % 100_000}"
"""Of what is made in the kernel; an interface's name has 15 characters at most."""


class Host:
    """One machine, or what stands for one."""

    def __init__(self, number: int, programs: Programs, folder: Path, namespace: str = "") -> None:
        self.number = number
        self.address = f"{SUBNET}.{number}" if namespace else "127.0.0.1"
        self.namespace = namespace
        self.folder = folder
        self.ports = {name: free_port() for name in ("postgres", "patroni", "etcd", "peers")}
        self._programs = programs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir()
        os.chown(folder, programs.uid, programs.gid)

    def at(self, what: str) -> str:
        """Host and port of one of its services."""
        return f"{self.address}:{self.ports[what]}"

    def start_etcd(self, hosts: Sequence[Host]) -> None:
        """Its member of etcd; the others have to follow."""
        peers = ",".join(f"e{host.number}=http://{host.at('peers')}" for host in hosts)
        options = {
            "name": f"e{self.number}",
            "data-dir": str(self.folder / "etcd"),
            "listen-client-urls": f"http://{self.at('etcd')}",
            "advertise-client-urls": f"http://{self.at('etcd')}",
            "listen-peer-urls": f"http://{self.at('peers')}",
            "initial-advertise-peer-urls": f"http://{self.at('peers')}",
            "initial-cluster": peers,
            "initial-cluster-token": NAME,
            "initial-cluster-state": "new",
            "log-level": "warn",
            "logger": "zap",
        }
        self._start("etcd", ["etcd", *(f"--{name}={value}" for name, value in options.items())])

    def start(self, hosts: Sequence[Host]) -> None:
        """Patroni, which starts PostgreSQL; or starts it again."""
        config = self.folder / "patroni.yml"
        config.write_text(json.dumps(self._config(hosts)))  # JSON is YAML
        os.chown(config, self._programs.uid, self._programs.gid)
        config.chmod(0o600)
        python = os.path.realpath(sys.executable)
        self._start("patroni", [python, "-m", "patroni", str(config)])

    def kill_postgres(self) -> None:
        """SIGKILL to PostgreSQL's first process alone; the others end by themselves."""
        with suppress(ProcessLookupError):
            os.kill(self._postmaster(), signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL to Patroni and PostgreSQL."""
        self._signal(signal.SIGKILL)
        patroni = self._running.pop("patroni", None)
        if patroni is not None:
            patroni.wait()

    def stall(self) -> None:
        """SIGSTOP to both: the kernel goes on to accept connections for them."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Leave no process over."""
        with suppress(ProcessLookupError):
            self.resume()
        self.kill()
        for process in self._running.values():
            process.kill()
            process.wait()

    def inside(self, command: Sequence[str]) -> list[str]:
        """A command that runs in the network of this host."""
        return ["ip", "netns", "exec", self.namespace, *command] if self.namespace else list(command)

    def _start(self, name: str, command: Sequence[str]) -> None:
        programs = self._programs
        environ = {"PATH": f"{programs.folder}:/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONPATH": str(self.patroni)}
        whole = list(command)
        if self.namespace:
            whole = self.inside(
                ["setpriv", f"--reuid={programs.uid}", f"--regid={programs.gid}", "--clear-groups", *command]
            )
        log = self.folder / f"{name}.log"
        self._running[name] = started(programs, whole, log, environ=environ, as_root=bool(self.namespace))

    @property
    def patroni(self) -> Path:
        """A copy of Patroni that the server's account may read, wherever the sources lie."""
        return self.folder.parent / "patroni"

    def said(self) -> str:
        """The end of its log."""
        return (self.folder / "patroni.log").read_text(errors="replace")[-3000:]

    def _postmaster(self) -> int:
        try:
            return int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        except (OSError, IndexError):
            raise ProcessLookupError from None

    def _signal(self, which: signal.Signals) -> None:
        """Patroni goes first, so that it does not start anew what ends."""
        pids = [self._running["patroni"].pid] if "patroni" in self._running else []
        with suppress(ProcessLookupError):
            first = self._postmaster()
            children = Path(f"/proc/{first}/task/{first}/children")
            pids += [first, *(map(int, children.read_text().split()) if children.exists() else ())]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, which)

    def _config(self, hosts: Sequence[Host]) -> dict[str, Any]:
        parameters = {
            "shared_buffers": "16MB",
            "max_connections": 150,
            "wal_log_hints": "on",
            "wal_keep_size": "64MB",
            "min_wal_size": "16MB",
            "wal_receiver_timeout": "5s",
            "wal_sender_timeout": "5s",
        }
        dcs = {
            "ttl": TTL_S,
            "loop_wait": 2,
            "retry_timeout": 4,
            "primary_start_timeout": 0,  # a primary that died is not waited for
            "synchronous_mode": True,
            "postgresql": {"use_pg_rewind": True, "use_slots": True, "parameters": parameters},
        }
        everybody = "0.0.0.0/0"
        secret = "a-password-of-this-test"
        return {
            "scope": NAME,
            "name": f"pg{self.number}",
            "restapi": {"listen": self.at("patroni"), "connect_address": self.at("patroni")},
            "etcd3": {"hosts": [host.at("etcd") for host in hosts]},
            "bootstrap": {
                "dcs": dcs,
                "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, {"wal-segsize": "4"}, "data-checksums"],
                "pg_hba": [f"host replication all {everybody} trust", f"host all all {everybody} trust"],
            },
            "postgresql": {
                "listen": self.at("postgres"),
                "connect_address": self.at("postgres"),
                "data_dir": str(self.folder / "data"),
                "bin_dir": str(self._programs.folder),
                "pgpass": str(self.folder / "pgpass"),
                "authentication": {
                    "replication": {"username": "replicator", "password": secret},
                    "superuser": {"username": USER, "password": secret},
                },
                "pg_hba": [f"host replication all {everybody} trust", f"host all all {everybody} trust"],
                "parameters": {"unix_socket_directories": "", "fsync": "off"},
            },
        }


class Trio:
    """All hosts."""

    def __init__(self, hosts: Sequence[Host], client: Callable[[Sequence[str]], list[str]] = list) -> None:
        self.hosts = hosts
        self.inside_client = client
        """A command that runs where clients are."""

    @property
    def url(self) -> Secret:
        """The address with all three."""
        return Secret(f"postgresql://{USER}@{','.join(host.at('postgres') for host in self.hosts)}/postgres")

    def leader(self) -> Host:
        """The host whose PostgreSQL writes, as Patroni says; asserts that there is one."""
        (found,) = [host for host in self.hosts if self._answers(host, "primary")]
        return found

    def others(self, host: Host) -> Sequence[Host]:
        """All but this one."""
        return [one for one in self.hosts if one is not host]

    def is_well(self) -> bool:
        """Whether there are a primary and two replicas, and commits wait for one of them."""
        roles = [sum(self._answers(host, role) for host in self.hosts) for role in ("primary", "replica")]
        return roles == [1, HOSTS - 1] and any(self._answers(host, "synchronous") for host in self.hosts)

    def wait_until_well(self) -> None:
        """Until it is as at the beginning."""
        until(self.is_well, "Patroni's three hosts", within_s=READY_S)

    def switch_over(self) -> None:
        """Ask Patroni to let another one write."""
        leader = self.leader()
        body = json.dumps({"leader": f"pg{leader.number}"})
        curl = ["curl", "-sf", "-m", str(READY_S), "-d", body, f"http://{leader.at('patroni')}/switchover"]
        subprocess.run(self.inside_client(curl), check=True, timeout=READY_S + 1, stdout=subprocess.DEVNULL)

    def _answers(self, host: Host, role: str) -> bool:
        curl = ["curl", "-sf", "-o", "/dev/null", "-m", str(ANSWER_S), f"http://{host.at('patroni')}/{role}"]
        return subprocess.run(self.inside_client(curl), check=False, timeout=10).returncode == 0


def need_patroni() -> None:
    """Skip where something is missing; in CI nothing may be."""
    need("etcd", "curl")
    if not (PATRONI / "patroni").is_dir():
        _missing(f"Patroni below {PATRONI.name}")


def _missing(what: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing; `scripts/setup servers` installs it")
    pytest.skip(f"needs {what}")


@contextmanager
def patroni_trio() -> Iterator[Trio]:
    """Three hosts on loopback, well."""
    need_patroni()
    with folder_of_programs(is_debians=True) as (programs, folder):
        hosts = [Host(number, programs, folder / f"host-{number}") for number in range(1, HOSTS + 1)]
        with _running(Trio(hosts), folder) as trio:
            yield trio


@contextmanager
def networked_trio() -> Iterator[Trio]:
    """Three hosts, each in a network of its own, and clients in a fourth; needs root."""
    need_patroni()
    need("ip", "setpriv")
    with _networks(HOSTS + 1) as names, folder_of_programs(is_debians=True) as (programs, folder):
        hosts = [
            Host(number, programs, folder / f"host-{number}", namespace=names[number - 1])
            for number in range(1, HOSTS + 1)
        ]
        client = names[-1]
        with _running(Trio(hosts, lambda command: ["ip", "netns", "exec", client, *command]), folder) as trio:
            yield trio


def cut_off(host: Host, *, is_cut: bool) -> None:
    """Let nothing in or out of a host, or let it again."""
    _ip("-n", f"{NAME}sw", "link", "set", f"{NAME}p{host.number}", "down" if is_cut else "up")


@contextmanager
def _running(trio: Trio, folder: Path) -> Iterator[Trio]:
    shutil.copytree(PATRONI, folder / "patroni")
    with ExitStack() as stack:
        for host in trio.hosts:
            stack.callback(host.end)
            host.start_etcd(trio.hosts)
        for host in trio.hosts:
            host.start(trio.hosts)
        try:
            trio.wait_until_well()
        except BaseException:
            sys.stderr.write("\n".join(host.said() for host in trio.hosts))
            raise
        yield trio


@contextmanager
def _networks(count: int) -> Iterator[Sequence[str]]:
    """Namespaces that reach each other over a bridge in one more."""
    switch, names = f"{NAME}sw", [f"{NAME}n{number}" for number in range(1, count + 1)]
    with ExitStack() as stack:
        for name in (switch, *names):
            try:
                _ip("netns", "add", name)
            except (OSError, subprocess.CalledProcessError):
                _missing("the right to make network namespaces (root)")
            stack.callback(_ip, "netns", "del", name)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(names, 1):
            port = f"{NAME}p{number}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", name, "link", "set", link, "up")
        yield names


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=10, stderr=subprocess.DEVNULL)
