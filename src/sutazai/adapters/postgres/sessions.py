"""Sessions in PostgreSQL: the truth about them, whoever else keeps a copy."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import asyncpg
import msgspec

from sutazai.adapters.postgres.database import Connection, Database
from sutazai.core.errors import Conflict, NotFound
from sutazai.core.mark import Mark
from sutazai.core.session import Message, Session

_metadata = msgspec.json.Decoder(dict[str, str])


class PostgresSessionStore:
    """The `SessionStore` of production."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sql = database.sql

    async def create(self, session: Session, *, at_most: int) -> bool:
        async with self._database.transaction() as connection:
            await connection.execute(self._sql["lock_sessions_of_tenant"], session.tenant)
            made = await connection.fetchval(
                self._sql["create_session"],
                session.id,
                session.tenant,
                session.model,
                session.system,
                msgspec.json.encode(session.metadata).decode(),
                session.ttl_s,
                session.created_at,
                session.expires_at,
                session.version,
                session.messages,
                at_most,
            )
        return made is not None

    async def get(self, tenant: str, session_id: str) -> Session | None:
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(self._sql["session"], tenant, session_id)
        return None if row is None else _session(row)

    async def page(
        self, tenant: str, *, now: datetime, before: str, limit: int, seen: Mark | None = None
    ) -> Sequence[Session]:
        values = (tenant, now, before, limit)
        rows = await self._database.rows(self._sql["sessions_of_tenant"], *values, tenant=tenant, seen=seen)
        return [_session(row) for row in rows]

    async def history(self, session: Session) -> Sequence[Message]:
        async with self._database.transaction() as connection:
            rows = await connection.fetch(self._sql["session_history"], session.id, session.version)
        return [Message(number=number, role=role, tokens=tokens, body=body) for number, role, tokens, body in rows]

    async def append(self, session: Session, kept: Sequence[Message], news: Sequence[Message]) -> None:
        """
        Add a turn in one transaction.

        After a `StoreUnavailable` it may be there all the same; the session's version tells.
        """
        async with self._database.transaction() as connection:
            changed = await connection.fetchval(
                self._sql["turn_session"],
                session.tenant,
                session.id,
                session.version,
                session.messages,
                session.expires_at,
            )
            if changed is None:
                await self._explain(connection, session)
            await connection.execute(self._sql["drop_messages"], session.id, [message.number for message in kept])
            await connection.execute(
                self._sql["add_messages"],
                session.id,
                session.version,
                [message.number for message in news],
                [message.role for message in news],
                [message.tokens for message in news],
                [message.body for message in news],
            )

    async def delete(self, tenant: str, session_id: str) -> bool:
        async with self._database.transaction() as connection:
            return await connection.fetchval(self._sql["delete_session"], tenant, session_id) is not None

    async def sweep(self, now: datetime, *, limit: int) -> int:
        async with self._database.transaction() as connection:
            return len(await connection.fetch(self._sql["sweep_sessions"], now, limit))

    async def _explain(self, connection: Connection, session: Session) -> None:
        """Why a turn could not be added: always raises."""
        row = await connection.fetchrow(self._sql["session"], session.tenant, session.id)
        raise gone(session) if row is None else overtaken(session)


def gone(session: Session) -> NotFound:
    """The session was deleted, or its time was over, while a turn was answered."""
    return NotFound(f"The session {session.id} was deleted while the turn was answered; begin a new one.")


def overtaken(session: Session) -> Conflict:
    """Another turn came first."""
    return Conflict(
        f"The session {session.id} had another turn while this one was answered; nothing of this one was kept. "
        "Read the session's messages and send it again."
    )


def _session(row: asyncpg.Record) -> Session:
    return Session(
        id=row["id"],
        tenant=row["tenant"],
        model=row["model"],
        system=row["system"],
        metadata=_metadata.decode(row["metadata"]),
        ttl_s=row["ttl_s"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        version=row["version"],
        messages=row["messages"],
    )
