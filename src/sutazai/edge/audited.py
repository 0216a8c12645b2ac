"""
Actions of administrators, written down around what they do.

For what the database itself changes, the store writes the entry in the same transaction. All else gets an entry before
it, without which it does not take place, and one after it. A client that leaves ends the action, and that is written
down too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import structlog
from starlette.requests import Request as HttpRequest

from sutazai.core.errors import StoreUnavailable, SutazaiError
from sutazai.edge.auth import LOCAL
from sutazai.edge.pool import caller_of
from sutazai.ports.audit import Action, Actor, AuditLog, Deed, Outcome

log = structlog.get_logger("sutazai.audit")

Record = dict[str, Any]

MAX_WHY_CHARACTERS = 500


@dataclass(slots=True)
class Ending:
    """How an action ended, where it ended without an error."""

    failure: str = ""
    """Why it failed all the same; empty where it did not."""


def actor_of(http: HttpRequest) -> Actor:
    """Who asked for it, and by which request."""
    return Actor(id=caller_of(http).key_id or LOCAL, request_id=http.scope["state"]["request_id"])


@asynccontextmanager
async def audited(
    audit: AuditLog, http: HttpRequest, action: Action, subject: str, **detail: object
) -> AsyncIterator[Ending]:
    """
    Write down that an action begins, and how it ended.

    Raises `StoreUnavailable` before anything was done. What the action raises is raised on.
    """
    deed, by = Deed(action=action, subject=subject, detail=detail, outcome=Outcome.BEGUN), actor_of(http)
    await audit.add(deed, by)
    ending = Ending()
    try:
        yield ending
    except BaseException as error:
        ending.failure = _why(error)
        raise
    finally:
        await _write_end(audit, deed, by, ending)


async def audited_records(
    audit: AuditLog, http: HttpRequest, action: Action, subject: str, records: AsyncGenerator[Record, None]
) -> AsyncGenerator[Record, None]:
    """The records of an action that tells its progress; it failed where the last one has an `error`."""
    async with audited(audit, http, action, subject) as ending, aclosing(records):
        async for record in records:
            ending.failure = str(record.get("error", ""))
            yield record


async def _write_end(audit: AuditLog, deed: Deed, by: Actor, ending: Ending) -> None:
    """The action took place, so a log that is away now is no reason to tell its client otherwise."""
    outcome = Outcome.FAILED if ending.failure else Outcome.DONE
    why = {"why": ending.failure[:MAX_WHY_CHARACTERS]} if ending.failure else {}
    try:
        await audit.add(replace(deed, outcome=outcome, detail={**deed.detail, **why}), by)
    except StoreUnavailable as error:
        log.error(
            "end of an action not written down",
            action=deed.action.value,
            subject=deed.subject,
            request_id=by.request_id,
            outcome=outcome.value,
            why=error.message,
        )


def _why(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "The client left, or the gateway stopped."
    return error.message if isinstance(error, SutazaiError) else type(error).__name__
