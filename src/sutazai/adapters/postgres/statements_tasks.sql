-- Every statement of tasks, events and the dispatch table, in the form of `statements.sql`.

-- name: claim_task_keys
INSERT INTO task_keys (tenant, key, task)
SELECT tenant, key, task FROM unnest($1::text[], $2::text[], $3::uuid[]) AS news (tenant, key, task)
ORDER BY tenant, key
ON CONFLICT DO NOTHING
RETURNING task

-- name: tasks_of_keys
SELECT keys.tenant, keys.key, keys.task
FROM task_keys AS keys
JOIN unnest($1::text[], $2::text[]) AS asked (tenant, key) USING (tenant, key)

-- name: submit_tasks
-- New tasks of one moment with their events and with word for the queue of those that are pending, at once. Every array
-- costs, so what follows from another one is made here: an event holds the draft, as `ports/task_events.py` would
-- write it. The subquery is there as in `put_dispatch`. Nobody is told of tasks that nobody can know yet; whoever waits
-- for word is, when the transaction commits, unless a consumer here holds it from the start: those rows come back.
WITH given AS (
    SELECT id, tenant, user_id, agent, queue, priority, parent, draft, waits_for, coalesce(run_at, $12) AS run_at,
        deadline, CASE WHEN waits_for > 0 THEN 'waiting' ELSE 'pending' END AS status, place
    FROM unnest((SELECT $1::uuid[]), $2::text[], $3::text[], $4::text[], $5::text[], $6::smallint[], $7::uuid[],
        $8::text[], $9::integer[], $10::timestamptz[], $11::timestamptz[])
        WITH ORDINALITY AS given (id, tenant, user_id, agent, queue, priority, parent, draft, waits_for, run_at,
            deadline, place)
), made AS (
    INSERT INTO tasks (id, created_at, tenant, user_id, agent, queue, status, priority, parent, draft, version,
        waits_for, run_at, deadline)
    SELECT id, $12::timestamptz, tenant, user_id, agent, queue, status, priority, parent, draft, 1, waits_for, run_at,
        deadline
    FROM given
), told AS (
    INSERT INTO events (task, version, tenant, kind, schema, at, data, created_at)
    SELECT id, 1, tenant, $14, $15, $13::timestamptz, '{"draft":' || draft || ',"waits_for":' || waits_for || '}', $12
    FROM given
), claims AS (
    SELECT queue, consumer FROM unnest($16::text[], $17::uuid[]) AS claims (queue, consumer)
    WHERE EXISTS (SELECT FROM dispatch_consumers WHERE dispatch_consumers.id = claims.consumer)
), news AS (
    SELECT queue, id AS task, tenant, agent, priority, run_at AS available_at, place, run_at <= $13 AS is_due,
        CASE WHEN run_at <= $13 THEN claims.consumer END AS consumer
    FROM given LEFT JOIN claims USING (queue)
    WHERE status = 'pending'
),
-- part queued
SELECT NULL::bigint AS id, NULL::uuid AS task, pg_notify('sutazai_queues', queue) FROM due
UNION ALL SELECT id, task, NULL FROM queued WHERE consumer IS NOT NULL

-- name: change_tasks
-- The same for tasks that were there, each with the last of its events. A column that is given as an empty array stays
-- as it is: most do, and every element costs.
WITH news AS (
    SELECT * FROM unnest(
        (SELECT $1::uuid[]), $2::timestamptz[], $3::integer[], $4::text[], $5::timestamptz[], $6::integer[],
        $7::integer[], $8::integer[], $9::integer[], $10::text[], $11::boolean[], $12::text[], $13::text[],
        $14::text[], $15::text[], $16::text[], $17::text[], $18::bigint[], $19::timestamptz[], $20::timestamptz[],
        $21::text[], $22::text[], $23::smallint[], $24::text[]
    ) AS news (id, created_at, version, status, run_at, attempts, deliveries, losses, waits_for, worker,
        is_cancelling, result, result_object, progress, checkpoint, reason, error, tokens, started_at, ended_at, tenant,
        kind, schema, data)
), saved AS (
    UPDATE tasks SET
        version = news.version, status = news.status,
        run_at = CASE WHEN cardinality($5) = 0 THEN tasks.run_at ELSE news.run_at END,
        attempts = CASE WHEN cardinality($6) = 0 THEN tasks.attempts ELSE news.attempts END,
        deliveries = CASE WHEN cardinality($7) = 0 THEN tasks.deliveries ELSE news.deliveries END,
        losses = CASE WHEN cardinality($8) = 0 THEN tasks.losses ELSE news.losses END,
        waits_for = CASE WHEN cardinality($9) = 0 THEN tasks.waits_for ELSE news.waits_for END,
        worker = CASE WHEN cardinality($10) = 0 THEN tasks.worker ELSE news.worker END,
        is_cancelling = CASE WHEN cardinality($11) = 0 THEN tasks.is_cancelling ELSE news.is_cancelling END,
        result = CASE WHEN cardinality($12) = 0 THEN tasks.result ELSE news.result END,
        result_object = CASE WHEN cardinality($13) = 0 THEN tasks.result_object ELSE news.result_object END,
        progress = CASE WHEN cardinality($14) = 0 THEN tasks.progress ELSE news.progress END,
        checkpoint = CASE WHEN cardinality($15) = 0 THEN tasks.checkpoint ELSE news.checkpoint END,
        reason = CASE WHEN cardinality($16) = 0 THEN tasks.reason ELSE news.reason END,
        error = CASE WHEN cardinality($17) = 0 THEN tasks.error ELSE news.error END,
        tokens = CASE WHEN cardinality($18) = 0 THEN tasks.tokens ELSE news.tokens END,
        started_at = CASE WHEN cardinality($19) = 0 THEN tasks.started_at ELSE news.started_at END,
        ended_at = CASE WHEN cardinality($20) = 0 THEN tasks.ended_at ELSE news.ended_at END
    FROM news
    WHERE tasks.id = news.id AND tasks.created_at = news.created_at
), told AS (
    INSERT INTO events (task, version, tenant, kind, schema, at, data, created_at)
    SELECT id, version, tenant, kind, schema, $25::timestamptz, data, created_at FROM news
)
SELECT pg_notify('sutazai_tasks', $26)

-- name: add_events
-- Those before the last one, where several things happened to a task at once.
INSERT INTO events (task, version, tenant, kind, schema, at, data, created_at)
SELECT task, version, tenant, kind, schema, $8::timestamptz, data, created_at
FROM unnest($1::uuid[], $2::timestamptz[], $3::integer[], $4::text[], $5::text[], $6::smallint[], $7::text[])
    AS news (task, created_at, version, tenant, kind, schema, data)

-- part: whole_tasks
SELECT tasks.id, tasks.draft, tasks.version, tasks.status, tasks.created_at, tasks.run_at, tasks.attempts,
    tasks.deliveries, tasks.losses, tasks.waits_for, tasks.worker, tasks.is_cancelling, tasks.result, tasks.result_object,
    tasks.progress, tasks.checkpoint, tasks.reason, tasks.error, tasks.tokens, tasks.started_at, tasks.ended_at

-- name: lock_tasks
-- In the order of ids, so that two who lock the same ones do not wait for each other in a circle. The subquery is there
-- as in `put_dispatch`, here and wherever tasks are asked for by their ids.
-- part whole_tasks
FROM unnest((SELECT $1::uuid[]), $2::timestamptz[]) AS asked (id, created_at)
JOIN tasks ON tasks.id = asked.id AND tasks.created_at = asked.created_at
WHERE tasks.deleted_at IS NULL
ORDER BY tasks.id
FOR UPDATE OF tasks

-- name: lock_more_tasks
-- For one who holds locks already, and so must not wait for another.
-- part whole_tasks
FROM unnest((SELECT $1::uuid[]), $2::timestamptz[]) AS asked (id, created_at)
JOIN tasks ON tasks.id = asked.id AND tasks.created_at = asked.created_at
WHERE tasks.deleted_at IS NULL
ORDER BY tasks.id
FOR UPDATE OF tasks NOWAIT

-- name: tasks_by_id
-- part whole_tasks
FROM unnest($2::uuid[], $3::timestamptz[]) AS asked (id, created_at)
JOIN tasks ON tasks.id = asked.id AND tasks.created_at = asked.created_at
WHERE tasks.deleted_at IS NULL AND ($1::text IS NULL OR tasks.tenant = $1)

-- name: task_versions
SELECT tasks.id, tasks.version
FROM unnest((SELECT $1::uuid[]), $2::timestamptz[]) AS asked (id, created_at)
JOIN tasks ON tasks.id = asked.id AND tasks.created_at = asked.created_at
WHERE tasks.deleted_at IS NULL

-- name: tasks_page
-- part whole_tasks
FROM tasks
WHERE deleted_at IS NULL
    AND ($1::text IS NULL OR tenant = $1)
    AND ($2::uuid IS NULL OR id < $2)
    AND ($3::text IS NULL OR status = $3)
    AND ($4::text = '' OR agent = $4)
    AND ($5::uuid IS NULL OR parent = $5)
    AND ($6::text = '' OR user_id = $6)
    AND ($1::text IS NOT NULL OR sutazai_slot(id) NOT IN (SELECT slot FROM slots_here WHERE state <> 'owned'))
ORDER BY id DESC
LIMIT $7

-- name: called_off
-- Attempts that are to be cancelled or that another attempt has followed.
SELECT tasks.id
FROM unnest($1::uuid[], $2::timestamptz[], $3::integer[]) AS held (id, created_at, fence)
JOIN tasks ON tasks.id = held.id AND tasks.created_at = held.created_at
WHERE tasks.is_cancelling OR tasks.deliveries <> held.fence OR tasks.status <> 'processing'

-- name: past_deadline
SELECT id FROM tasks
WHERE deadline <= $1 AND status IN ('waiting', 'pending')
    AND sutazai_slot(id) NOT IN (SELECT slot FROM slots_here WHERE state <> 'owned')
ORDER BY deadline
LIMIT $2

-- name: waiting_of_tenant
SELECT count(*) FROM (
    SELECT FROM tasks WHERE tenant = $1 AND status IN ('waiting', 'pending') AND deleted_at IS NULL LIMIT $2
) AS waiting

-- name: unfinished_children
SELECT id FROM tasks
WHERE parent = ANY ($1::uuid[]) AND status IN ('waiting', 'pending', 'processing')

-- name: add_waits
INSERT INTO task_waits (waits_for, waiter, needs_success)
SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::boolean[])
ON CONFLICT DO NOTHING

-- name: end_waits
-- Of those that ended nobody waits any more, nor do they wait themselves.
DELETE FROM task_waits WHERE waits_for = ANY ($1::uuid[]) OR waiter = ANY ($1::uuid[])
RETURNING waits_for, waiter, needs_success

-- name: events_of_task
SELECT position, task, version, tenant, kind, schema, at, data
FROM events
WHERE task = $1 AND created_at = $2 AND version > $3 AND ($4::text IS NULL OR tenant = $4)
ORDER BY version
LIMIT $5

-- name: time_now
SELECT clock_timestamp()

-- name: newest_position
SELECT last_value FROM events_position

-- name: newest_message
SELECT last_value FROM agent_messages_position

-- name: writers
-- Transactions that have written to a table, or may be about to.
SELECT coalesce(array_agg(DISTINCT virtualtransaction), '{}') FROM pg_locks
WHERE locktype = 'relation' AND relation = $1::text::regclass AND mode = 'RowExclusiveLock' AND granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())

-- name: tail_events
SELECT position, task, version, tenant, kind, schema, at, data
FROM events
WHERE position > $1 AND position <= $3
ORDER BY position
LIMIT $2

-- name: tell_queues
SELECT pg_notify('sutazai_queues', queue) FROM unnest($1::text[]) AS told (queue)

-- part: queued
-- Word of `news` for the queue, and the queues to be woken in `due`.
-- Fair among tenants by start-time fair queueing (Goyal, Vin, Cheng 1996): each tenant's next turn is one step of
-- 1/weight after its last one, or after the turn that is being served where it was idle. A queue that is empty is
-- served at the highest turn ever given.
sizes AS (
    SELECT queue, tenant, count(*) AS size FROM news GROUP BY queue, tenant
), served AS (
    SELECT queue, coalesce(
        (SELECT min(head.turn) FROM generate_series(0, 2) AS level (priority) CROSS JOIN LATERAL (
            SELECT turn FROM dispatch
            WHERE dispatch.queue = named.queue AND dispatch.priority = level.priority AND is_due AND consumer IS NULL
            ORDER BY turn LIMIT 1
        ) AS head),
        (SELECT max(turn) FROM dispatch_turns WHERE dispatch_turns.queue = named.queue),
        0) AS turn
    FROM (SELECT DISTINCT queue FROM sizes) AS named
), steps AS (
    SELECT queue, tenant, size, 1 / coalesce(tenants.weight, 1) AS step, served.turn
    FROM sizes JOIN served USING (queue) LEFT JOIN tenants ON tenants.name = sizes.tenant
), turns AS (
    INSERT INTO dispatch_turns AS kept (queue, tenant, turn)
    SELECT queue, tenant, turn + size * step FROM steps ORDER BY queue, tenant
    ON CONFLICT (queue, tenant) DO UPDATE
        SET turn = greatest(kept.turn, excluded.turn - (
            SELECT size * step FROM steps WHERE steps.queue = kept.queue AND steps.tenant = kept.tenant
        )) + (SELECT size * step FROM steps WHERE steps.queue = kept.queue AND steps.tenant = kept.tenant)
    RETURNING queue, tenant, turn
), queued AS (
    INSERT INTO dispatch (queue, task, tenant, agent, priority, turn, is_due, available_at, consumer, deliveries)
    SELECT news.queue, news.task, news.tenant, news.agent, news.priority,
        turns.turn
            - steps.step * (steps.size - row_number() OVER (PARTITION BY news.queue, news.tenant ORDER BY place)),
        news.is_due, news.available_at, news.consumer, (news.consumer IS NOT NULL)::integer
    FROM news JOIN turns USING (queue, tenant) JOIN steps USING (queue, tenant)
    ORDER BY place
    RETURNING id, task, consumer
), due AS (
    SELECT DISTINCT queue FROM news WHERE is_due AND consumer IS NULL
)

-- name: put_dispatch
-- The subquery hides from the planner how many rows there are. For fewer than it expects of any it would plan anew each
-- time, which takes as long as the rest.
WITH news AS (
    SELECT *, available_at <= $7 AS is_due, NULL::uuid AS consumer
    FROM unnest((SELECT $1::text[]), $2::uuid[], $3::text[], $4::text[], $5::smallint[], $6::timestamptz[])
        WITH ORDINALITY AS given (queue, task, tenant, agent, priority, available_at, place)
),
-- part queued
SELECT pg_notify('sutazai_queues', queue) FROM due

-- part: unwaited
-- The transaction does not wait for the disk. What a crash forgets of it is word that is free again, which does no harm.
(SELECT set_config('synchronous_commit', 'off', true)) = 'off'

-- name: take_dispatch
WITH picked AS (
    SELECT id FROM dispatch
    WHERE queue = $1 AND is_due AND consumer IS NULL
        AND EXISTS (SELECT FROM dispatch_consumers WHERE dispatch_consumers.id = $3)
        AND
-- part unwaited
    ORDER BY priority, turn, id
    LIMIT $2
    FOR UPDATE SKIP LOCKED
), taken AS (
    -- An array, and not a join, whose plan for any limit would read the whole table.
    UPDATE dispatch SET consumer = $3, deliveries = deliveries + 1
    WHERE id = ANY (ARRAY(SELECT id FROM picked))
    RETURNING dispatch.id, task, tenant, agent, priority, turn, deliveries
)
SELECT id, task, tenant, agent, priority, deliveries FROM taken ORDER BY priority, turn, id

-- name: passed_over_dispatch
-- Queues in which the next one of a lower priority has waited since then.
SELECT DISTINCT named.queue
FROM unnest($1::text[]) AS named (queue) CROSS JOIN unnest('{1,2}'::smallint[]) AS level (priority)
CROSS JOIN LATERAL (
    SELECT available_at FROM dispatch
    WHERE dispatch.queue = named.queue AND dispatch.priority = level.priority AND is_due AND consumer IS NULL
    ORDER BY turn, id LIMIT 1
) AS head
WHERE head.available_at <= $2

-- name: take_passed_over_dispatch
-- The next ones of lower priorities, of those that have waited since then whoever waited longest.
WITH heads AS (
    SELECT head.id FROM unnest('{1,2}'::smallint[]) AS level (priority) CROSS JOIN LATERAL (
        SELECT id, available_at FROM dispatch
        WHERE queue = $1 AND dispatch.priority = level.priority AND is_due AND consumer IS NULL
        ORDER BY turn, id LIMIT $2
    ) AS head
    WHERE head.available_at <= $4
    ORDER BY head.available_at, head.id LIMIT $2
), picked AS (
    SELECT id FROM dispatch
    WHERE id = ANY (ARRAY(SELECT id FROM heads)) AND consumer IS NULL
        AND EXISTS (SELECT FROM dispatch_consumers WHERE dispatch_consumers.id = $3)
    FOR UPDATE SKIP LOCKED
), taken AS (
    UPDATE dispatch SET consumer = $3, deliveries = deliveries + 1
    WHERE id = ANY (ARRAY(SELECT id FROM picked))
    RETURNING dispatch.id, task, tenant, agent, priority, turn, deliveries
)
SELECT id, task, tenant, agent, priority, deliveries FROM taken ORDER BY priority, turn, id

-- name: free_unknown_dispatch
UPDATE dispatch SET consumer = NULL WHERE consumer = $1 AND id <> ALL ($2::bigint[])

-- name: ack_dispatch
-- In words that no index knows: that of consumers still has all that they dealt with since the last vacuum.
DELETE FROM dispatch WHERE id = ANY ($1::bigint[]) AND consumer IS NOT DISTINCT FROM $2 AND
-- part unwaited

-- name: hand_back_dispatch
-- Nobody can start what names no task.
UPDATE dispatch SET consumer = NULL, queue = CASE WHEN task IS NULL THEN 'dead_letters' ELSE queue END
WHERE id = ANY ($1::bigint[]) AND consumer IS NOT DISTINCT FROM $2 RETURNING queue

-- name: leave_dispatch
UPDATE dispatch SET consumer = NULL WHERE consumer = $1 RETURNING queue

-- name: ripe_dispatch
DELETE FROM dispatch
WHERE id = ANY (ARRAY(
    SELECT id FROM dispatch WHERE NOT is_due AND available_at <= $1
    ORDER BY available_at LIMIT $2 FOR UPDATE SKIP LOCKED
))
RETURNING id, queue, task, tenant, agent, priority, available_at

-- name: depth_dispatch
-- In the order of the index, so that it is the index that is read.
SELECT count(*) FROM (
    SELECT FROM dispatch WHERE queue = $1 AND is_due AND consumer IS NULL ORDER BY priority, turn, id LIMIT $2
) AS waiting

-- name: enter_consumer
INSERT INTO dispatch_consumers (id, queue) VALUES ($1, $2)

-- name: beat_consumer
UPDATE dispatch_consumers SET beat = beat + 1 WHERE id = $1 RETURNING beat

-- name: all_beats
SELECT id, beat FROM dispatch_consumers

-- name: drop_consumers
DELETE FROM dispatch_consumers WHERE id = ANY ($1::uuid[])

-- name: free_dispatch
-- What is held by nobody who is there. Holders are found one after the other in their index, for a table that was not
-- analysed yet would be read as a whole.
WITH RECURSIVE holders AS (
    (SELECT consumer FROM dispatch WHERE consumer IS NOT NULL ORDER BY consumer LIMIT 1)
    UNION ALL
    SELECT (SELECT dispatch.consumer FROM dispatch WHERE dispatch.consumer > holders.consumer ORDER BY consumer LIMIT 1)
    FROM holders WHERE holders.consumer IS NOT NULL
)
UPDATE dispatch SET consumer = NULL
WHERE consumer = ANY (ARRAY(
    SELECT consumer FROM holders
    WHERE consumer IS NOT NULL AND NOT EXISTS (SELECT FROM dispatch_consumers WHERE id = consumer)
))
RETURNING queue

-- name: lock_message_name
SELECT pg_advisory_xact_lock(5461333, hashtext($1 || chr(1) || $2))

-- name: send_message
INSERT INTO agent_messages (tenant, name, sender, body) VALUES ($1, $2, $3, $4) RETURNING number

-- name: received_messages
SELECT number, body FROM agent_messages WHERE tenant = $1 AND name = $2 AND number > $3 ORDER BY number LIMIT 1000

-- name: broadcast_events
-- As `tail_events`, without what is too large to be carried.
SELECT position, task, version, tenant, kind, schema, at, CASE WHEN octet_length(data) <= $4 THEN data END AS data
FROM events
WHERE position > $1 AND position <= $3
ORDER BY position
LIMIT $2

-- name: broadcast_messages
SELECT coalesce(position, number) AS position, number, tenant, name, sender, at, body
FROM agent_messages
WHERE coalesce(position, number) > $1 AND coalesce(position, number) <= $3
ORDER BY coalesce(position, number)
LIMIT $2

-- name: broadcast
SELECT position, fence, beat FROM broadcasts WHERE source = $1

-- name: take_broadcast
-- Of several who found it still, one.
UPDATE broadcasts SET fence = fence + 1, beat = 1 WHERE source = $1 AND fence = $2 AND beat = $3
RETURNING position, fence, beat

-- name: advance_broadcast
UPDATE broadcasts SET position = $3, beat = beat + 1 WHERE source = $1 AND fence = $2 RETURNING beat

-- name: leave_broadcast
UPDATE broadcasts SET beat = 0 WHERE source = $1 AND fence = $2

-- name: beat_worker
INSERT INTO workers (name, beat) VALUES ($1, 1) ON CONFLICT (name) DO UPDATE SET beat = workers.beat + 1

-- name: worker_beats
SELECT name, beat FROM workers

-- name: forget_workers
-- Unless they were heard of since.
DELETE FROM workers USING unnest($1::text[], $2::bigint[]) AS gone (name, beat)
WHERE workers.name = gone.name AND workers.beat = gone.beat

-- name: tasks_under_way
SELECT id, deliveries, queue FROM tasks
WHERE status = 'processing' AND worker = ANY ($1::text[]) AND deleted_at IS NULL
    AND sutazai_slot(id) NOT IN (SELECT slot FROM slots_here WHERE state <> 'owned')
LIMIT $2

-- part: without_word
-- Tasks that may be started since then, where no word that is due since then is here: it would be on its way, and so may
-- that of others be. In the order of an index, so that it is the index that is read; an EXISTS would forget the order.
FROM tasks
WHERE status = 'pending' AND queue = $1 AND created_at <= $2 AND run_at <= $2 AND deleted_at IS NULL
    AND sutazai_slot(id) NOT IN (SELECT slot FROM slots_here WHERE state <> 'owned')
    AND (
        SELECT id FROM dispatch WHERE queue = $1 AND NOT is_due AND available_at <= $2 ORDER BY available_at LIMIT 1
    ) IS NULL

-- name: count_without_word
-- Where much waits, its head tells as much as all of it, most of the time.
SELECT count(*) FROM (
SELECT
-- part without_word
    AND (
        SELECT id FROM (
            SELECT id, available_at FROM dispatch WHERE queue = $1 AND is_due AND consumer IS NULL
            ORDER BY priority, turn, id LIMIT 100
        ) AS head
        WHERE available_at <= $2 LIMIT 1
    ) IS NULL
LIMIT $3
) AS found

-- name: lock_refill
-- One at a time for each queue. A statement before that which fills it, so that whoever comes second sees what the first
-- one wrote.
SELECT pg_try_advisory_xact_lock(5461334, hashtext($1))

-- name: refill_dispatch
WITH news AS (
    SELECT queue, id AS task, tenant, agent, priority, run_at AS available_at, true AS is_due, NULL::uuid AS consumer,
        row_number() OVER (ORDER BY run_at, id) AS place
-- part without_word
        AND (
            SELECT id FROM dispatch WHERE queue = $1 AND is_due AND consumer IS NULL AND available_at <= $2
            ORDER BY priority, turn, id LIMIT 1
        ) IS NULL
    ORDER BY run_at, id
    LIMIT $3
),
-- part queued
SELECT (SELECT count(*) FROM news), (SELECT count(pg_notify('sutazai_queues', queue)) FROM due)
