-- Every statement of shards, in the form of `statements.sql`.

-- name: enter_slots
SELECT sutazai_enter($1::smallint[])

-- name: all_shards
SELECT name, region FROM shards ORDER BY added_at, name

-- name: slots_of_region
SELECT slot, shard FROM shard_slots WHERE region = $1

-- name: tell_weights
-- Those that are the default again need not be there.
WITH news AS (
    SELECT * FROM unnest($1::text[], $2::float8[]) AS given (name, weight)
), gone AS (
    DELETE FROM tenants WHERE name NOT IN (SELECT name FROM news)
)
INSERT INTO tenants (name, weight, priority, limits) SELECT name, weight, 'normal', '{}' FROM news ORDER BY name
ON CONFLICT (name) DO UPDATE SET weight = excluded.weight WHERE tenants.weight <> excluded.weight

-- name: shard_here
SELECT name FROM shard_here

-- name: has_data
SELECT EXISTS (SELECT FROM tasks WHERE tenant = $1)
    OR EXISTS (SELECT FROM files WHERE tenant = $1)
    OR EXISTS (SELECT FROM sessions WHERE tenant = $1)
    OR EXISTS (SELECT FROM schedules WHERE tenant = $1)
    OR EXISTS (SELECT FROM agent_messages WHERE tenant = $1)

-- name: begin_slot_moves
-- One that was begun before goes on from where it is, in other hands. All who change several do so by slot.
INSERT INTO shard_moves (region, slot, source, target, mover, beat)
SELECT $1, slot, $3, $4, $5, 1 FROM unnest($2::smallint[]) AS wanted (slot)
ON CONFLICT (region, slot) DO UPDATE SET mover = excluded.mover, beat = excluded.beat
RETURNING slot, source, target

-- name: slot_moves
SELECT slot, source, target, mover, beat, shard AS owner
FROM shard_moves JOIN shard_slots USING (region, slot)
WHERE region = $1
ORDER BY begun_at, slot

-- name: beat_slot_moves
-- Not where somebody else moves them, or has taken this mover for gone.
WITH mine AS (
    SELECT slot FROM shard_moves WHERE region = $1 AND slot = ANY ($2::smallint[]) AND mover = $3 AND beat > 0
    ORDER BY slot FOR UPDATE
)
UPDATE shard_moves SET beat = beat + 1 FROM mine WHERE region = $1 AND shard_moves.slot = mine.slot
RETURNING shard_moves.slot

-- name: stop_slot_moves
-- Those whose mover was not heard of since: it is gone.
WITH silent AS (
    SELECT slot FROM shard_moves
    JOIN unnest($2::smallint[], $3::text[], $4::bigint[]) AS seen (slot, mover, beat) USING (slot, mover, beat)
    WHERE region = $1
    ORDER BY slot FOR UPDATE OF shard_moves
)
UPDATE shard_moves SET beat = 0 FROM silent WHERE region = $1 AND shard_moves.slot = silent.slot
RETURNING shard_moves.slot

-- name: end_slot_moves
DELETE FROM shard_moves WHERE region = $1 AND slot = ANY ($2::smallint[]) AND mover = $3 RETURNING slot

-- name: give_slots
-- Only while their move is that of the mover that was seen: a later move may go the other way.
WITH mine AS (
    SELECT slot, target FROM shard_moves
    JOIN unnest($2::smallint[], $3::text[]) AS seen (slot, mover) USING (slot, mover)
    WHERE region = $1
    ORDER BY slot FOR SHARE OF shard_moves
)
UPDATE shard_slots SET shard = mine.target FROM mine WHERE region = $1 AND shard_slots.slot = mine.slot
RETURNING shard_slots.slot

-- name: slot_states
SELECT slot, state, mover FROM slots_here WHERE slot = ANY ($1::smallint[])

-- name: expect_slots
-- Only what is owned here already stays as it is.
INSERT INTO slots_here (slot, state, mover) SELECT slot, 'arriving', $2 FROM unnest($1::smallint[]) AS wanted (slot)
ON CONFLICT (slot) DO UPDATE SET state = 'arriving', mover = excluded.mover WHERE slots_here.state <> 'owned'
RETURNING slot

-- name: leave_slots
UPDATE slots_here SET state = 'left', mover = $2 WHERE slot = ANY ($1::smallint[]) AND state = 'owned' RETURNING slot

-- name: turn_slots
-- Only what is still as it was seen; a mover that began anew has put its id there.
UPDATE slots_here SET state = $4, mover = $5
FROM unnest($1::smallint[], $2::text[]) AS seen (slot, mover)
WHERE slots_here.slot = seen.slot AND slots_here.mover = seen.mover AND slots_here.state = $3
RETURNING slots_here.slot

-- name: own_slots
-- Not where somebody else has begun anew.
UPDATE slots_here SET state = 'owned', mover = ''
WHERE slot = ANY ($1::smallint[]) AND state = 'arriving' AND mover = $2
RETURNING slot

-- name: hold_slots
-- Keeps their state until the end of the transaction.
SELECT slot FROM slots_here WHERE slot = ANY ($1::smallint[]) AND state = $2 AND mover = $3 FOR SHARE

-- name: fence_slots
-- Waits for all who are in, and keeps others out until the end of the transaction.
SELECT pg_advisory_xact_lock(5461340, slot) FROM unnest($1::smallint[]) AS wanted (slot)

-- name: drop_slots
DELETE FROM slots_here WHERE slot = ANY ($1::smallint[]) AND state = 'left' AND mover = $2

-- name: plain_forms
-- How values are written, whatever a server usually does: checksums of two servers are compared.
SELECT set_config('TimeZone', 'UTC', true), set_config('bytea_output', 'hex', true),
    set_config('extra_float_digits', '1', true)

-- name: given_position
SELECT last_value - CASE WHEN is_called THEN 0 ELSE 1 END FROM events_position

-- name: last_message_number
SELECT last_value FROM agent_messages_number_seq

-- name: raise_message_number
-- Far enough that nobody who takes one meanwhile has it overtaken.
SELECT setval('agent_messages_number_seq', $1::bigint + 10000) FROM agent_messages_number_seq WHERE last_value <= $1

-- name: task_keys_of_tenant
SELECT id, created_at, pg_column_size(draft) + pg_column_size(result) + pg_column_size(checkpoint) AS size_bytes
FROM tasks
WHERE tenant = $1 AND deleted_at IS NULL AND id > $2
ORDER BY id
LIMIT $3

-- name: tasks_changed_since
SELECT position, task AS id, created_at, 2 * pg_column_size(data) AS size_bytes
FROM events
WHERE position > $1 AND sutazai_slot(task) = ANY ($2::integer[])
ORDER BY position
LIMIT $3

-- name: count_tasks_of_tenants
SELECT count(*) AS tasks, coalesce(sum(version), 0)::bigint AS events FROM tasks
WHERE tenant = ANY ($1::text[]) AND deleted_at IS NULL

-- name: pack_tasks
-- Tasks and those of their events that the other side lacks, as of one moment.
SELECT
    (SELECT json_agg(tasks)::text FROM unnest($1::uuid[], $2::timestamptz[]) AS asked (id, created_at)
        JOIN tasks ON tasks.id = asked.id AND tasks.created_at = asked.created_at) AS tasks,
    (SELECT json_agg(events ORDER BY events.task, events.version)::text
        FROM unnest($1::uuid[], $2::timestamptz[], $3::integer[]) AS asked (task, created_at, since)
        JOIN events ON events.task = asked.task AND events.created_at = asked.created_at
        WHERE events.version > asked.since) AS events,
    (SELECT coalesce(sum(hashtextextended(tasks::text, 1)), 0)::text
        FROM unnest($1::uuid[], $2::timestamptz[]) AS asked (id, created_at)
        JOIN tasks ON tasks.id = asked.id AND tasks.created_at = asked.created_at) AS tasks_checksum,
    (SELECT coalesce(sum(hashtextextended(ROW(task, version, tenant, kind, schema, at, data, events.created_at)::text, 1)), 0)::text
        FROM unnest($1::uuid[], $2::timestamptz[]) AS asked (id, created_at)
        JOIN events ON events.task = asked.id AND events.created_at = asked.created_at) AS events_checksum

-- name: unpack_events
INSERT INTO events (task, version, tenant, kind, schema, at, data, created_at)
SELECT task, version, tenant, kind, schema, at, data, created_at
FROM json_populate_recordset(NULL::events, $1::json)
ON CONFLICT DO NOTHING

-- name: drop_events_of_tasks
DELETE FROM events USING unnest($1::uuid[], $2::timestamptz[]) AS asked (id, created_at)
WHERE events.task = asked.id AND events.created_at = asked.created_at

-- name: drop_tasks
DELETE FROM tasks USING unnest($1::uuid[], $2::timestamptz[]) AS asked (id, created_at)
WHERE tasks.id = asked.id AND tasks.created_at = asked.created_at

-- name: words_of_slots
-- Those in somebody's hands stay: whoever has them finds the tasks where they are.
SELECT id, queue, task, tenant, agent, priority, available_at, deliveries FROM dispatch
WHERE consumer IS NULL AND task IS NOT NULL AND sutazai_slot(tenant) = ANY ($1::integer[])
ORDER BY turn, id
LIMIT $2

-- name: drop_words
DELETE FROM dispatch WHERE id = ANY ($1::bigint[]) AND consumer IS NULL

-- name: mark_words_delivered
UPDATE dispatch SET deliveries = news.deliveries
FROM unnest($1::uuid[], $2::integer[]) AS news (task, deliveries)
WHERE dispatch.task = news.task AND consumer IS NULL AND dispatch.deliveries = 0

-- name: count_slots
SELECT shard, count(*) AS slots FROM shard_slots GROUP BY shard

-- name: add_shard
INSERT INTO shards (name, region) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING

-- name: give_all_slots
INSERT INTO shard_slots (region, slot, shard) SELECT $1, slot, $2 FROM generate_series(0, $3::integer) AS slot
ON CONFLICT DO NOTHING

-- name: own_all_slots
INSERT INTO slots_here (slot, state) SELECT slot, 'owned' FROM generate_series(0, $1::integer) AS slot
ON CONFLICT DO NOTHING

-- name: name_shard
INSERT INTO shard_here (name) SELECT $1 WHERE NOT EXISTS (SELECT FROM shard_here)

-- name: has_any_data
SELECT EXISTS (SELECT FROM tasks) OR EXISTS (SELECT FROM files) OR EXISTS (SELECT FROM sessions)
    OR EXISTS (SELECT FROM schedules) OR EXISTS (SELECT FROM agent_messages)
