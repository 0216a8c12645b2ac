-- Tasks, their events, and the table that is both the outbox and the queue of one machine.

-- Rows are found by id alone: the id holds the milliseconds of created_at, so one partition is looked at.
CREATE TABLE tasks (
    id uuid NOT NULL,
    created_at timestamptz NOT NULL,
    tenant text NOT NULL,
    user_id text NOT NULL,
    agent text NOT NULL,
    queue text NOT NULL,
    status text NOT NULL CHECK (
        status IN ('waiting', 'pending', 'processing', 'completed', 'failed', 'cancelled')
    ),
    priority smallint NOT NULL,
    parent uuid,
    -- The draft, the newest progress, checkpoint and result: JSON as it was written.
    draft text NOT NULL,
    result text NOT NULL DEFAULT '',
    result_object text NOT NULL DEFAULT '',
    progress text NOT NULL DEFAULT '',
    checkpoint text NOT NULL DEFAULT '',
    version integer NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    -- The fencing token of the attempt under way.
    deliveries integer NOT NULL DEFAULT 0,
    losses integer NOT NULL DEFAULT 0,
    waits_for integer NOT NULL DEFAULT 0,
    worker text NOT NULL DEFAULT '',
    is_cancelling boolean NOT NULL DEFAULT false,
    reason text,
    error text NOT NULL DEFAULT '',
    tokens bigint NOT NULL DEFAULT 0,
    run_at timestamptz NOT NULL,
    deadline timestamptz,
    started_at timestamptz,
    ended_at timestamptz,
    deleted_at timestamptz,
    PRIMARY KEY (id, created_at)
) PARTITION BY RANGE (created_at);

CREATE INDEX idx_tasks_status_created ON tasks (status, created_at) WHERE status IN ('pending', 'processing');
CREATE INDEX idx_tasks_user_status ON tasks (user_id, status) WHERE deleted_at IS NULL;
CREATE INDEX idx_tasks_tenant ON tasks (tenant, id) WHERE deleted_at IS NULL;
CREATE INDEX idx_tasks_parent ON tasks (parent) WHERE parent IS NOT NULL;
CREATE INDEX idx_tasks_deadline ON tasks (deadline) WHERE deadline IS NOT NULL AND status IN ('waiting', 'pending');
CREATE TABLE tasks_default PARTITION OF tasks DEFAULT;

CREATE SEQUENCE events_position;
CREATE TABLE events (
    -- Given in the order of versions, before a commit, and so visible in any order: see `adapters/postgres/tail.py`.
    position bigint NOT NULL DEFAULT nextval('events_position'),
    task uuid NOT NULL,
    version integer NOT NULL,
    tenant text NOT NULL,
    kind text NOT NULL,
    schema smallint NOT NULL,
    at timestamptz NOT NULL,
    data text NOT NULL,
    -- That of the task, so that a task and its events lie in partitions of the same time.
    created_at timestamptz NOT NULL,
    PRIMARY KEY (task, version, created_at)
) PARTITION BY RANGE (created_at);
CREATE INDEX idx_events_position ON events (position);
CREATE TABLE events_default PARTITION OF events DEFAULT;

-- Who waits for whom. Rows go with the end of the task that is waited for.
CREATE TABLE task_waits (
    waits_for uuid NOT NULL,
    waiter uuid NOT NULL,
    -- A waiter that needs success fails with what it waited for; others go on either way.
    needs_success boolean NOT NULL,
    PRIMARY KEY (waits_for, waiter)
);
CREATE INDEX idx_task_waits_waiter ON task_waits (waiter);

CREATE TABLE task_keys (
    tenant text NOT NULL,
    key text NOT NULL,
    task uuid NOT NULL,
    PRIMARY KEY (tenant, key)
);

-- Word of tasks that may be started: the outbox where a broker carries them on, else the queue itself.
CREATE TABLE dispatch (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    queue text NOT NULL,
    task uuid,
    tenant text NOT NULL,
    agent text NOT NULL,
    priority smallint NOT NULL,
    -- Start tag of start-time fair queueing among tenants: lower goes first.
    turn double precision NOT NULL,
    is_due boolean NOT NULL,
    available_at timestamptz NOT NULL,
    consumer uuid,
    deliveries integer NOT NULL DEFAULT 0
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
    autovacuum_vacuum_cost_delay = 0);
CREATE INDEX idx_dispatch_ready ON dispatch (queue, priority, turn, id) WHERE is_due AND consumer IS NULL;
CREATE INDEX idx_dispatch_later ON dispatch (available_at) WHERE NOT is_due;
CREATE INDEX idx_dispatch_held ON dispatch (consumer) WHERE consumer IS NOT NULL;

CREATE TABLE dispatch_turns (
    queue text NOT NULL,
    tenant text NOT NULL,
    turn double precision NOT NULL,
    PRIMARY KEY (queue, tenant)
) WITH (fillfactor = 50);

-- Readers of the table. One whose beat stands still while others look is gone, and what it held is free.
CREATE TABLE dispatch_consumers (
    id uuid PRIMARY KEY,
    beat bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

-- What agents told each other.
CREATE TABLE agent_messages (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text NOT NULL,
    name text NOT NULL,
    sender text NOT NULL,
    body text NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX idx_agent_messages_name ON agent_messages (tenant, name, number);
