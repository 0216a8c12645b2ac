"""
A copy of conversations that are under way, near at hand: what was said need not be read from the database at each turn.

The store behind it stays the truth. Sessions themselves are always read from there, and with them the version that a
copy must have to be used; Redis may lose what it acknowledged, or be behind, and it shows. Every turn is written
through: to the truth first, then here.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import msgspec

from sutazai.adapters.redis.link import RedisLink
from sutazai.core.errors import StoreUnavailable
from sutazai.core.mark import Mark
from sutazai.core.session import Message, Session
from sutazai.ports.sessions import SessionStore

MAX_COPY_BYTES = 1024 * 1024
"""Longer conversations are read from the truth: more does not come within the time a request gives to Redis."""
MAX_KEPT_S = 3600.0
"""Who pauses for longer waits once for the database."""


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """What is kept of a session."""

    version: int
    messages: list[tuple[int, str, int, bytes]]
    """Number, role, tokens, body."""


_decoder = msgspec.msgpack.Decoder(Copy)
_encode = msgspec.msgpack.Encoder().encode


class RedisSessionStore:
    """A `SessionStore` that keeps copies of messages in Redis, and asks the store behind it for all else."""

    hits = 0
    """Histories read from Redis."""
    misses = 0
    """Histories that were not there, or not of the right version."""

    def __init__(self, truth: SessionStore, link: RedisLink) -> None:
        self._truth = truth
        self._link = link

    async def create(self, session: Session, *, at_most: int) -> bool:
        return await self._truth.create(session, at_most=at_most)

    async def get(self, tenant: str, session_id: str) -> Session | None:
        return await self._truth.get(tenant, session_id)

    async def page(
        self, tenant: str, *, now: datetime, before: str, limit: int, seen: Mark | None = None
    ) -> Sequence[Session]:
        return await self._truth.page(tenant, now=now, before=before, limit=limit, seen=seen)

    async def history(self, session: Session) -> Sequence[Message]:
        if not session.version:
            return []
        copy = await self._read(session)
        if copy is not None and copy.version == session.version:
            self.hits += 1
            return [
                Message(number=number, role=role, tokens=size, body=body) for number, role, size, body in copy.messages
            ]
        self.misses += 1
        messages = await self._truth.history(session)
        await self._write(session, messages)
        return messages

    async def append(self, session: Session, kept: Sequence[Message], news: Sequence[Message]) -> None:
        await self._truth.append(session, kept, news)
        await self._write(session, [*kept, *news])

    async def delete(self, tenant: str, session_id: str) -> bool:
        """Forget one; where Redis is away its copy fades by itself, and is not used until then."""
        was_there = await self._truth.delete(tenant, session_id)
        if was_there:
            await self._ask("DEL", self._key(tenant, session_id))
        return was_there

    async def sweep(self, now: datetime, *, limit: int) -> int:
        return await self._truth.sweep(now, limit=limit)

    async def _read(self, session: Session) -> Copy | None:
        found = await self._ask("GET", self._key(session.tenant, session.id))
        try:
            return _decoder.decode(found) if isinstance(found, bytes) else None
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None  # of another version of this program, or somebody else's

    async def _write(self, session: Session, messages: Sequence[Message]) -> None:
        if sum(len(message.body) for message in messages) > MAX_COPY_BYTES:
            return
        copy = Copy(session.version, [(one.number, one.role, one.tokens, one.body) for one in messages])
        kept_ms = max(1, int(min(session.ttl_s, MAX_KEPT_S) * 1000))
        await self._ask("SET", self._key(session.tenant, session.id), _encode(copy), "PX", kept_ms)

    async def _ask(self, *command: bytes | str | int) -> object:
        """What Redis answers; None where it does not."""
        try:
            answer: object = await self._link.ask(lambda client: client.execute_command(*command))
        except StoreUnavailable:
            return None
        return answer

    def _key(self, tenant: str, session_id: str) -> bytes:
        return self._link.key("session", tenant, slot=session_id)
