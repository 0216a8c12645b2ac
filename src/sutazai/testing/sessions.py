"""Sessions in memory: the second implementation of the port, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sutazai.core.errors import Conflict, NotFound, StoreUnavailable
from sutazai.core.mark import Mark
from sutazai.core.session import Message, Session


class MemorySessions:
    """A `SessionStore` that can be told to fail as a lost database does."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._messages: dict[str, list[Message]] = {}
        self.is_away = False
        """Whether every call raises `StoreUnavailable`."""

    async def create(self, session: Session, *, at_most: int) -> bool:
        self._check()
        alive = [one for one in self._of(session.tenant) if one.expires_at > session.created_at]
        if len(alive) >= at_most:
            return False
        self._sessions[session.id] = session
        self._messages[session.id] = []
        return True

    async def get(self, tenant: str, session_id: str) -> Session | None:
        self._check()
        session = self._sessions.get(session_id)
        return session if session is not None and session.tenant == tenant else None

    async def page(
        self, tenant: str, *, now: datetime, before: str, limit: int, seen: Mark | None = None
    ) -> Sequence[Session]:
        self._check()
        alive = [one for one in self._of(tenant) if one.expires_at > now and (not before or one.id < before)]
        return sorted(alive, key=lambda session: session.id, reverse=True)[:limit]

    async def history(self, session: Session) -> Sequence[Message]:
        self._check()
        return list(self._messages.get(session.id, ()))

    async def append(self, session: Session, kept: Sequence[Message], news: Sequence[Message]) -> None:
        self._check()
        present = await self.get(session.tenant, session.id)
        if present is None:
            raise NotFound(f"The session {session.id} is gone.")
        if present.version != session.version - 1:
            raise Conflict(f"The session {session.id} had another turn meanwhile.")
        self._sessions[session.id] = session
        numbers = {message.number for message in kept}
        self._messages[session.id] = [one for one in self._messages[session.id] if one.number in numbers] + list(news)

    async def delete(self, tenant: str, session_id: str) -> bool:
        found = await self.get(tenant, session_id)
        if found is None:
            return False
        del self._sessions[session_id], self._messages[session_id]
        return True

    async def sweep(self, now: datetime, *, limit: int) -> int:
        self._check()
        over = [session for session in self._sessions.values() if session.expires_at <= now][:limit]
        for session in over:
            await self.delete(session.tenant, session.id)
        return len(over)

    def _of(self, tenant: str) -> list[Session]:
        return [session for session in self._sessions.values() if session.tenant == tenant]

    def _check(self) -> None:
        if self.is_away:
            raise StoreUnavailable("The sessions in memory were told to be away.")
