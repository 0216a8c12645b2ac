-- Every statement of the stores. A line `-- name: x` opens a statement; it runs to the next such line. What several of
-- a file have in common opens with `-- part: x`, and stands where a line says `-- part x`.

-- name: create_key
INSERT INTO keys (id, name, tenant, role, digest, scopes, priority, limits)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8::jsonb)
RETURNING id, name, tenant, role, digest, scopes, priority, limits, created_at, last_used_at, revoked_at

-- name: all_keys
SELECT id, name, tenant, role, digest, scopes, priority, limits, created_at, last_used_at, revoked_at
FROM keys
ORDER BY created_at, id

-- name: revoke_key
-- An id goes before a name that happens to look like one.
UPDATE keys SET revoked_at = clock_timestamp()
WHERE revoked_at IS NULL AND id = (
    SELECT id FROM keys
    WHERE revoked_at IS NULL AND (id = $1 OR name = $1)
    ORDER BY (id = $1) DESC
    LIMIT 1
)
RETURNING id, name, tenant, role, digest, scopes, priority, limits, created_at, last_used_at, revoked_at

-- name: keys_fingerprint
-- Differs when anything differs that decides who may ask.
SELECT md5(concat(
    (SELECT string_agg(keys::text, ',' ORDER BY id) FROM (
        SELECT id, name, tenant, role, encode(digest, 'hex'), revoked_at, scopes, priority, limits FROM keys
    ) AS keys),
    ';',
    (SELECT string_agg(tenants::text, ',' ORDER BY name) FROM tenants)
))

-- name: all_tenants
SELECT name, weight, priority, limits, region, waiting_tasks FROM tenants ORDER BY name

-- name: lock_tenant
-- What it is before it changes; a row that is not there cannot be locked, the last of two that define it wins.
SELECT name, weight, priority, limits, region, waiting_tasks FROM tenants WHERE name = $1 FOR UPDATE

-- name: set_tenant
INSERT INTO tenants (name, weight, priority, limits, region, waiting_tasks)
VALUES ($1, $2, $3, $4::jsonb, $5, $6)
ON CONFLICT (name) DO UPDATE SET weight = excluded.weight, priority = excluded.priority, limits = excluded.limits,
    region = excluded.region, waiting_tasks = excluded.waiting_tasks

-- name: delete_tenant
DELETE FROM tenants WHERE name = $1 RETURNING name, weight, priority, limits, region, waiting_tasks

-- name: add_audit
-- The trigger of the table fills in what is not given.
INSERT INTO audit (actor, action, subject, detail, request_id, outcome)
VALUES ($1, $2, $3, $4::jsonb, $5, $6)

-- name: newest_audit
SELECT number, at, actor, action, subject, detail::text AS detail, request_id, outcome, previous, digest
FROM audit
WHERE $1::bigint IS NULL OR number < $1
ORDER BY number DESC
LIMIT $2

-- name: audit_from
SELECT number, at, actor, action, subject, detail::text AS detail, request_id, outcome, previous, digest
FROM audit
WHERE number > $1
ORDER BY number
LIMIT $2

-- name: claim_write
-- A row comes back when this write is new. It waits for a lost write of the same writer that may still be under way.
INSERT INTO usage_writers AS kept (id, written, written_at)
VALUES ($1, $2, clock_timestamp())
ON CONFLICT (id) DO UPDATE SET written = excluded.written, written_at = excluded.written_at
WHERE kept.written < excluded.written
RETURNING written

-- name: forget_writers
DELETE FROM usage_writers WHERE written_at < clock_timestamp() - interval '30 days'

-- name: add_usage
-- Sorted, so that two gateways lock the same rows in the same order. Grouped, for a row may be given only once.
INSERT INTO usage AS kept (hour, key_id, tenant, model, requests, errors, input_tokens, output_tokens)
SELECT hour, key_id, tenant, model,
    sum(requests)::bigint, sum(errors)::bigint, sum(input_tokens)::bigint, sum(output_tokens)::bigint
FROM unnest(
    $1::timestamptz[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[]
) AS news (hour, key_id, tenant, model, requests, errors, input_tokens, output_tokens)
GROUP BY hour, key_id, tenant, model
ORDER BY hour, key_id, tenant, model
ON CONFLICT (hour, key_id, tenant, model) DO UPDATE SET
    requests = kept.requests + excluded.requests,
    errors = kept.errors + excluded.errors,
    input_tokens = kept.input_tokens + excluded.input_tokens,
    output_tokens = kept.output_tokens + excluded.output_tokens

-- name: touch_keys
-- Rows that waited for the database tell of their own hour, not of now.
UPDATE keys SET last_used_at = greatest(keys.last_used_at, least(clock_timestamp(), used.until))
FROM (
    SELECT keys.id, news.until
    FROM keys
    JOIN (
        SELECT id, max(hour) + interval '1 hour' AS until
        FROM unnest($1::text[], $2::timestamptz[]) AS given (id, hour)
        GROUP BY id
    ) AS news USING (id)
    ORDER BY keys.id
    FOR NO KEY UPDATE OF keys
) AS used
WHERE keys.id = used.id

-- name: total_usage
SELECT key_id, tenant, model, max(hour) AS hour,
    sum(requests)::bigint AS requests, sum(errors)::bigint AS errors,
    sum(input_tokens)::bigint AS input_tokens, sum(output_tokens)::bigint AS output_tokens
FROM usage
WHERE hour >= $1
GROUP BY key_id, tenant, model
ORDER BY key_id, tenant, model

-- name: migrations_table
SELECT to_regclass('schema_migrations')::text

-- name: create_migrations_table
CREATE TABLE IF NOT EXISTS schema_migrations (
    version integer PRIMARY KEY,
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)

-- name: alembic_table
SELECT to_regclass('alembic_version')::text

-- name: applied_migrations
SELECT version, name, checksum FROM schema_migrations ORDER BY version

-- name: record_migration
INSERT INTO schema_migrations (version, name, checksum) VALUES ($1, $2, $3)

-- name: server_report
-- A place in the log as a number. The name of a file of the log begins with the timeline. A commit is flushed before it
-- returns, but where the server was told not to wait for that; what is past it, such as hints, may stay unflushed on an
-- idle server for many seconds, and no replica gets it. What a replica receives it tells only those with the right to
-- read all statistics (`pg_monitor`); the rest is as of its last restart point, some minutes ago.
SELECT
    NOT pg_is_in_recovery() AS is_primary,
    CASE WHEN pg_is_in_recovery() THEN greatest(
            (SELECT timeline_id FROM pg_control_checkpoint()),
            (SELECT min_recovery_end_timeline FROM pg_control_recovery()),
            (SELECT received_tli FROM pg_stat_wal_receiver))
        ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer END AS timeline,
    (CASE WHEN pg_is_in_recovery() THEN coalesce(pg_last_wal_replay_lsn(), '0/0')
        ELSE pg_current_wal_flush_lsn() END - '0/0'::pg_lsn)::bigint AS position,
    (CASE WHEN pg_is_in_recovery() THEN '0/0'
        WHEN current_setting('synchronous_commit') = 'off' THEN pg_current_wal_insert_lsn()
        ELSE pg_current_wal_flush_lsn() END - '0/0'::pg_lsn)::bigint AS written,
    (SELECT system_identifier FROM pg_control_system()) AS cluster

-- name: has_statement_counts
SELECT to_regclass('pg_stat_statements')::text

-- name: slow_statements
SELECT
    mean_exec_time AS mean_ms,
    max_exec_time AS max_ms,
    total_exec_time AS total_ms,
    calls,
    rows,
    regexp_replace(query, '\s+', ' ', 'g') AS statement
FROM pg_stat_statements
WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND mean_exec_time > $1
ORDER BY mean_exec_time DESC
LIMIT $2
