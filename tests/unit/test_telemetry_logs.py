"""The line for each request: complete, on one line, and never waited for."""

from __future__ import annotations

import io
import json
import threading

import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.request import Endpoint, Request
from sutazai.telemetry.logs import MAX_PENDING, AccessLog, configure

AT_S = 1_767_225_600.25
"""2026-01-01T00:00:00.250Z."""


class StuckReader(io.StringIO):
    """A terminal that takes nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()
        self.let_go = threading.Event()

    def write(self, text: str) -> int:
        self.reached.set()
        assert self.let_go.wait(10)
        return super().write(text)


class ClosedReader(io.StringIO):
    """The other end of the pipe is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def request(model: str = "llama3", *, tenant: str = "local", stream: bool = True) -> Request:
    return Request("abc-1", Endpoint.OPENAI_CHAT, model, stream, b"{}", tenant, "key-1", 0.0)


def note(log: AccessLog, asked: Request, *, node: str = "a", error: str = "", ttft_s: float | None = 0.25) -> None:
    log.note(asked, node, 502 if error else 200, 1.5, ttft_s, (12, 34), error)


def written(form: str, *requests: Request, error: str = "", node: str = "a") -> str:
    """What a log writes of these requests."""
    out = io.StringIO()
    log = AccessLog(out, form="json" if form == "json" else "text", wall_s=lambda: AT_S)
    log.start()
    for asked in requests:
        note(log, asked, error=error, node=node)
    log.stop()
    return out.getvalue()


def test_a_line_of_json_tells_all_there_is() -> None:
    assert json.loads(written("json", request())) == {
        "event": "request",
        "at": "2026-01-01T00:00:00.250Z",
        "request_id": "abc-1",
        "endpoint": "/v1/chat/completions",
        "model": "llama3",
        "node": "a",
        "tenant": "local",
        "key": "key-1",
        "stream": True,
        "status": 200,
        "duration_us": 1_500_000,
        "ttft_us": 250_000,
        "input_tokens": 12,
        "output_tokens": 34,
    }


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30), st.text(max_size=200))
def test_any_words_make_one_line_of_valid_json(model: str, tenant: str, node: str, error: str) -> None:
    line = written("json", request(model, tenant=tenant), error=error, node=node)
    record = json.loads(line)

    assert line.count("\n") == 1
    assert (record.get("model", ""), record.get("tenant", ""), record.get("node", "")) == (model, tenant, node)
    assert record.get("error", "") == error


@given(st.text(max_size=200))
def test_no_error_of_a_node_breaks_out_of_its_line_of_text(error: str) -> None:
    line = written("text", request(), error=error)

    assert line.endswith("\n")
    assert line[:-1].isprintable()


def test_a_line_of_text_can_be_read() -> None:
    assert written("text", request(), error="It broke.") == (
        "00:00:00 502 /v1/chat/completions llama3 -> a 1500.0 ms first 250 ms 12+34 tokens abc-1 It broke.\n"
    )


def test_a_request_that_reached_no_node_says_so() -> None:
    assert "llama3 -> - " in written("text", request(), node="")
    assert "node" not in json.loads(written("json", request(), node=""))


def test_lines_keep_their_order_and_none_is_lost() -> None:
    lines = written("json", *(request(f"model-{number}") for number in range(5000))).splitlines()

    assert [json.loads(line)["model"] for line in lines] == [f"model-{number}" for number in range(5000)]


@pytest.mark.parametrize("form", ["json", "text"])
def test_when_nobody_reads_lines_are_dropped_and_counted(form: str) -> None:
    """The gateway goes on at once, and the log says later how many are missing."""
    out = StuckReader()
    log = AccessLog(out, form="json" if form == "json" else "text")
    log.start()
    note(log, request())
    assert out.reached.wait(5)
    for _ in range(MAX_PENDING + 1234):
        note(log, request())
    out.let_go.set()
    log.stop()

    lines = out.getvalue().splitlines()
    assert len(lines) == 1 + MAX_PENDING + 1
    assert "1234" in lines[-1]
    assert form == "text" or json.loads(lines[-1]) == {
        "event": "access lines dropped",
        "level": "warning",
        "count": 1234,
    }


def test_a_log_whose_reader_is_gone_goes_on() -> None:
    log = AccessLog(ClosedReader(), form="json")
    log.start()
    note(log, request())
    log.stop()

    assert "access log" not in {thread.name for thread in threading.enumerate()}


def test_events_are_json_with_their_level_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    configure(form="json", level="info")
    try:
        log = structlog.get_logger("test")
        log.debug("not told")
        log.warning("node down", node="a", error=ValueError("odd"))
    finally:
        structlog.reset_defaults()
    (line,) = capsys.readouterr().err.splitlines()
    event = msgspec.json.decode(line)

    assert event["event"] == "node down"
    assert event["level"] == "warning"
    assert event["node"] == "a"
    assert "odd" in event["error"]
    assert event["at"].endswith("Z")


def test_an_error_under_way_is_told_with_its_trace(capsys: pytest.CaptureFixture[str]) -> None:
    configure(form="json", level="info")
    try:
        raise ValueError("odd")
    except ValueError:
        structlog.get_logger("test").exception("turn failed")
    finally:
        structlog.reset_defaults()
    (line,) = capsys.readouterr().err.splitlines()

    assert "ValueError: odd" in msgspec.json.decode(line)["exception"]
