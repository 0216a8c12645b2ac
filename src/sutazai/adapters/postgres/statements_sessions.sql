-- Every statement of the store of sessions, in the form of `statements.sql`.

-- name: lock_sessions_of_tenant
-- Who counts and then inserts must not be overtaken. The first number sets these locks apart from others.
SELECT pg_advisory_xact_lock(5461332, hashtext($1))

-- name: create_session
INSERT INTO sessions (id, tenant, model, system, metadata, ttl_s, created_at, expires_at, version, messages)
SELECT $1, $2, $3, $4, $5::jsonb, $6, $7, $8, $9, $10
WHERE (SELECT count(*) FROM sessions WHERE tenant = $2 AND expires_at > $7) < $11
RETURNING id

-- name: session
SELECT id, tenant, model, system, metadata::text, ttl_s, created_at, expires_at, version, messages
FROM sessions
WHERE id = $2 AND tenant = $1

-- name: sessions_of_tenant
SELECT id, tenant, model, system, metadata::text, ttl_s, created_at, expires_at, version, messages
FROM sessions
WHERE tenant = $1 AND expires_at > $2 AND ($3 = '' OR id < $3)
ORDER BY id DESC
LIMIT $4

-- name: session_history
SELECT number, role, tokens, body
FROM session_messages
WHERE session_id = $1 AND turn <= $2
ORDER BY number

-- name: turn_session
UPDATE sessions SET version = $3, messages = $4, expires_at = $5
WHERE id = $2 AND tenant = $1 AND version = $3 - 1
RETURNING id

-- name: drop_messages
DELETE FROM session_messages WHERE session_id = $1 AND number <> ALL ($2::integer[])

-- name: add_messages
INSERT INTO session_messages (session_id, number, turn, role, tokens, body)
SELECT $1, number, $2, role, tokens, body
FROM unnest($3::integer[], $4::text[], $5::integer[], $6::bytea[]) AS news (number, role, tokens, body)

-- name: delete_session
DELETE FROM sessions WHERE id = $2 AND tenant = $1 RETURNING id

-- name: sweep_sessions
-- Several gateways sweep at once: each takes rows that no other has.
DELETE FROM sessions
WHERE id IN (
    SELECT id FROM sessions
    WHERE expires_at <= $1
        AND sutazai_slot(tenant) NOT IN (SELECT slot FROM slots_here WHERE state <> 'owned')
    ORDER BY expires_at
    LIMIT $2
    FOR UPDATE SKIP LOCKED
)
RETURNING id
