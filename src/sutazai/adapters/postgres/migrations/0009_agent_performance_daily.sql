-- What each agent did on each day of UTC. Read by `sutazai db statistics`; the first refresh fills it.

CREATE MATERIALIZED VIEW agent_performance_daily AS
SELECT agent, (created_at AT TIME ZONE 'UTC')::date AS date,
    count(*) AS total_tasks,
    count(*) FILTER (WHERE status = 'completed') AS completed,
    count(*) FILTER (WHERE status = 'failed') AS failed,
    -- Of the last attempt of those that were completed.
    (avg(extract(epoch FROM ended_at - started_at)) FILTER (WHERE status = 'completed'))::float8 AS mean_processing_s,
    -- Of those that ended after they were started. The column counts the attempts that failed.
    (avg(attempts + (status = 'completed')::integer)
        FILTER (WHERE started_at IS NOT NULL AND status IN ('completed', 'failed')))::float8 AS mean_attempts,
    now() AS refreshed_at
FROM tasks
WHERE deleted_at IS NULL
GROUP BY 1, 2
WITH NO DATA;
-- Refreshing without keeping readers waiting needs it.
CREATE UNIQUE INDEX agent_performance_daily_key ON agent_performance_daily (agent, date);
