-- How many tasks of one tenant wait, and how many may. Programs that know nothing of it go on.

ALTER TABLE tenants ADD COLUMN waiting_tasks bigint CHECK (waiting_tasks >= 0);

CREATE INDEX idx_tasks_tenant_unstarted ON tasks (tenant)
    WHERE status IN ('waiting', 'pending') AND deleted_at IS NULL;
