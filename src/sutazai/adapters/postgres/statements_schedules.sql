-- Every statement of schedules, in the form of `statements.sql`.

-- name: lock_schedules_of
-- One who adds at a time, so that the count holds.
SELECT pg_advisory_xact_lock(5461334, hashtext($1))

-- name: count_schedules
SELECT count(*) FROM schedules WHERE tenant = $1

-- name: add_schedule
INSERT INTO schedules (id, tenant, cron, timezone, draft, created_at, due_at) VALUES ($1, $2, $3, $4, $5, $6, $7)

-- name: replace_schedule
UPDATE schedules SET cron = $3, timezone = $4, draft = $5, due_at = $6
WHERE id = $1 AND tenant = $2
RETURNING id

-- name: schedule
SELECT * FROM schedules WHERE tenant = $1 AND id = $2

-- name: schedules_page
SELECT * FROM schedules
WHERE tenant = $1 AND ($2::uuid IS NULL OR id > $2)
ORDER BY id
LIMIT $3

-- name: delete_schedule
DELETE FROM schedules WHERE tenant = $1 AND id = $2 RETURNING id

-- name: due_schedules
SELECT * FROM schedules
WHERE due_at <= $1 AND sutazai_slot(tenant) NOT IN (SELECT slot FROM slots_here WHERE state <> 'owned')
ORDER BY due_at
LIMIT $2

-- name: next_schedule_in_s
SELECT extract(epoch FROM due_at - clock_timestamp())::float8 FROM schedules
WHERE sutazai_slot(tenant) NOT IN (SELECT slot FROM slots_here WHERE state <> 'owned')
ORDER BY due_at
LIMIT 1

-- name: advance_schedule
UPDATE schedules SET due_at = $3, last_due_at = $4, last_task = $5, last_error = $6
WHERE id = $1 AND due_at = $2
