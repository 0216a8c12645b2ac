"""
The tables as SQLAlchemy sees them.

The SQL files make the tables; a test proves that they make these. Checks, triggers, partitions and fill factors are
the files' alone.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    func,
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
    _given("region", Text, server_default=text("''")),
    Column("waiting_tasks", BigInteger),
)

Table(
    "shards",
    metadata,
    _key("name", Text),
    _given("region", Text),
    _given("added_at", WHEN, server_default=text("clock_timestamp()")),
)
Table("shard_slots", metadata, _key("region", Text), _key("slot", SmallInteger), _given("shard", Text))
Table(
    "shard_moves",
    metadata,
    _key("region", Text),
    _key("slot", SmallInteger),
    _given("source", Text),
    _given("target", Text),
    _given("begun_at", WHEN, server_default=text("clock_timestamp()")),
    _given("mover", Text, server_default=text("''")),
    _given("beat", BigInteger, server_default=text("0")),
)
Table("shard_here", metadata, _key("name", Text))
Table(
    "slots_here",
    metadata,
    _key("slot", SmallInteger),
    _given("state", Text),
    _given("mover", Text, server_default=text("''")),
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


def _counted(name: str, default: str = "0", type_: Any = Integer) -> Column[Any]:
    return _given(name, type_, server_default=text(default))


def _written(name: str) -> Column[Any]:
    return _given(name, Text, server_default=text("''"))


tasks = Table(
    "tasks",
    metadata,
    _key("id", UUID),
    _key("created_at", WHEN),
    _given("tenant", Text),
    _given("user_id", Text),
    _given("agent", Text),
    _given("queue", Text),
    _given("status", Text),
    _given("priority", SmallInteger),
    Column("parent", UUID),
    _given("draft", Text),
    _written("result"),
    _written("result_object"),
    _written("progress"),
    _written("checkpoint"),
    _given("version", Integer),
    _counted("attempts"),
    _counted("deliveries"),
    _counted("losses"),
    _counted("waits_for"),
    _written("worker"),
    _given("is_cancelling", Boolean, server_default=text("false")),
    Column("reason", Text),
    _written("error"),
    _counted("tokens", type_=BigInteger),
    _given("run_at", WHEN),
    Column("deadline", WHEN),
    Column("started_at", WHEN),
    Column("ended_at", WHEN),
    Column("deleted_at", WHEN),
    postgresql_partition_by="RANGE (created_at)",
)
Index(
    "idx_tasks_status_created",
    tasks.c.status,
    tasks.c.created_at,
    postgresql_where=text("status IN ('pending', 'processing')"),
)
Index(
    "idx_tasks_status_id",
    tasks.c.status,
    tasks.c.id,
    postgresql_where=text("status IN ('waiting', 'failed', 'cancelled') AND deleted_at IS NULL"),
)
Index("idx_tasks_user_status", tasks.c.user_id, tasks.c.status, postgresql_where=text("deleted_at IS NULL"))
Index("idx_tasks_tenant", tasks.c.tenant, tasks.c.id, postgresql_where=text("deleted_at IS NULL"))
Index(
    "idx_tasks_tenant_unstarted",
    tasks.c.tenant,
    postgresql_where=text("status IN ('waiting', 'pending') AND deleted_at IS NULL"),
)
Index("idx_tasks_parent", tasks.c.parent, postgresql_where=text("parent IS NOT NULL"))
Index(
    "idx_tasks_deadline",
    tasks.c.deadline,
    postgresql_where=text("deadline IS NOT NULL AND status IN ('waiting', 'pending')"),
)

events = Table(
    "events",
    metadata,
    _given("position", BigInteger),  # of the sequence events_position
    _key("task", UUID),
    _key("version", Integer),
    _given("tenant", Text),
    _given("kind", Text),
    _given("schema", SmallInteger),
    _given("at", WHEN),
    _given("data", Text),
    _key("created_at", WHEN),
    postgresql_partition_by="RANGE (created_at)",
)
Index("idx_events_position", events.c.position)

task_waits = Table(
    "task_waits", metadata, _key("waits_for", UUID), _key("waiter", UUID), _given("needs_success", Boolean)
)
Index("idx_task_waits_waiter", task_waits.c.waiter)

Table("task_keys", metadata, _key("tenant", Text), _key("key", Text), _given("task", UUID))

dispatch = Table(
    "dispatch",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    _given("queue", Text),
    Column("task", UUID),
    _given("tenant", Text),
    _given("agent", Text),
    _given("priority", SmallInteger),
    _given("turn", Double),
    _given("is_due", Boolean),
    _given("available_at", WHEN),
    Column("consumer", UUID),
    _counted("deliveries"),
)
Index(
    "idx_dispatch_ready",
    dispatch.c.queue,
    dispatch.c.priority,
    dispatch.c.turn,
    dispatch.c.id,
    postgresql_where=text("is_due AND consumer IS NULL"),
)
Index("idx_dispatch_later", dispatch.c.available_at, postgresql_where=text("NOT is_due"))
Index("idx_dispatch_held", dispatch.c.consumer, postgresql_where=text("consumer IS NOT NULL"))

Table("dispatch_turns", metadata, _key("queue", Text), _key("tenant", Text), _given("turn", Double))
Table("dispatch_consumers", metadata, _key("id", UUID), _counted("beat", type_=BigInteger), _written("queue"))
Table("workers", metadata, _key("name", Text), _given("beat", BigInteger))
Table(
    "broadcasts",
    metadata,
    _key("source", Text),
    *(_counted(name, type_=BigInteger) for name in ("position", "fence", "beat")),
)

agent_messages = Table(
    "agent_messages",
    metadata,
    Column("number", BigInteger, Identity(always=True), primary_key=True),
    _key("tenant", Text),
    _key("name", Text),
    _given("sender", Text),
    _given("body", Text),
    _given("at", WHEN, server_default=text("clock_timestamp()")),
    Column("position", BigInteger),  # of the sequence agent_messages_position
)
Index("idx_agent_messages_position", func.coalesce(agent_messages.c.position, agent_messages.c.number))

files = Table(
    "files",
    metadata,
    _key("id", Text(collation="C")),
    _given("tenant", Text),
    _given("name", Text),
    _given("purpose", Text),
    _given("size_bytes", BigInteger),
    _given("created_at", WHEN),
)
Index("files_of_tenant", files.c.tenant, files.c.id)

webhooks = Table(
    "webhooks",
    metadata,
    _key("task", UUID),
    _key("version", Integer),
    _given("created_at", WHEN),
    _given("status", Text),
    _given("due_at", WHEN, server_default=text("clock_timestamp()")),
    _counted("attempts"),
)
Index("idx_webhooks_due", webhooks.c.due_at)

schedules = Table(
    "schedules",
    metadata,
    _key("id", UUID),
    _given("tenant", Text),
    _given("cron", Text),
    _given("timezone", Text),
    _given("draft", Text),
    _given("created_at", WHEN),
    _given("due_at", WHEN),
    Column("last_due_at", WHEN),
    _written("last_task"),
    _written("last_error"),
)
Index("idx_schedules_due", schedules.c.due_at)
Index("idx_schedules_tenant", schedules.c.tenant, schedules.c.id)
