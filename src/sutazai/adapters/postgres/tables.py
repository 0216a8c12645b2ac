"""
The tables as SQLAlchemy sees them.

The SQL files make the tables; a test proves that they make these. Checks, triggers, partitions and fill factors are
the files' alone.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, UUID

WHEN = DateTime(timezone=True)

metadata = MetaData()


def _key(name: str, type_: Any, **more: Any) -> Column[Any]:
    return Column(name, type_, primary_key=True, autoincrement=False, **more)


def _given(name: str, type_: Any, **more: Any) -> Column[Any]:
    return Column(name, type_, nullable=False, **more)


schema_migrations = Table(
    "schema_migrations",
    metadata,
    _key("version", Integer),
    _given("name", Text),
    _given("checksum", Text),
    _given("applied_at", WHEN, server_default=text("clock_timestamp()")),
)

keys = Table(
    "keys",
    metadata,
    _key("id", Text),
    _given("name", Text),
    _given("tenant", Text),
    _given("role", Text),
    _given("digest", LargeBinary),
    _given("created_at", WHEN, server_default=text("clock_timestamp()")),
    Column("last_used_at", WHEN),
    Column("revoked_at", WHEN),
    _given("scopes", ARRAY(Text), server_default=text("'{inference,tasks,admin}'")),
    Column("priority", Text),
    _given("limits", JSONB, server_default=text("'{}'")),
    UniqueConstraint("digest", name="keys_digest_key"),
    Index("keys_live_name", "name", unique=True, postgresql_where=text("revoked_at IS NULL")),
)

usage = Table(
    "usage",
    metadata,
    _key("hour", WHEN),
    _key("key_id", Text),
    _key("tenant", Text),
    _key("model", Text),
    _given("requests", BigInteger),
    _given("errors", BigInteger),
    _given("input_tokens", BigInteger),
    _given("output_tokens", BigInteger),
)

usage_writers = Table(
    "usage_writers",
    metadata,
    _key("id", UUID),
    _given("written", BigInteger),
    _given("written_at", WHEN),
)

tenants = Table(
    "tenants",
    metadata,
    _key("name", Text),
    _given("weight", Double),
    _given("priority", Text),
    _given("limits", JSONB),
)

audit = Table(
    "audit",
    metadata,
    _key("number", BigInteger),
    _given("at", WHEN),
    _given("actor", Text),
    _given("action", Text),
    _given("subject", Text),
    _given("detail", JSONB),
    _given("request_id", Text),
    _given("outcome", Text),
    _given("previous", LargeBinary),
    _given("digest", LargeBinary),
)

sessions = Table(
    "sessions",
    metadata,
    _key("id", Text),
    _given("tenant", Text),
    _given("model", Text),
    _given("system", Text),
    _given("metadata", JSONB),
    _given("ttl_s", Double),
    _given("created_at", WHEN),
    _given("expires_at", WHEN),
    _given("version", Integer),
    _given("messages", Integer),
    Index("sessions_of_tenant", "tenant", "id"),
    Index("sessions_over", "expires_at"),
)

session_messages = Table(
    "session_messages",
    metadata,
    Column("session_id", Text, ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    _key("number", Integer),
    _given("turn", Integer),
    _given("role", Text),
    _given("tokens", Integer),
    _given("body", LargeBinary),
)
