-- Tasks that are submitted again and again.

CREATE TABLE schedules (
    id uuid PRIMARY KEY,
    tenant text NOT NULL,
    cron text NOT NULL,
    timezone text NOT NULL,
    -- The draft of the task: JSON.
    draft text NOT NULL,
    created_at timestamptz NOT NULL,
    due_at timestamptz NOT NULL,
    last_due_at timestamptz,
    last_task text NOT NULL DEFAULT '',
    last_error text NOT NULL DEFAULT ''
);
CREATE INDEX idx_schedules_due ON schedules (due_at);
CREATE INDEX idx_schedules_tenant ON schedules (tenant, id);
