-- What keeps the tables of tasks in order and tells how they are, in the form of `statements.sql`.

-- name: statistics_state
SELECT relispopulated FROM pg_class WHERE oid = to_regclass('agent_performance_daily')

-- name: take_statistics_turn
SELECT pg_try_advisory_xact_lock(5461335)

-- name: statistics_age_s
SELECT extract(epoch FROM clock_timestamp() - max(refreshed_at))::float8 FROM agent_performance_daily

-- name: refresh_statistics
REFRESH MATERIALIZED VIEW CONCURRENTLY agent_performance_daily

-- name: fill_statistics
REFRESH MATERIALIZED VIEW agent_performance_daily

-- name: statistics
SELECT agent, date, total_tasks, completed, failed, mean_processing_s, mean_attempts, refreshed_at
FROM agent_performance_daily
ORDER BY date DESC, agent

-- name: all_partitions
SELECT parent.relname AS belongs_to, part.relname AS name, greatest(part.reltuples, 0)::bigint AS rows,
    pg_total_relation_size(part.oid) AS size_bytes
FROM pg_inherits
JOIN pg_class AS part ON part.oid = inhrelid
JOIN pg_class AS parent ON parent.oid = inhparent
WHERE inhparent IN (to_regclass('tasks'), to_regclass('events'))
ORDER BY parent.relname, part.relname

-- name: grown_tables
-- Those on which tasks wait that have several times as many pages as when PostgreSQL looked last. Of large ones it looks
-- often enough by itself, and their plans do not change any more.
SELECT oid::regclass::text AS name
FROM pg_class
WHERE oid IN (
        SELECT inhrelid FROM pg_inherits WHERE inhparent IN (to_regclass('tasks'), to_regclass('events'))
        UNION ALL SELECT to_regclass('dispatch')
    )
    AND relpages < 1000
    AND pg_relation_size(oid) > current_setting('block_size')::integer * (20 + 4 * relpages::bigint)
ORDER BY name

-- name: take_grown_turn
SELECT pg_try_advisory_xact_lock(5461336)

-- name: queue_states
-- Reads the table of words as a whole, for people who ask.
WITH words AS (
    SELECT queue, count(*) FILTER (WHERE is_due AND consumer IS NULL) AS waiting,
        count(consumer) AS held, count(*) FILTER (WHERE NOT is_due) AS later
    FROM dispatch GROUP BY queue
), readers AS (
    SELECT queue, count(*) AS consumers FROM dispatch_consumers WHERE queue <> '' GROUP BY queue
), names AS (
    SELECT queue FROM dispatch_turns UNION SELECT queue FROM words UNION SELECT queue FROM readers
)
SELECT queue AS name, coalesce(waiting, 0) AS waiting, coalesce(held, 0) AS held, coalesce(later, 0) AS later,
    coalesce(consumers, 0) AS consumers
FROM names LEFT JOIN words USING (queue) LEFT JOIN readers USING (queue)
ORDER BY queue
