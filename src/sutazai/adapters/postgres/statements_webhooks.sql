-- Every statement of webhooks, in the form of `statements.sql`.

-- name: add_webhooks
INSERT INTO webhooks (task, version, created_at, status)
SELECT * FROM unnest($1::uuid[], $2::integer[], $3::timestamptz[], $4::text[])

-- name: tell_webhooks
SELECT pg_notify('sutazai_webhooks', '')

-- name: claim_webhooks
UPDATE webhooks SET due_at = clock_timestamp() + make_interval(secs => $2), attempts = attempts + 1
WHERE (task, version) IN (
    SELECT task, version FROM webhooks
    WHERE due_at <= clock_timestamp()
        AND sutazai_slot(task) NOT IN (SELECT slot FROM slots_here WHERE state <> 'owned')
    ORDER BY due_at
    LIMIT $1
    FOR UPDATE SKIP LOCKED
)
RETURNING task, version, status, attempts

-- name: settle_webhook
DELETE FROM webhooks WHERE task = $1 AND version = $2

-- name: postpone_webhook
UPDATE webhooks SET due_at = clock_timestamp() + make_interval(secs => $3) WHERE task = $1 AND version = $2
