-- Keys that clients show, and what each of them took.

CREATE TABLE keys (
    id text PRIMARY KEY,
    name text NOT NULL CHECK (char_length(name) BETWEEN 1 AND 64),
    tenant text NOT NULL,
    role text NOT NULL CHECK (role IN ('user', 'admin')),
    -- SHA-256 of the key; the key itself is never stored.
    digest bytea NOT NULL UNIQUE CHECK (octet_length(digest) = 32),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_used_at timestamptz,
    revoked_at timestamptz
) WITH (fillfactor = 70); -- room to write last_used_at in place

-- A revoked key gives its name back.
CREATE UNIQUE INDEX keys_live_name ON keys (name) WHERE revoked_at IS NULL;

CREATE TABLE usage (
    hour timestamptz NOT NULL,
    -- Empty where no key was needed, so there is no foreign key.
    key_id text NOT NULL,
    tenant text NOT NULL,
    model text NOT NULL,
    requests bigint NOT NULL,
    errors bigint NOT NULL,
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    PRIMARY KEY (hour, key_id, tenant, model)
);

-- How far each writer of usage got, so that a write whose answer was lost is not counted again.
CREATE TABLE usage_writers (
    id uuid PRIMARY KEY,
    written bigint NOT NULL,
    written_at timestamptz NOT NULL
) WITH (fillfactor = 70);

CREATE FUNCTION sutazai_tell_keys() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('sutazai_keys', '');
    RETURN NULL;
END
$$;

-- Not on last_used_at: that is written every few seconds and changes nothing about who may ask.
CREATE TRIGGER keys_changed
    AFTER INSERT OR DELETE OR TRUNCATE OR UPDATE OF id, name, tenant, role, digest, revoked_at ON keys
    FOR EACH STATEMENT EXECUTE FUNCTION sutazai_tell_keys();
