"""The audit log against those who own the database, and what the migration does to keys that were there before."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from tests.postgres_servers import embedded

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.audit import PostgresAuditLog, record
from sutazai.adapters.postgres.database import Database, open_database
from sutazai.adapters.postgres.keys import PostgresKeyStore
from sutazai.adapters.postgres.tenants import PostgresTenantStore
from sutazai.core.errors import StoreUnavailable
from sutazai.core.identity import Limits, Role, Scope, Tenant
from sutazai.ports.audit import Action, Actor, Deed
from sutazai.settings.secret import Secret

LIMIT_S = 5.0
OPS = Actor(id="ops")
DEED = Deed(action=Action.REQUEST_CANCELLED, subject="r-1")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with embedded() as (url, _):
        yield url


@pytest.fixture
async def empty(server: str) -> AsyncIterator[Database]:
    """A database without a table."""
    async with owner(server) as connection:
        await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    async with open_database(Secret(server), timeout_s=LIMIT_S) as database:
        yield database


@pytest.fixture
async def database(empty: Database) -> Database:
    await migrate.migrate(empty, migrate.read())
    return empty


@asynccontextmanager
async def owner(server: str) -> AsyncIterator[Any]:
    """A connection of somebody who may do all in the database."""
    connection: Any = await asyncpg.connect(server)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def log(database: Database) -> PostgresAuditLog:
    """A log of five entries."""
    log = PostgresAuditLog(database)
    for _ in range(5):
        await log.add(DEED, OPS)
    return log


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET actor = 'nobody'",
        "UPDATE audit SET actor = actor WHERE false",
        "DELETE FROM audit WHERE number = 5",
        "TRUNCATE audit",
        "INSERT INTO audit SELECT * FROM audit ON CONFLICT (number) DO UPDATE SET actor = 'nobody'",
    ],
)
async def test_entries_are_neither_changed_nor_removed(log: PostgresAuditLog, server: str, statement: str) -> None:
    before = await log.newest(limit=10)
    async with owner(server) as connection:
        with pytest.raises(asyncpg.PostgresError, match="never changed or removed"):
            await connection.execute(statement)

    assert await log.newest(limit=10) == before


async def test_number_time_and_seal_are_the_databases_own(log: PostgresAuditLog, server: str) -> None:
    """Whoever writes past the program writes an honest entry all the same."""
    async with owner(server) as connection:
        await connection.execute(
            "INSERT INTO audit VALUES (99, '2000-01-01', 'x', 'y', 'z', '{}', '', 'done', '\\x00', '\\x00')"
        )

    (entry,) = await log.newest(limit=1)
    assert entry.number == 6
    assert entry.at.year > 2000
    assert (await log.verify()).entries == 6


@pytest.mark.parametrize(
    ("statement", "good", "fault"),
    [
        ("UPDATE audit SET actor = 'nobody' WHERE number = 3", 2, "Entry 3 was changed"),
        ("UPDATE audit SET detail = '{\"a\": 1}' WHERE number = 1", 0, "Entry 1 was changed"),
        ("UPDATE audit SET at = at - interval '1 microsecond' WHERE number = 5", 4, "Entry 5 was changed"),
        ("UPDATE audit SET subject = subject || 'd', outcome = 'one' WHERE number = 2", 1, "Entry 2 was changed"),
        ("DELETE FROM audit WHERE number = 3", 2, "Entry 3 is missing"),
        ("DELETE FROM audit WHERE number = 1", 0, "Entry 1 is missing"),
        ("UPDATE audit SET digest = sha256('x') WHERE number = 4", 3, "Entry 4 was changed"),
        (
            "UPDATE audit SET (actor, digest) = ('nobody', sha256('x')) WHERE number = 3;"
            "UPDATE audit SET previous = sha256('x') WHERE number = 4",
            2,
            "Entry 3 was changed",
        ),
    ],
)
async def test_what_an_owner_did_behind_the_triggers_is_found(
    log: PostgresAuditLog, server: str, statement: str, good: int, fault: str
) -> None:
    async with owner(server) as connection:
        await connection.execute(f"ALTER TABLE audit DISABLE TRIGGER ALL; {statement}")

    found = await log.verify()
    assert found.entries == good
    assert fault in found.fault


async def test_an_entry_that_was_replaced_with_a_new_seal_is_found(log: PostgresAuditLog, server: str) -> None:
    """The forger computes the seal of the entry itself, but would have to forge all after it too."""
    async with owner(server) as connection:
        await connection.execute(
            "ALTER TABLE audit DISABLE TRIGGER audit_kept;"
            "CREATE TEMP TABLE later AS SELECT * FROM audit WHERE number > 3;"
            "DELETE FROM audit WHERE number >= 3;"
            "INSERT INTO audit (actor, action, subject, detail, request_id, outcome)"
            " VALUES ('nobody', 'request.cancelled', 'r-1', '{}', '', 'done');"
            "ALTER TABLE audit DISABLE TRIGGER audit_sealed; INSERT INTO audit SELECT * FROM later"
        )

    found = await log.verify()
    assert (found.entries, found.fault) == (
        3,
        "Entry 4 does not follow the one before it: one of the two was replaced.",
    )


async def test_a_log_longer_than_one_look_is_verified_to_its_end(log: PostgresAuditLog, server: str) -> None:
    async with owner(server) as connection:
        await connection.execute(
            "INSERT INTO audit (actor, action, subject, detail, request_id, outcome)"
            " SELECT 'ops', 'model.pulled', n::text, '{}', '', 'done' FROM generate_series(1, 2500) AS n"
        )

    found = await log.verify()
    assert (found.entries, found.fault) == (2505, "")


async def test_without_its_entry_no_change_takes_place(database: Database, server: str) -> None:
    """The log refuses, so the key stays as it is, and so does the tenant."""
    keys, tenants = PostgresKeyStore(database), PostgresTenantStore(database)
    await tenants.set(Tenant(name="acme"))
    made, _ = await keys.create(name="laptop", tenant="acme", role=Role.USER)
    async with owner(server) as connection:
        await connection.execute("ALTER TABLE audit ADD CONSTRAINT full_disk CHECK (false) NOT VALID")

    for action in (
        keys.create(name="other", tenant="acme", role=Role.USER),
        keys.revoke("laptop"),
        tenants.set(Tenant(name="acme", weight=9.0)),
        tenants.delete("acme"),
    ):
        with pytest.raises(StoreUnavailable, match="full_disk"):
            await action
    assert await keys.all() == [made]
    assert await tenants.all() == [Tenant(name="acme")]


async def test_a_gateway_that_does_not_own_the_tables_works_and_cannot_take_the_protection_off(
    database: Database, server: str
) -> None:
    """With the rights that the documentation names."""
    async with owner(server) as connection:
        await connection.execute(
            "DROP ROLE IF EXISTS gateway; CREATE ROLE gateway LOGIN;"
            "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO gateway;"
            "REVOKE UPDATE, DELETE ON audit FROM gateway; GRANT USAGE ON SCHEMA public TO gateway"
        )
    try:
        async with database.transaction() as connection:
            await connection.execute("SET LOCAL ROLE gateway")
            await record(connection, database.sql, DEED, OPS)
        async with owner(server) as connection:
            await connection.execute("SET ROLE gateway")
            for statement in ("ALTER TABLE audit DISABLE TRIGGER audit_kept", "DELETE FROM audit", "DROP TABLE audit"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)
    finally:
        async with owner(server) as connection:
            await connection.execute("DROP OWNED BY gateway; DROP ROLE gateway")

    assert (await PostgresAuditLog(database).verify()).entries == 1


async def test_keys_from_before_the_migration_may_do_all_that_their_role_can(empty: Database) -> None:
    first = migrate.read()[:1]
    await migrate.migrate(empty, first)
    async with empty.transaction() as connection:
        await connection.execute(
            "INSERT INTO keys (id, name, tenant, role, digest) VALUES ('abcdefgh', 'old', 'acme', 'user', sha256('k'))"
        )
    await migrate.migrate(empty, migrate.read())

    (key,) = await PostgresKeyStore(empty).all()
    assert (key.scopes, key.priority, key.limits) == (frozenset(Scope), None, Limits())


async def test_scopes_and_limits_of_a_newer_program_are_no_fault(database: Database, server: str) -> None:
    """In the minutes of an upgrade both run on one database."""
    keys = PostgresKeyStore(database)
    await keys.create(name="laptop", tenant="acme", role=Role.USER, scopes=frozenset({Scope.TASKS}))
    async with owner(server) as connection:
        await connection.execute("UPDATE keys SET scopes = scopes || '{voice}', limits = '{\"pictures\": 3}'")

    (key,) = await keys.all()
    assert (key.scopes, key.limits) == (frozenset({Scope.TASKS}), Limits())
