"""
Keeps one engine alive: starts it, watches it, restarts it, stops it.

The node keeps its name and its key over restarts; the port changes, so `started` tells the new address.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from typing import TYPE_CHECKING

import msgspec

from sutazai.adapters.llamacpp import engine
from sutazai.adapters.llamacpp.engine import Order, Ready
from sutazai.adapters.llamacpp.process import EngineProcess, launch
from sutazai.adapters.llamacpp.spec import EngineSpec, check_model
from sutazai.core.errors import EngineFault
from sutazai.core.node import Node, NodeKind
from sutazai.settings.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ENGINE = (sys.executable, "-P", "-m", "sutazai.adapters.llamacpp.engine")
"""`-P`: a file in the working directory must not be taken for a module."""

LOAD_BYTES_PER_S = 50_000_000
"""What a slow disk reads."""

BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0

STEADY_S = 60.0
"""A run of this length was a success: the next restart is quick again."""

CHECK_S = 2.0
"""Between two looks at its memory."""

GRACE_S = 2.0
"""Beyond what the engine itself may take to drain, before SIGKILL."""

MIB = 1024**2

GROWTH = 1.5
"""How much the memory must have grown since the start for a restart to give something back: a large model may
be over its limit from the beginning."""


class EngineSupervisor:
    """
    One model, one process at a time.

    `await start()` first, then `run()` in a task group, `await stop()` at the end. The callbacks are for
    restarts alone: `stopped(node_name, why)` when the process ended or a restart failed,
    `started(node, api_key)` when it is back.

    `drain_s` is what requests may take to finish on `stop`, `start_s` what the engine may take to become
    ready beside reading its model.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        started: Callable[[Node, Secret], None],
        stopped: Callable[[str, str], None],
        is_idle: Callable[[], bool],
        drain_s: float = 30.0,
        start_s: float = 60.0,
        command: Sequence[str] = ENGINE,
    ) -> None:
        self._spec = spec
        self._started = started
        self._stopped = stopped
        self._is_idle = is_idle
        self._drain_s = drain_s
        self._start_s = start_s
        self._command = command
        self._api_key = Secret(secrets.token_urlsafe(32))
        self._process: EngineProcess | None = None
        self._launching = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._rss_at_start = 0
        self._up_since = 0.0
        self._backoff_s = BACKOFF_S

    async def start(self) -> tuple[Node, Secret]:
        """
        Start the engine and wait until it answers.

        Raises `EngineFault` with the reason and what to do. Failed or cancelled, it leaves no process behind.
        """
        check_model(self._spec.model_path)
        process = await self._launch()
        try:
            ready = await self._readiness(process)
        except BaseException:
            await process.end(0)
            raise
        self._rss_at_start = process.rss_bytes()
        self._up_since = asyncio.get_running_loop().time()
        return self._node(ready), self._api_key

    @property
    def rss_bytes(self) -> int:
        """Memory that the engine held when it had started; 0 before."""
        return self._rss_at_start

    async def run(self) -> None:
        """Watch and restart, after a successful `start` and until `stop`. Cancelled, it kills the process."""
        try:
            while await self._went_down():
                await self._bring_back()
        finally:
            if self._process is not None:
                await self._process.end(0)

    async def stop(self) -> None:
        """
        Let requests under way finish for `drain_s`, then end the process.

        It is gone when this returns, and `run` ends too. Cancelled, it kills at once.
        """
        self._stopping.set()
        async with self._launching:
            process = self._process
        if process is not None:
            await process.end(self._drain_s + GRACE_S)

    async def _launch(self) -> EngineProcess:
        async with self._launching:
            if self._stopping.is_set():
                raise EngineFault("The engine was stopped before it had started. Start SutazAI again.")
            self._process = await launch(self._command)
        self._process.order(msgspec.json.encode(self._order()))
        return self._process

    async def _readiness(self, process: EngineProcess) -> Ready:
        path = self._spec.model_path
        limit_s = self._start_s + path.stat().st_size / LOAD_BYTES_PER_S
        try:
            async with asyncio.timeout(limit_s):
                line = await process.first_line()
        except TimeoutError as error:
            raise EngineFault(
                f"The engine was not ready with {path} within {limit_s:.0f} s. "
                f"Use a smaller model or a faster disk. {process.last_words()}"
            ) from error
        if not line.endswith(b"\n"):
            await process.end(GRACE_S)
            raise EngineFault(self._obituary(process))
        return msgspec.json.decode(line, type=Ready)

    async def _went_down(self) -> bool:
        """True when the process ended, or was ended for its memory; False when `stop` ended it."""
        process = self._process
        if process is None:
            raise RuntimeError("An engine was to be watched before it had been started; await start() first.")
        while not await _within(process.ended, CHECK_S):
            rss_bytes = process.rss_bytes()
            if is_bloated(rss_bytes, self._rss_at_start, self._spec.max_rss_bytes) and self._is_idle():
                self._tell(f"It held {rss_bytes // MIB} MiB, more than max_rss_bytes.")
                await process.end(self._drain_s + GRACE_S)
                return not self._stopping.is_set()
        self._tell(self._obituary(process))
        return not self._stopping.is_set()

    async def _bring_back(self) -> None:
        """Try to start until it works or `stop` comes."""
        if asyncio.get_running_loop().time() - self._up_since >= STEADY_S:
            self._backoff_s = BACKOFF_S
        while not await _within(self._stopping, self._backoff_s):
            self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)
            try:
                node, api_key = await self.start()
            except EngineFault as fault:
                self._tell(fault.message)
            else:
                self._started(node, api_key)
                return

    def _tell(self, why: str) -> None:
        if not self._stopping.is_set():
            self._stopped(self._spec.name, why)

    def _order(self) -> Order:
        return Order(
            model_path=str(self._spec.model_path),
            name=self._spec.name,
            slots=self._spec.slots,
            context_tokens=self._spec.context_tokens,
            threads=self._spec.threads,
            batch_tokens=self._spec.batch_tokens,
            api_key=self._api_key.reveal(),
            drain_s=self._drain_s,
        )

    def _node(self, ready: Ready) -> Node:
        return Node(
            name=self._spec.name,
            kind=NodeKind.LLAMACPP,
            url=ready.url,
            slots=self._spec.slots,
            source="embedded",
        )

    def _obituary(self, process: EngineProcess) -> str:
        path, words = self._spec.model_path, process.last_words()
        match process.returncode:
            case engine.NO_WHEEL:
                return (
                    "The embedded engine could not be loaded. Install it with "
                    f"`pip install 'sutazai[embedded]'`, in slim images also the package libgomp1. {words}"
                )
            case engine.NO_MODEL:
                return f"llama.cpp refused the model {path}. Fetch the file again or name another. {words}"
            case -9:
                return (
                    f"The engine of {path} was killed, most likely because memory ran out. "
                    "Use a smaller model, or fewer slots or context_tokens under [engine]."
                )
        return f"The engine of {path} ended with status {process.returncode}. {words}"


def is_bloated(rss_bytes: int, rss_at_start: int, max_rss_bytes: int) -> bool:
    """Whether a restart is worth it: over the limit, and well over what it began with."""
    return rss_bytes > max_rss_bytes and rss_bytes > GROWTH * rss_at_start


async def _within(event: asyncio.Event, limit_s: float) -> bool:
    """True as soon as the event is set; False when the time is up."""
    try:
        async with asyncio.timeout(limit_s):
            return await event.wait()
    except TimeoutError:
        return False
