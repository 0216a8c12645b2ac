"""Webhooks: what is sent, how it is signed, and what becomes of one that fails."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import msgspec
import pytest

from sutazai.core.errors import BadRequest, Forbidden, NodeUnreachable, SutazaiError
from sutazai.core.mark import Mark
from sutazai.core.task import Submitted, TaskDraft, TaskStatus, after, task_id
from sutazai.ports.web import Page
from sutazai.ports.webhooks import DueWebhook
from sutazai.tasks.webhooks import (
    FIRST_PAUSE_S,
    GONE,
    LONGEST_PAUSE_S,
    MAX_ATTEMPTS,
    Webhooks,
    pause_s,
    tenant_secret,
)

NOW = datetime(2026, 5, 1, tzinfo=UTC)
DRAFT = TaskDraft(tenant="acme", agent="echo", webhook="https://example.org/done")
ID = task_id(1.0, 7)


def ended(attempt: int = 1) -> DueWebhook:
    task = after(None, Submitted(DRAFT), id=ID, at=NOW)
    task = replace(task, version=3, status=TaskStatus.COMPLETED, result='{"text": "hi"}', ended_at=NOW)
    return DueWebhook(task=task, version=3, status=TaskStatus.COMPLETED, attempt=attempt)


class Book:
    """A store with what is due."""

    def __init__(self, *due: DueWebhook) -> None:
        self._due = list(due)
        self.settled: list[DueWebhook] = []
        self.postponed: list[float] = []

    async def claim(self, *, limit: int, lease_s: float) -> Sequence[DueWebhook]:
        taken, self._due = self._due[:limit], self._due[limit:]
        return taken

    async def settle(self, webhook: DueWebhook) -> None:
        self.settled.append(webhook)

    async def postpone(self, webhook: DueWebhook, *, pause_s: float) -> None:
        self.postponed.append(pause_s)

    async def due(self) -> AsyncIterator[None]:
        yield None


class Receiver:
    """A web that answers as it was told."""

    def __init__(self, answer: int | SutazaiError = 200) -> None:
        self._answer = answer
        self.got: list[tuple[str, bytes, Mapping[str, str]]] = []

    async def get(self, url: str) -> Page:
        raise NotImplementedError

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        self.got.append((url, body, headers))
        if isinstance(self._answer, SutazaiError):
            raise self._answer
        return self._answer


class Written:
    """Marks of a store that has copies."""

    def __init__(self) -> None:
        self.noted: list[str] = []

    def note(self, tenant: str) -> None:
        self.noted.append(tenant)

    async def newest(self, tenant: str) -> Mark | None:
        return Mark(7, len(self.noted))


def sender(book: Book, web: Receiver) -> Webhooks:
    return Webhooks(book, web, Written(), "secret", wall_s=lambda: 1_700_000_000.5, random=lambda: 1.0)


async def test_the_end_is_told_and_signed_so_that_the_receiver_can_verify_it() -> None:
    book, web = Book(ended()), Receiver(204)
    await sender(book, web).tell_due()
    ((url, body, headers),) = web.got
    told = msgspec.json.decode(body)
    signed = dict(part.split("=") for part in headers["x-sutazai-signature"].split(","))
    key = tenant_secret("secret", "acme").encode()

    assert url == DRAFT.webhook
    assert headers["x-sutazai-written"] == "7-1"  # noted before, so that a gateway of the receiver tells no less
    assert (told["id"], told["type"]) == (f"{ID}.3", "task.completed")
    assert (told["data"]["id"], told["data"]["result"]) == (ID, {"text": "hi"})
    assert signed["t"] == "1700000000"
    assert signed["v1"] == hmac.new(key, signed["t"].encode() + b"." + body, "sha256").hexdigest()
    assert book.settled == [ended()]


@pytest.mark.parametrize("answer", [500, 404, 301, NodeUnreachable("Nobody was there.", node="x")])
async def test_one_that_failed_is_told_again_later(answer: int | SutazaiError) -> None:
    book = Book(ended(attempt=2))
    await sender(book, Receiver(answer)).tell_due()

    assert book.settled == []
    assert book.postponed == [3 * FIRST_PAUSE_S]


@pytest.mark.parametrize(
    ("answer", "attempt"),
    [
        (500, MAX_ATTEMPTS),
        (GONE, 1),
        (Forbidden("It was an address of ours."), 1),
        (BadRequest("It was no address."), 1),
    ],
)
async def test_one_that_cannot_succeed_is_given_up(answer: int | SutazaiError, attempt: int) -> None:
    book = Book(ended(attempt))
    await sender(book, Receiver(answer)).tell_due()

    assert (len(book.settled), book.postponed) == (1, [])


async def test_all_that_is_due_is_told_in_bounded_rounds() -> None:
    book, web = Book(*[ended()] * 70), Receiver()
    await sender(book, web).run()

    assert (len(web.got), len(book.settled)) == (70, 70)


def test_pauses_grow_to_a_bound_and_half_of_each_is_chance() -> None:
    longest = [pause_s(attempt, 1.0) for attempt in range(1, 20)]

    assert longest == sorted(longest)
    assert (longest[0], longest[-1]) == (FIRST_PAUSE_S, LONGEST_PAUSE_S)
    assert pause_s(1, 0.0) == FIRST_PAUSE_S / 2
    assert sum(longest[: MAX_ATTEMPTS - 1]) > 4 * 3600


def test_each_tenant_has_a_secret_of_its_own() -> None:
    secrets = {tenant_secret(secret, tenant) for secret in ("a", "b") for tenant in ("acme", "other")}

    assert len(secrets) == 4
