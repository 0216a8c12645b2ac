"""
Tells the end of a task to the address that was left with it: signed, again after a failure, and at least once.

The body is signed with a secret of the tenant's own, which is derived from the secret in the settings: what one tenant
can verify it cannot forge for another. Several gateways share the work; whoever dies with one in hand loses its lease.
"""

from __future__ import annotations

import asyncio
import hmac
import random
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec
import structlog

from sutazai.core.errors import BadRequest, Forbidden, StoreUnavailable, SutazaiError
from sutazai.core.mark import WRITTEN
from sutazai.ports.marks import Marks
from sutazai.ports.web import Web
from sutazai.ports.webhooks import DueWebhook, WebhookStore

log = structlog.get_logger("sutazai.webhooks")

AT_ONCE = 32
"""Told at the same time."""
LEASE_S = 60.0
ANSWER_S = 15.0
"""Bound on one attempt; well within the lease."""
MAX_ATTEMPTS = 10
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 6 * 3600.0
GONE = 410
"""The status by which a receiver says that it wants no more."""


class Webhooks:
    """Tells ends, as they come due. `run` until cancelled."""

    def __init__(
        self,
        store: WebhookStore,
        web: Web,
        marks: Marks,
        secret: str,
        *,
        wall_s: Callable[[], float] = time.time,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._web = web
        self._marks = marks
        self._secret = secret
        self._wall_s = wall_s
        self._random = random

    async def run(self) -> None:
        """Look whenever some may be due. What is under way at a cancellation is told again later."""
        async for _ in self._store.due():
            with suppress(StoreUnavailable):  # the next look comes soon, and says nothing new about it
                while await self.tell_due() == AT_ONCE:
                    pass

    async def tell_due(self) -> int:
        """Tell what is due now, up to a bound; how many that were. Raises `StoreUnavailable`."""
        due = await self._store.claim(limit=AT_ONCE, lease_s=LEASE_S)
        async with asyncio.TaskGroup() as group:
            for webhook in due:
                group.create_task(self._tell(webhook), name=f"tell the end of {webhook.task.id}")
        return len(due)

    async def _tell(self, webhook: DueWebhook) -> None:
        why = await self._failure(webhook)
        with suppress(StoreUnavailable):  # its lease ends, and it is told again
            if not why:
                await self._store.settle(webhook)
            elif webhook.attempt >= MAX_ATTEMPTS or not why.is_passing:
                log.warning("webhook given up", task=webhook.task.id, attempts=webhook.attempt, why=why.words)
                await self._store.settle(webhook)
            else:
                log.info("webhook failed", task=webhook.task.id, attempt=webhook.attempt, why=why.words)
                await self._store.postpone(webhook, pause_s=pause_s(webhook.attempt, self._random()))

    async def _failure(self, webhook: DueWebhook) -> _Failure | None:
        """Why it was not told; None where it was."""
        body = body_of(webhook)
        tenant = webhook.task.draft.tenant
        key = tenant_secret(self._secret, tenant)
        headers = {
            "content-type": "application/json",
            "user-agent": "sutazai",
            "x-sutazai-signature": signature(key, body, at_s=int(self._wall_s())),
        }
        self._marks.note(tenant)
        if mark := await self._marks.newest(tenant):  # whoever asks for the task now is not to be told less
            headers[WRITTEN] = str(mark)
        try:
            async with asyncio.timeout(ANSWER_S):
                status = await self._web.post(webhook.task.draft.webhook, body, headers)
        except (Forbidden, BadRequest) as error:
            return _Failure(error.message, is_passing=False)
        except SutazaiError as error:
            return _Failure(error.message)
        except TimeoutError:
            return _Failure(f"It did not answer within {ANSWER_S:g} s.")
        except Exception as error:  # the border of one turn
            log.exception("webhook was not sent", task=webhook.task.id)
            return _Failure(repr(error))
        if 200 <= status < 300:
            return None
        return _Failure(f"It answered {status}.", is_passing=status != GONE)


class _Failure:
    def __init__(self, words: str, *, is_passing: bool = True) -> None:
        self.words = words
        self.is_passing = is_passing


def pause_s(attempt: int, random: float) -> float:
    """
    Before the next attempt: grows threefold, half of it by chance, so that a receiver that was away is not flooded.

    Args:
        attempt: the one that failed, from 1.
        random: from 0 to 1.
    """
    bound_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 3.0 ** (attempt - 1))
    return bound_s * (0.5 + random / 2)


def tenant_secret(secret: str, tenant: str) -> str:
    """The secret of one tenant: what its receivers verify with."""
    return "whsec_" + hmac.digest(secret.encode(), f"webhooks of {tenant}".encode(), "sha256").hex()


def signature(key: str, body: bytes, *, at_s: int) -> str:
    """
    The header: `t=SECONDS,v1=HEX`, HMAC-SHA256 of `SECONDS.BODY`.

    The time is part of what is signed, so that an old message cannot be sent again later.
    """
    return f"t={at_s},v1={hmac.digest(key.encode(), b'%d.%b' % (at_s, body), 'sha256').hex()}"


def body_of(webhook: DueWebhook) -> bytes:
    """What is told. `id` is the same in each attempt, so that a receiver can leave out what it knows."""
    task = webhook.task
    return msgspec.json.encode(
        {
            "id": f"{task.id}.{webhook.version}",
            "object": "event",
            "type": f"task.{webhook.status.value}",
            "data": {
                "id": task.id,
                "object": "task",
                "agent": task.draft.agent,
                "status": task.status.value,
                "result": msgspec.Raw(task.result.encode()) if task.result else None,
                "result_object": task.result_object or None,
                "reason": None if task.reason is None else task.reason.value,
                "error": task.error or None,
                "attempts": task.attempts,
                "tokens": task.tokens,
                "created_at": task.created_at,
                "ended_at": task.ended_at,
            },
        }
    )
