-- Conversations that the platform keeps.

CREATE TABLE sessions (
    -- Begins with the time it was made, so that the order of ids is that of age.
    id text PRIMARY KEY,
    tenant text NOT NULL,
    model text NOT NULL,
    system text NOT NULL,
    metadata jsonb NOT NULL,
    ttl_s double precision NOT NULL CHECK (ttl_s > 0),
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    -- The number of the last turn: of two turns at once only one can raise it.
    version integer NOT NULL,
    messages integer NOT NULL
) WITH (fillfactor = 70); -- each turn writes a new expires_at

CREATE INDEX sessions_of_tenant ON sessions (tenant, id);
CREATE INDEX sessions_over ON sessions (expires_at);

CREATE TABLE session_messages (
    session_id text NOT NULL REFERENCES sessions ON DELETE CASCADE,
    number integer NOT NULL,
    turn integer NOT NULL,
    role text NOT NULL,
    tokens integer NOT NULL,
    -- A JSON object, byte for byte as it was written: jsonb would refuse an escaped NUL and lose the order of fields.
    body bytea NOT NULL,
    PRIMARY KEY (session_id, number)
);
