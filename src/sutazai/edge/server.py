"""
The server: it listens, keeps its connections, looks at the clock for all of them, and stops politely.

Stopping: `/readyz` says no; after `unready_s` nothing new is accepted; what is under way finishes within `drain_s`;
what then remains is told so in its own dialect.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import structlog

from sutazai.core.errors import SutazaiError
from sutazai.core.request import Place
from sutazai.edge.asgi import AsgiCycle
from sutazai.edge.auth import Gatekeeper
from sutazai.edge.compress import Compressor
from sutazai.edge.connection import ClientConnection
from sutazai.edge.cycle import TaskCycle
from sutazai.edge.direct import DirectCycle, Handler
from sutazai.edge.exchange import Exchange
from sutazai.edge.heads import Heads
from sutazai.edge.incoming import Incoming
from sutazai.gateway.accounts import Accounts
from sutazai.ports.inference import Inference
from sutazai.settings.model import Server as Limits

if TYPE_CHECKING:
    from starlette.types import ASGIApp

log = structlog.get_logger("sutazai.edge")

SWEEP_S = 0.25
SEND_BUFFER_BYTES = 256 * 1024
"""What the kernel holds for a client that does not read; left to itself it takes megabytes for each."""
OPEN_TO_ALL = frozenset({b"/healthz", b"/readyz", b"/", b"/openapi.json"})
"""Probes of load balancers carry no key and an address as `Host`; the others are the same for everybody."""
OPEN_FOLDER = b"/assets/"


class Server:
    """All client connections of one gateway process."""

    def __init__(
        self,
        answers: Inference,
        app: ASGIApp,
        *,
        direct: Mapping[tuple[bytes, bytes], Handler],
        gatekeeper: Gatekeeper,
        accounts: Accounts,
        limits: Limits,
        keep_alive_s: Callable[[], float],
        place_of: Callable[[str], Place | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Make the server; it listens from `serve` on.

        Args:
            app: answers everything but inference, and
            direct: what is not answered here, by method and path.
            keep_alive_s: how often a stream without a token gets a sign of life, as of now.
            place_of: where a request, by its id, stands in line; None for one that does not wait.
        """
        self.answers = answers
        self.app = app
        self._direct = direct
        self.gatekeeper = gatekeeper
        self.accounts = accounts
        self.place_of = place_of
        self.limits = limits
        self.clock = clock
        self.heads = Heads()
        self.compressor = Compressor(from_bytes=limits.compress_from_bytes)
        self.loop = asyncio.get_running_loop()
        self.in_flight: dict[str, Exchange] = {}
        self.buffered_bytes = 0
        self.unready = False
        self.draining = False
        self._keep_alive_s = keep_alive_s
        self._connections: set[ClientConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None
        self._prefix = f"{os.urandom(6).hex()}-"
        self._count = 0

    async def bind(self) -> int:
        """Take the address, and let nobody in before `serve`; returns the port. Raises `OSError` where it is taken."""
        self._listener = await self.loop.create_server(
            lambda: ClientConnection(self),
            self.limits.host,
            self.limits.port,
            backlog=4096,
            reuse_address=True,
            start_serving=False,
        )
        for listening in self._listener.sockets:  # its connections inherit it
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    async def serve(self) -> None:
        """Let clients in. After `bind`."""
        if self._listener is not None:
            await self._listener.start_serving()

    async def run(self) -> None:
        """Look at the clock until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                self.sweep()
            except Exception:  # the border of one turn
                log.exception("sweep failed")

    def sweep(self) -> None:
        """Enforce the limits on clients, and keep waiting streams alive."""
        self.heads.tick()
        now = self.loop.time()
        for connection in list(self._connections):
            connection.check(now)
        keep_alive_s, now = self._keep_alive_s(), self.clock()
        for exchange in list(self.in_flight.values()):
            exchange.check(now, keep_alive_s)

    async def stop(self) -> None:
        """Finish what is under way, within the limits, and close everything."""
        self.unready = True
        await asyncio.sleep(self.limits.unready_s)
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.close_if_idle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.limits.drain_s):
                while self.in_flight or self._tasks:
                    await asyncio.sleep(0.02)
        if self.in_flight:
            log.warning("requests cut off", count=len(self.in_flight), drain_s=self.limits.drain_s)
        for exchange in list(self.in_flight.values()):
            exchange.stop()
        for task in list(self._tasks):
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while self._connections:
                    await asyncio.sleep(0.02)
        for connection in list(self._connections):
            connection.transport.abort()

    # for connections

    @property
    def connections(self) -> int:
        """Open client connections."""
        return len(self._connections)

    def opened(self, connection: ClientConnection) -> None:
        """A client connected."""
        if self.draining or len(self._connections) >= self.limits.max_connections:
            connection.transport.abort()
        else:
            self._connections.add(connection)

    def closed(self, connection: ClientConnection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)

    def next_id(self) -> str:
        """A request id: unique among all gateways."""
        count = self._count = self._count + 1
        return f"{self._prefix}{count}"

    def is_open_to_all(self, path: bytes) -> bool:
        """Whether this address needs neither key nor a known host name."""
        return path in OPEN_TO_ALL or path.startswith(OPEN_FOLDER)

    def handler_of(self, method: bytes, path: bytes) -> Handler | None:
        """What answers this without the application."""
        return self._direct.get((method, unquote_to_bytes(path) if b"%" in path else path))

    def begin_task(self, connection: ClientConnection, incoming: Incoming, body: bytes) -> None:
        """Answer anything but inference."""
        handler = incoming.direct
        cycle: TaskCycle
        if handler is None:
            cycle = AsgiCycle(self, connection, incoming, body)
        else:
            cycle = DirectCycle(self, connection, incoming, body, handler)
        connection.cycle = cycle
        cycle.begin()

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run the application for one request; `stop` waits for it."""
        task = self.loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def refused(self, incoming: Incoming, status: int, error: SutazaiError) -> None:
        """A request was refused before it was read."""
        log.info("request refused", path=incoming.path.decode("latin-1")[:200], status=status, why=error.message)

    def cors(self, incoming: Incoming) -> bytes:
        """Headers that let a browser give the answer to a page that may have it."""
        origin = incoming.headers.get(b"origin")
        if origin is None or not self.gatekeeper.allows_origin(origin):
            return b""
        return (
            b"access-control-allow-origin: %b\r\nvary: origin\r\naccess-control-expose-headers: "
            b"x-request-id, x-sutazai-node, x-sutazai-reason, x-sutazai-cache, x-sutazai-queue-position, "
            b"x-sutazai-queue-eta-seconds, x-sutazai-model, x-ratelimit-limit-requests, "
            b"x-ratelimit-remaining-requests, x-ratelimit-reset-requests, x-ratelimit-limit-tokens, "
            b"x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens, retry-after, x-sutazai-written\r\n" % origin
        )
