-- Signs of life of those who work on tasks, by the name that a task has as its `worker`.
CREATE TABLE workers (
    name text PRIMARY KEY,
    -- Grows while it lives.
    beat bigint NOT NULL
);
