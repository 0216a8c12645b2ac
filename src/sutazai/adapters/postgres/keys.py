"""Keys in PostgreSQL."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

import asyncpg
import msgspec

from sutazai.adapters.postgres.audit import record
from sutazai.adapters.postgres.database import Connection, Database
from sutazai.adapters.postgres.identity import key_of, plain_key, plain_limits, word_of
from sutazai.adapters.postgres.mint import mint, name_taken
from sutazai.core.errors import StoreUnavailable
from sutazai.core.identity import ApiKey, Limits, Role, Scope
from sutazai.core.request import Priority
from sutazai.ports.audit import UNNAMED, Action, Actor, Deed
from sutazai.ports.keys import NO_LIMITS

CHANNEL = "sutazai_keys"
"""What the triggers of both tables notify."""
POLL_S = 30.0
"""A look without being told, for what was missed."""
POOLED_POLL_S = 1.0
"""The same behind a PgBouncer in transaction mode, which swallows notifications."""
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0


class PostgresKeyStore:
    """The `KeyStore` of production."""

    def __init__(self, database: Database, *, poll_s: float = POLL_S) -> None:
        self._database = database
        self._sql = database.sql
        self._poll_s = poll_s

    async def create(
        self,
        *,
        name: str,
        tenant: str,
        role: Role,
        scopes: frozenset[Scope] | None = None,
        priority: Priority | None = None,
        limits: Limits = NO_LIMITS,
        by: Actor = UNNAMED,
    ) -> tuple[ApiKey, str]:
        """
        Make a key. Raises `BadRequest` for a name that is taken or cannot be shown.

        After a `StoreUnavailable` the key may be there all the same; `all` tells, and it can be revoked.
        """
        draft, key = mint(
            name=name,
            tenant=tenant,
            role=role,
            scopes=scopes,
            priority=priority,
            limits=limits,
            created_at=datetime.now(UTC),
        )
        async with self._database.transaction() as connection:
            made = await self._insert(connection, draft)
            await record(connection, self._sql, key_created(made), by)
        return made, key

    async def _insert(self, connection: Connection, draft: ApiKey) -> ApiKey:
        try:
            row = await connection.fetchrow(
                self._sql["create_key"],
                draft.id,
                draft.name,
                draft.tenant,
                draft.role.value,
                draft.digest,
                sorted(scope.value for scope in draft.scopes),
                None if draft.priority is None else word_of(draft.priority),
                msgspec.json.encode(plain_limits(draft.limits)).decode(),
            )
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name == "keys_live_name":
                raise name_taken(draft.name) from error
            raise
        return key_of(row)

    async def all(self) -> Sequence[ApiKey]:
        """Every key, revoked ones too, oldest first."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(self._sql["all_keys"])
        return [key_of(row) for row in rows]

    async def revoke(self, key_id: str, *, by: Actor = UNNAMED) -> ApiKey | None:
        """Revoke by id or by name; None where there is no such live key."""
        if not key_id.isprintable():
            return None  # what no key can be called, the server may refuse even to compare
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(self._sql["revoke_key"], key_id)
            if row is None:
                return None
            revoked = key_of(row)
            await record(connection, self._sql, key_revoked(revoked), by)
        return revoked

    async def changes(self) -> AsyncIterator[None]:
        """Yield after each change of a key or tenant, and whenever listening began: what was before went unheard."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                async with self._database.own_connection() as connection:
                    ear = _Ear(connection, self._sql["keys_fingerprint"])
                    await ear.open()
                    pause_s = FIRST_PAUSE_S
                    yield
                    while True:
                        await ear.hear(self._poll_s if self._database.is_direct else POOLED_POLL_S)
                        yield
            except StoreUnavailable:
                await asyncio.sleep(random.uniform(0.5, 1.0) * pause_s)  # noqa: S311
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


class _Ear:
    """Listens on one connection, and looks now and then whether something was missed."""

    def __init__(self, connection: Connection, fingerprint: str) -> None:
        self._connection = connection
        self._statement = fingerprint
        self._called = asyncio.Event()
        self._seen = ""

    async def open(self) -> None:
        """Begin to listen, then look: in this order nothing falls between."""
        self._connection.add_termination_listener(self._call)
        await self._connection.add_listener(CHANNEL, self._call)
        self._seen = await self._look()

    async def hear(self, poll_s: float) -> None:
        """Return when something changed. Raises what the driver raises when the connection is lost."""
        while True:
            try:
                async with asyncio.timeout(poll_s):
                    await self._called.wait()
            except TimeoutError:
                pass
            called = self._called.is_set()
            self._called.clear()
            before, self._seen = self._seen, await self._look()
            if called or self._seen != before:
                return

    async def _look(self) -> str:
        async with self._connection.transaction():
            fingerprint: str = await self._connection.fetchval(self._statement)
        return fingerprint

    def _call(self, *_: object) -> None:
        self._called.set()


def key_created(key: ApiKey) -> Deed:
    """What is written down of a new key."""
    return Deed(action=Action.KEY_CREATED, subject=key.id, detail=plain_key(key))


def key_revoked(key: ApiKey) -> Deed:
    """What is written down of a key that was revoked."""
    return Deed(action=Action.KEY_REVOKED, subject=key.id, detail={"name": key.name, "tenant": key.tenant})
