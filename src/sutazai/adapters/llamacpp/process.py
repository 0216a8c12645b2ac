"""
One run of the engine process as its parent sees it: the first line, the last words, the end.

Callbacks of the event loop and no tasks, so whoever holds an `EngineProcess` has nothing else to cancel.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sutazai.core.errors import EngineFault

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_WORDS_BYTES = 4096
"""Of standard error, its end, kept for messages."""

MAX_LINE_BYTES = 64 * 1024
"""Of the first line on standard output."""

REAP_S = 5.0
"""Bound on what follows SIGKILL: nothing but the kernel is in the way then."""


class EngineProcess(asyncio.SubprocessProtocol):
    """A running engine. Made by `launch`; its standard input stays open as long as it is to live."""

    pid: int

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        """The process is gone and its output is read to the end."""
        self.returncode: int | None = None
        """Negative where a signal ended it."""
        self._spoken = asyncio.Event()
        self._line = bytearray()
        self._words = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the process."""
        self._transport = cast("asyncio.SubprocessTransport", transport)
        self.pid = self._transport.get_pid()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Keep the beginning of standard output and the end of standard error."""
        if fd == 1 and not self._spoken.is_set():
            self._line += data
            if b"\n" in data or len(self._line) > MAX_LINE_BYTES:
                self._spoken.set()
        elif fd == 2:
            self._words += data
            del self._words[:-MAX_WORDS_BYTES]

    def connection_lost(self, _error: Exception | None) -> None:
        """Note the end."""
        self.returncode = self._transport.get_returncode()
        self._transport.close()
        self._spoken.set()
        self.ended.set()

    async def first_line(self) -> bytes:
        """The first line of standard output; without its newline where the process ended before."""
        await self._spoken.wait()
        line, newline, _ = bytes(self._line).partition(b"\n")
        return line + newline

    def last_words(self) -> str:
        """What standard error ended with, on one line: its errors, or else its last lines."""
        lines = [line.strip() for line in self._words.decode(errors="replace").splitlines()]
        errors = [line for line in lines if "error" in line.lower()]
        return "; ".join((errors or lines)[-3:])

    def rss_bytes(self) -> int:
        """Memory it holds now; 0 where it is gone or the system does not tell."""
        try:
            pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def order(self, line: bytes) -> None:
        """Write a line to its standard input, which stays open."""
        pipe = cast("asyncio.WriteTransport", self._transport.get_pipe_transport(0))
        pipe.write(line + b"\n")

    async def end(self, patience_s: float) -> None:
        """
        SIGTERM, and SIGKILL where that did not end it in time.

        Cancelled, it kills at once. Either way the process is gone and reaped when this returns.
        """
        try:
            self._signal(signal.SIGTERM)
            async with asyncio.timeout(patience_s):
                await self.ended.wait()
        except TimeoutError:
            pass
        finally:
            await self._kill()

    async def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        async with asyncio.timeout(REAP_S):
            await self.ended.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._transport.send_signal(number)


async def launch(command: Sequence[str]) -> EngineProcess:
    """Start the engine's program. Raises `EngineFault` where it could not even be run."""
    starting = asyncio.ensure_future(asyncio.get_running_loop().subprocess_exec(EngineProcess, *command))
    try:
        _, process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        # uvloop would forget the process that it has just forked.
        _, process = await starting
        await process.end(0)
        raise
    except OSError as error:
        raise EngineFault(f"The engine could not be run as {command[0]} ({error.strerror}). Reinstall it.") from error
    return process
