-- Ends of tasks whose clients left an address: here until they were told.

CREATE TABLE webhooks (
    task uuid NOT NULL,
    version integer NOT NULL,
    -- Of the task, so that its partition is known.
    created_at timestamptz NOT NULL,
    status text NOT NULL,
    -- Whoever takes it moves this ahead; should they die, it is due again then.
    due_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    attempts integer NOT NULL DEFAULT 0,
    PRIMARY KEY (task, version)
) WITH (fillfactor = 70);
CREATE INDEX idx_webhooks_due ON webhooks (due_at);
