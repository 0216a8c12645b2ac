-- Every statement of shards, in the form of `statements.sql`.

-- name: enter_slots
SELECT sutazai_enter($1::smallint[])

-- name: all_shards
SELECT name, region FROM shards ORDER BY added_at, name

-- name: slots_of_region
SELECT slot, shard FROM shard_slots WHERE region = $1

-- name: homes_of_tenants
SELECT name, region FROM tenants WHERE region <> ''

-- name: shard_here
SELECT name FROM shard_here

-- name: has_data
SELECT EXISTS (SELECT FROM tasks WHERE tenant = $1)
    OR EXISTS (SELECT FROM files WHERE tenant = $1)
    OR EXISTS (SELECT FROM sessions WHERE tenant = $1)
    OR EXISTS (SELECT FROM schedules WHERE tenant = $1)
    OR EXISTS (SELECT FROM agent_messages WHERE tenant = $1)
