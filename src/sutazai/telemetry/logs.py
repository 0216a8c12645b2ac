"""
Logs as events, one line each, to standard error.

Events go through structlog. The line for each request does not: it is put together by hand and written in batches by a
thread, so that a slow terminal is never waited for. When the reader of the log is stuck, lines past a bound are dropped
and counted, and the count is logged.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import IO, Any, Literal

import msgspec
import structlog

from sutazai.core.request import Request

MAX_PENDING = 20_000
MAX_CONSTANTS = 2000
FLUSH_S = 0.05


def configure(*, form: Literal["json", "text"], level: str) -> None:
    """Set up structlog for this process."""
    renderer: Any = (
        structlog.processors.JSONRenderer(serializer=_to_json)
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=24)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _to_json(event: dict[str, Any], **_: object) -> str:
    return msgspec.json.encode(event, enc_hook=repr).decode()


class AccessLog:
    """
    One line for each request, written behind.

    A line is formatted at once, while all it tells is in the processor's cache (formatting thousands of records later
    cost ten times as much), and a thread writes what has come together.
    """

    def __init__(self, out: IO[str], *, form: Literal["json", "text"], wall_s: Callable[[], float] = time.time) -> None:
        self._out = out
        self._is_json = form == "json"
        self._wall_s = wall_s
        self._lines: list[str] = []
        self._dropped = 0
        self._second = -1
        self._moment = ""
        self._constants: dict[tuple[str, str, str, str, str, bool], str] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="access log", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def note(
        self,
        request: Request,
        node: str,
        status: int,
        duration_s: float,
        ttft_s: float | None,
        usage: tuple[int, int],
        error: str,
    ) -> None:
        """Keep a line to be written; about two microseconds."""
        if len(self._lines) >= MAX_PENDING:
            self._dropped += 1
            return
        at = self._wall_s()
        second = int(at)
        if second != self._second:
            self._second = second
            self._moment = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        # after the fraction of the second, in milliseconds
        when = f"{self._moment}.{int((at - second) * 1000):03d}Z"
        if self._is_json:
            first = "" if ttft_s is None or not request.stream else f',"ttft_us":{int(ttft_s * 1e6)}'
            end = f',"error":{_quoted(error)}}}\n' if error else "}\n"
            line = (
                f'{{"event":"request","at":"{when}","request_id":"{request.id}",{self._constant(request, node)},'
                f'"status":{status},"duration_us":{int(duration_s * 1e6)}{first},'
                f'"input_tokens":{usage[0]},"output_tokens":{usage[1]}{end}'
            )
        else:
            first = "" if ttft_s is None else f" first {ttft_s * 1000:.0f} ms"
            line = (
                f"{when[11:19]} {status} {request.endpoint.path} {request.model} -> {node or '-'} "
                f"{duration_s * 1000:.1f} ms{first} {usage[0]}+{usage[1]} tokens {request.id} {_on_one_line(error)}"
            )
            line = line.rstrip() + "\n"
        self._lines.append(line)

    def stop(self) -> None:
        """Write what is left and end; blocks for at most two seconds."""
        self._stopping.set()
        self._thread.join(timeout=2.0)

    def _constant(self, request: Request, node: str) -> str:
        """What is the same for all requests of a key to a model on a node."""
        key = (request.endpoint.path, request.model, node, request.tenant, request.key_id, request.stream)
        constant = self._constants.get(key)
        if constant is None:
            names = ("endpoint", "model", "node", "tenant", "key")
            pairs = [f'"{name}":{_quoted(value)}' for name, value in zip(names, key[:5], strict=True) if value]
            constant = ",".join([*pairs, f'"stream":{"true" if request.stream else "false"}'])
            if len(self._constants) < MAX_CONSTANTS:
                self._constants[key] = constant
        return constant

    def _write_on(self) -> None:
        while not self._stopping.wait(FLUSH_S):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        count = len(self._lines)
        lines = self._lines[:count]
        del self._lines[:count]  # what came meanwhile stays: each step is one step to other threads
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            lines.append(
                f'{{"event":"access lines dropped","level":"warning","count":{dropped}}}\n'
                if self._is_json
                else f"{dropped} lines were dropped: nobody reads this log fast enough\n"
            )
        if not lines:
            return
        try:
            self._out.write("".join(lines))
            self._out.flush()
        except (OSError, ValueError):  # the reader is gone: requests matter more than their log
            return


def _on_one_line(text: str) -> str:
    """Nodes choose the words of errors, and a terminal obeys control characters."""
    return text if text.isprintable() else "".join(mark if mark.isprintable() else " " for mark in text)


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()
