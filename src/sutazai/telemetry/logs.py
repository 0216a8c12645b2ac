"""
Logs as events, one line each, to standard error.

Events go through structlog. The line for each request does not: it is kept as a tuple on the request path and written
in batches by a thread, so that neither formatting nor a slow terminal is waited for. When the reader of the log is
stuck, lines past a bound are dropped and counted, and the count is logged.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from datetime import UTC, datetime
from typing import IO, Any, Literal

import msgspec
import structlog

MAX_PENDING = 20_000
FLUSH_S = 0.2


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


class AccessRecord(msgspec.Struct, omit_defaults=True, tag_field="event", tag="request"):
    """One request as it is logged."""

    at: float | str
    """Unix seconds until it is written, RFC 3339 in the log."""
    request_id: str
    endpoint: str
    model: str
    node: str
    status: int
    duration_ms: float
    tenant: str = ""
    key: str = ""
    stream: bool | None = None
    ttft_ms: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    error: str = ""


class AccessLog:
    """Lines of requests, written behind."""

    def __init__(self, out: IO[str], *, form: Literal["json", "text"]) -> None:
        self._out = out
        self._form = form
        self._pending: list[AccessRecord] = []
        self._dropped = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="access log", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def note(self, record: AccessRecord) -> None:
        """Keep a line to be written; at most a microsecond."""
        if len(self._pending) < MAX_PENDING:
            self._pending.append(record)
        else:
            self._dropped += 1

    def stop(self) -> None:
        """Write what is left and end; blocks for at most two seconds."""
        self._stopping.set()
        self._thread.join(timeout=2.0)

    def _write_on(self) -> None:
        while not self._stopping.wait(FLUSH_S):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        records, self._pending = self._pending, []
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._out.write(f'{{"event":"access lines dropped","level":"warning","count":{dropped}}}\n')
        if not records:
            return
        write = _json_line if self._form == "json" else _text_line
        try:
            self._out.write("".join(map(write, records)))
            self._out.flush()
        except (OSError, ValueError):  # the reader is gone: requests matter more than their log
            return


def _json_line(record: AccessRecord) -> str:
    record.at = _rfc3339(record.at)
    return msgspec.json.encode(record).decode() + "\n"


def _text_line(record: AccessRecord) -> str:
    tokens = (
        f" {record.input_tokens or 0}+{record.output_tokens or 0} tokens" if record.output_tokens is not None else ""
    )
    first = f" first {record.ttft_ms:.0f} ms" if record.ttft_ms is not None else ""
    moment = time.strftime("%H:%M:%S", time.localtime(float(record.at)))
    return (
        f"{moment} {record.status} {record.endpoint} {record.model} -> {record.node or '-'}"
        f" {record.duration_ms:.1f} ms{first}{tokens} {record.request_id} {record.error}".rstrip()
        + "\n"
    )


def _rfc3339(at: float | str) -> str:
    return datetime.fromtimestamp(float(at), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
