"""Requests from within are counted once each, however they end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from sutazai.core.errors import NodeUnreachable, Overloaded, SutazaiError
from sutazai.core.request import Endpoint, Head, Request, Usage
from sutazai.edge.errors import status_of
from sutazai.gateway.accounted import CLIENT_LEFT, Accounted
from sutazai.ports.inference import Call, Reply


@dataclass(slots=True)
class Notes:
    """Accounts that write down what they are told."""

    entries: list[tuple[Any, ...]] = field(default_factory=list)

    def note(self, request: Request, *told: Any) -> None:
        self.entries.append((request.id, *told))


@dataclass(slots=True)
class Within:
    reply: Reply | None = None
    ended: list[str] = field(default_factory=list)

    def start(self, request: Request, reply: Reply) -> Call:
        self.reply = reply
        return self

    def cancel(self) -> None:
        self.ended.append("cancel")

    def pause(self) -> None:
        self.ended.append("pause")

    def resume(self) -> None:
        self.ended.append("resume")


class Silent:
    def head(self, head: Head) -> None: ...
    def chunk(self, data: bytes) -> None: ...
    def end(self, usage: Usage | None) -> None: ...
    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None: ...
    def fail(self, error: SutazaiError) -> None: ...


@dataclass(slots=True)
class Lab:
    notes: Notes = field(default_factory=Notes)
    within: Within = field(default_factory=Within)
    now: float = 10.0

    def start(self) -> tuple[Call, Reply]:
        stage = Accounted(
            self.within,
            self.notes,  # type: ignore[arg-type]
            status_of=lambda error: status_of(error)[0],
            clock=lambda: self.now,
        )
        request = Request("r", Endpoint.OPENAI_CHAT, "m", False, b"", "t", "k", 10.0)
        call = stage.start(request, Silent())
        assert self.within.reply is not None
        return call, self.within.reply


def head() -> Head:
    return Head(200, b"application/json", None, "n", "warm")


def test_a_stream_is_counted_with_its_first_word_its_parts_and_its_usage() -> None:
    lab = Lab()
    _, reply = lab.start()

    reply.head(head())
    lab.now = 11.0
    reply.chunk(b"a")
    lab.now = 12.0
    reply.chunk(b"b")
    reply.end(Usage(1, 2))

    assert lab.notes.entries == [("r", "n", 200, 12.0, 11.0, 2, Usage(1, 2), "")]


def test_a_whole_answer_is_counted() -> None:
    lab = Lab()
    _, reply = lab.start()

    reply.whole(head(), b"{}", None)

    assert lab.notes.entries == [("r", "n", 200, 10.0, 10.0, 1, None, "")]


@pytest.mark.parametrize(
    ("error", "status"), [(NodeUnreachable("cut", node="n"), 502), (Overloaded("full", retry_after_s=1), 503)]
)
def test_a_failure_is_counted_with_the_status_a_client_would_get(error: SutazaiError, status: int) -> None:
    lab = Lab()
    _, reply = lab.start()

    reply.fail(error)

    assert lab.notes.entries == [("r", "", status, 10.0, 0.0, 0, None, type(error).__name__)]


def test_whoever_leaves_is_counted_once_and_ends_the_call() -> None:
    lab = Lab()
    call, reply = lab.start()

    call.pause()
    call.resume()
    call.cancel()
    call.cancel()
    reply.fail(NodeUnreachable("late", node="n"))

    assert lab.within.ended == ["pause", "resume", "cancel", "cancel"]
    assert [entry[2] for entry in lab.notes.entries] == [CLIENT_LEFT]
