-- Files of clients. Their bytes are objects.

CREATE TABLE files (
    -- Begins with the time it was made, so that the order of ids is that of age.
    id text COLLATE "C" PRIMARY KEY,
    tenant text NOT NULL,
    name text NOT NULL,
    purpose text NOT NULL,
    size_bytes bigint NOT NULL CHECK (size_bytes >= 0),
    created_at timestamptz NOT NULL
);

CREATE INDEX files_of_tenant ON files (tenant, id);
