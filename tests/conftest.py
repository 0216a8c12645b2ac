"""What all tests share: fake model servers, gateways, a time limit, and a check that nothing is left running."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import signal
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest
import uvloop
from hypothesis import HealthCheck, settings
from tests.postgres_servers import embedded
from tests.rabbit_servers import Rabbits, rabbits
from tests.redis_servers import Servers, one_redis, sentinel_trio, six_node_cluster

from sutazai.bootstrap import Gateway, open_gateway
from sutazai.ports.agent import Agent
from sutazai.ports.web import Web
from sutazai.settings.model import Discovery, Logs, NodeSettings, Redis, Settings
from sutazai.testing.node import FakeNode

DEADLINE_S = 60.0
"""For the body of a test; `@pytest.mark.deadline(seconds)` grants another."""
GRACE_S = 15.0
"""For its fixtures, on top."""

PROGRAM_S = 40.0
"""For a program to start or to end."""
TASK_GRACE_S = 2.0
"""For tasks that are about to end."""

StartNode: TypeAlias = Callable[..., Awaitable[FakeNode]]
StartGateway: TypeAlias = Callable[..., Awaitable[Gateway]]
StartProgram: TypeAlias = Callable[[str], Awaitable["Program"]]
Dial: TypeAlias = Callable[..., Awaitable["Wire"]]


def pytest_configure(config: pytest.Config) -> None:
    """Name our marker, and let properties take their time: what is slow here is the machine."""
    config.addinivalue_line("markers", "deadline(seconds): the test may take that long instead of 60 s")
    if os.environ.get("CI") != "true":  # where hypothesis has a profile of its own, that does the same
        settings.register_profile("ours", deadline=None, suppress_health_check=[HealthCheck.too_slow])
        settings.load_profile("ours")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Bound each asynchronous test, and let it begin with the check that ends it."""
    for item in items:
        if config.getoption("loadgroup", default=False):
            _name_its_group(item)
        if not isinstance(item, pytest.Function):
            continue
        if inspect.iscoroutinefunction(item.obj):
            item.obj = _bounded(item.obj, _deadline_s(item))
        if inspect.iscoroutinefunction(_innermost(item.obj)):
            item.fixturenames.insert(0, "no_task_left_over")


def _name_its_group(item: pytest.Item) -> None:
    """Say to xdist which tests one worker is to run: its own way, up to 3.8, has no effect with pytest 9.2."""
    marker = item.get_closest_marker("xdist_group")
    if marker is not None and not item.nodeid.endswith(f"@{marker.args[0]}"):
        item._id = item.id.parse(f"{item.nodeid}@{marker.args[0]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """
    End a test, with its fixtures, that hangs where no event loop could end it.

    Signals reach the main thread alone, so a run in another thread goes without.
    """
    if threading.current_thread() is not threading.main_thread():
        return (yield)
    limit_s = _deadline_s(item) + GRACE_S
    before = signal.signal(signal.SIGALRM, functools.partial(_give_up, limit_s))
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
async def fake_nodes() -> AsyncIterator[StartNode]:
    """A function that starts a `FakeNode` with the arguments it is given; all are closed after the test."""
    async with AsyncExitStack() as stack:

        async def start(*arguments: Any, **keywords: Any) -> FakeNode:
            return await stack.enter_async_context(FakeNode(*arguments, **keywords))

        yield start


@pytest.fixture
async def no_task_left_over() -> AsyncIterator[None]:
    """Fail a test whose tasks outlive it and its fixtures."""
    before = asyncio.all_tasks()
    yield
    left = {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}
    if left:
        # Tasks that were cancelled a moment ago, or close a generator that a library dropped, may end.
        _, left = await asyncio.wait(left, timeout=TASK_GRACE_S)

    assert not left, f"These tasks were still running after the test: {sorted(map(repr, left))}"


def _innermost(test: Any) -> Any:
    """The function that hypothesis wrapped, or the test itself."""
    return test.hypothesis.inner_test if hasattr(test, "hypothesis") else test


def _deadline_s(item: pytest.Item) -> float:
    marker = item.get_closest_marker("deadline")
    return DEADLINE_S if marker is None else float(marker.args[0])


def _bounded(test: Callable[..., Awaitable[None]], limit_s: float) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def bounded(*arguments: Any, **keywords: Any) -> None:
        async with asyncio.timeout(limit_s):
            await test(*arguments, **keywords)

    return bounded


def _give_up(limit_s: float, *_: object) -> None:
    # Event loops, uvloop's above all, log other exceptions and go on; this one they pass through.
    raise SystemExit(f"The test and its fixtures took longer than {limit_s:g} s.")


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The edge is tested on the event loop that it has in production."""
    is_ours = item.path.name.startswith(("test_edge", "test_real_clients"))
    return {"uvloop": uvloop.new_event_loop} if is_ours else {"asyncio": asyncio.new_event_loop}


@pytest.fixture(scope="session")
def data_dir() -> Iterator[Path]:
    """A data folder whose PostgreSQL runs as long as the tests do, so that gateways start at once."""
    with embedded() as (_, folder):
        yield folder


@pytest.fixture
async def gateways(data_dir: Path, fake_nodes: StartNode) -> AsyncIterator[StartGateway]:
    """A function that starts a gateway for these nodes, with groups of settings by name."""
    del fake_nodes  # they are to outlive the gateways
    async with AsyncExitStack() as stack:

        async def start(
            *nodes: FakeNode | NodeSettings,
            with_engine: bool = False,
            with_worker: bool = False,
            agents: Mapping[str, Agent] | None = None,
            web: Web | None = None,
            **groups: Any,
        ) -> Gateway:
            usual: dict[str, Any] = {"discovery": Discovery(ollama=False), "logs": Logs(access=False)}
            settings = Settings(nodes=tuple(map(_listed, nodes)), **usual | groups)
            settings = msgspec.structs.replace(settings, server=msgspec.structs.replace(settings.server, port=0))
            return await stack.enter_async_context(
                open_gateway(
                    settings,
                    data_dir=data_dir,
                    settings_path=None,
                    environ={},
                    with_engine=with_engine,
                    with_worker=with_worker,
                    agents=agents,
                    web=web,
                )
            )

        yield start


def _listed(node: FakeNode | NodeSettings) -> NodeSettings:
    return node if isinstance(node, NodeSettings) else NodeSettings(url=node.url, kind=node.kind.value)


@pytest.fixture
async def programs(data_dir: Path, tmp_path: Path, fake_nodes: StartNode) -> AsyncIterator[StartProgram]:
    """A function that runs `sutazai gateway` with a settings file; all are ended after the test."""
    del fake_nodes  # they are to outlive the programs
    running: list[Program] = []

    async def start(toml: str) -> Program:
        config = tmp_path / f"{len(running)}.toml"
        config.write_text(f'discovery.ollama = false\ndatabase.data_dir = "{data_dir}"\n{toml}')
        program = Program(await _launch_gateway(config))
        running.append(program)
        await program.listens()
        return program

    yield start
    for program in running:
        await program.end()


async def _launch_gateway(config: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sutazai", "gateway", "--config", str(config), stderr=asyncio.subprocess.PIPE
    )


class Program:
    """A gateway in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        self.process = process
        self.port = 0
        self.said = b""
        """Its standard error so far; all of it after `end`."""
        self._stderr = process.stderr

    async def listens(self) -> None:
        """Wait until it tells its port."""
        async with asyncio.timeout(PROGRAM_S):
            while b"/v1, Ollama" not in self.said:
                line = await self._stderr.readline()
                assert line, f"The gateway did not start:\n{self.said.decode()}"
                self.said += line
        self.port = int(self.said.rpartition(b"127.0.0.1:")[2].partition(b" ")[0])

    async def ended(self) -> int:
        """Read on until it has ended; returns its exit code."""
        async with asyncio.timeout(PROGRAM_S):
            self.said += await self._stderr.read()
            return await self.process.wait()

    async def end(self) -> None:
        """Stop it, if it still runs."""
        if self.process.returncode is None:
            self.process.kill()
            await self.ended()


@pytest.fixture
async def dial() -> AsyncIterator[Dial]:
    """A function that opens a raw connection to a port of this machine; all are closed after the test."""
    async with AsyncExitStack() as stack:

        async def connected(port: int, *, limit_bytes: int = 2**22) -> Wire:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=limit_bytes)
            stack.callback(writer.close)
            return Wire(reader, writer)

        yield connected


@dataclass(frozen=True, slots=True)
class Answered:
    """One HTTP answer."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return msgspec.json.decode(self.body)


class Wire:
    """A raw connection: bytes out, HTTP answers in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *parts: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(b"".join(parts))

    def post(self, path: str, body: object, *headers: str) -> None:
        """Send a request with a JSON body."""
        encoded = body if isinstance(body, bytes) else msgspec.json.encode(body)
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(encoded)}", *headers, "", ""]
        self.send("\r\n".join(lines).encode(), encoded)

    def get(self, path: str, *headers: str, method: str = "GET") -> None:
        """Send a request without a body."""
        self.send("\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode())

    async def head(self) -> Answered:
        """The next head. Raises `IncompleteReadError` where the connection ends first."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(": ") for line in lines[1:] if line)
        return Answered(int(lines[0].split(" ", 2)[1]), {name.lower(): value for name, _, value in pairs}, b"")

    async def answer(self, *, has_body: bool = True) -> Answered:
        """The next answer, whole; `has_body` is False for HEAD."""
        head = await self.head()
        body = await self._body(head) if has_body and head.status not in {100, 204} else b""
        return Answered(head.status, head.headers, body)

    async def gauge(self, name: str) -> float:
        """One number of the metrics."""
        self.get("/metrics")
        page = (await self.answer()).body.decode()
        return next(float(line.split(" ")[1]) for line in page.splitlines() if line.startswith(f"{name} "))

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body; empty at its end."""
        size = int(await self.reader.readline(), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def rest(self) -> bytes:
        """All that comes until the connection ends, in whatever way."""
        parts: list[bytes] = []
        try:
            while part := await self.reader.read(2**16):
                parts.append(part)
        except ConnectionError:
            pass
        return b"".join(parts)

    async def _body(self, head: Answered) -> bytes:
        if "content-length" in head.headers:
            return await self.reader.readexactly(int(head.headers["content-length"]))
        if head.headers.get("transfer-encoding") != "chunked":
            return await self.rest()
        parts: list[bytes] = []
        while part := await self.chunk():
            parts.append(part)
        return b"".join(parts)


@pytest.fixture
def redis_alone(tmp_path: Path) -> Iterator[Servers]:
    """One Redis server of this test's own, which it may hurt."""
    with one_redis(tmp_path) as servers:
        yield servers


@pytest.fixture
def redis_trio(tmp_path: Path) -> Iterator[Servers]:
    """A master, two replicas and three Sentinels of this test's own."""
    with sentinel_trio(tmp_path) as servers:
        yield servers


@pytest.fixture
def redis_cluster(tmp_path: Path) -> Iterator[Servers]:
    """A Cluster of six of this test's own."""
    with six_node_cluster(tmp_path) as servers:
        yield servers


@pytest.fixture(scope="session")
def well_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Servers]]:
    """A function that gives servers, arranged as named, that all tests share and none may hurt."""
    arrangements = {"alone": one_redis, "sentinel": sentinel_trio, "cluster": six_node_cluster}
    with ExitStack() as stack:
        yield functools.cache(
            lambda name: stack.enter_context(arrangements[name](tmp_path_factory.mktemp(f"redis-{name}")))
        )


@pytest.fixture(params=["alone", "sentinel", "cluster"])
def any_redis(request: pytest.FixtureRequest, well_redis: Callable[[str], Servers]) -> Redis:
    """Settings that lead to real servers, in each arrangement; the names of the keys are this test's own."""
    return well_redis(request.param).settings(prefix=uuid.uuid4().hex[:12])


@pytest.fixture(scope="session")
def rabbit_node() -> Iterator[Rabbits]:
    """One RabbitMQ node that tests of the group `rabbitmq` share; one that kills it starts it again."""
    with rabbits(1) as servers:
        yield servers


@pytest.fixture(scope="session")
def rabbit_cluster() -> Iterator[Rabbits]:
    """Three RabbitMQ nodes that tests of the group `rabbitmq` share; one that hurts them calls `restore`."""
    with rabbits(3) as servers:
        yield servers
