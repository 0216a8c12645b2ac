"""An action and its two entries, interrupted after each step: nothing is done that the log does not know of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from starlette.requests import Request as HttpRequest

from sutazai.core.errors import NodeRejected, StoreUnavailable
from sutazai.core.identity import Role
from sutazai.edge.audited import MAX_WHY_CHARACTERS, actor_of, audited, audited_records
from sutazai.edge.auth import ANONYMOUS, Caller
from sutazai.ports.audit import Action, Actor
from sutazai.testing.audit import MemoryAuditLog

PULLED = Action.MODEL_PULLED


def asked(caller: Caller = ANONYMOUS) -> HttpRequest:
    return HttpRequest({"type": "http", "headers": [], "state": {"caller": caller, "request_id": "r-1"}})


def told(log: MemoryAuditLog) -> list[tuple[str, str | None]]:
    """The outcome of each entry, and why."""
    return [(entry.outcome, msgspec.json.decode(entry.detail).get("why")) for entry in log.entries]


def test_the_actor_is_the_key_or_else_whoever_is_at_the_machine() -> None:
    assert actor_of(asked(Caller("k1", "acme", Role.ADMIN))) == Actor(id="k1", request_id="r-1")
    assert actor_of(asked()) == Actor(id="local", request_id="r-1")


async def test_an_action_that_is_done_has_two_entries_with_the_same_detail() -> None:
    log = MemoryAuditLog()
    async with audited(log, asked(), PULLED, "llama3", insecure=True):
        assert told(log) == [("begun", None)]

    assert told(log) == [("begun", None), ("done", None)]
    assert {entry.detail for entry in log.entries} == {'{"insecure":true}'}
    assert {(entry.actor, entry.subject, entry.request_id) for entry in log.entries} == {("local", "llama3", "r-1")}


async def test_where_the_log_is_away_the_action_does_not_begin() -> None:
    log = MemoryAuditLog()
    log.is_away = True
    done = []

    with pytest.raises(StoreUnavailable):
        async with audited(log, asked(), PULLED, "llama3"):
            done.append("pulled")
    assert done == []


async def test_where_the_log_goes_away_meanwhile_what_was_done_is_not_called_undone() -> None:
    log = MemoryAuditLog()
    async with audited(log, asked(), PULLED, "llama3"):
        log.is_away = True

    assert told(log) == [("begun", None)]


async def test_where_the_log_goes_away_an_action_that_failed_tells_its_own_error() -> None:
    log = MemoryAuditLog()

    async def pull() -> None:
        async with audited(log, asked(), PULLED, "llama3"):
            log.is_away = True
            raise NodeRejected("It refused.", node="a", status=400)

    with pytest.raises(NodeRejected):
        await pull()
    assert told(log) == [("begun", None)]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (NodeRejected("It refused.", node="a", status=400), "It refused."),
        (NodeRejected("x" * 10_000, node="a", status=400), "x" * MAX_WHY_CHARACTERS),
        (RuntimeError("an address of the machine"), "RuntimeError"),
        (asyncio.CancelledError(), "The client left, or the gateway stopped."),
    ],
    ids=["ours", "long", "unforeseen", "cancelled"],
)
async def test_whatever_ends_an_action_is_written_down_and_goes_on(error: BaseException, why: str) -> None:
    log = MemoryAuditLog()
    with pytest.raises(type(error)):
        async with audited(log, asked(), PULLED, "llama3"):
            raise error

    assert told(log) == [("begun", None), ("failed", why)]


async def records(*made: dict[str, Any], ended: list[str]) -> AsyncGenerator[dict[str, Any], None]:
    try:
        for record in made:
            yield record
    finally:
        ended.append("closed")


@pytest.mark.parametrize(
    ("last", "end"),
    [({"status": "success"}, ("done", None)), ({"error": "no space"}, ("failed", "no space"))],
    ids=["success", "error"],
)
async def test_progress_ends_as_its_last_record_says(last: dict[str, Any], end: tuple[str, str | None]) -> None:
    log, ended = MemoryAuditLog(), list[str]()
    made = records({"status": "pulling"}, last, ended=ended)

    got = [record async for record in audited_records(log, asked(), PULLED, "llama3", made)]

    assert got == [{"status": "pulling"}, last]
    assert told(log) == [("begun", None), end]


async def test_progress_that_nobody_follows_any_more_is_ended_and_written_down() -> None:
    log, ended = MemoryAuditLog(), list[str]()
    made = records({"status": "pulling"}, {"status": "success"}, ended=ended)
    async with aclosing(audited_records(log, asked(), PULLED, "llama3", made)) as progress:
        await anext(progress)

    assert ended == ["closed"]
    assert told(log) == [("begun", None), ("failed", "The client left, or the gateway stopped.")]


async def test_progress_is_not_begun_while_the_log_is_away() -> None:
    log, ended = MemoryAuditLog(), list[str]()
    log.is_away = True
    made = records({"status": "success"}, ended=ended)

    with pytest.raises(StoreUnavailable):
        await anext(audited_records(log, asked(), PULLED, "llama3", made))
    assert ended == []
    await made.aclose()
