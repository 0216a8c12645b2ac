-- Pages of all tenants' tasks of one status. Those that are completed are most of all, and found without.

CREATE INDEX idx_tasks_status_id ON tasks (status, id)
    WHERE status IN ('waiting', 'failed', 'cancelled') AND deleted_at IS NULL;
