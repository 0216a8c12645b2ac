-- What keys may do and take, tenants, and who changed what.

-- Keys from before may do all that their role can.
ALTER TABLE keys
    ADD COLUMN scopes text[] NOT NULL DEFAULT '{inference,tasks,admin}',
    ADD COLUMN priority text CHECK (priority IN ('high', 'normal', 'low')),
    ADD COLUMN limits jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(limits) = 'object');

CREATE TABLE tenants (
    name text PRIMARY KEY CHECK (char_length(name) BETWEEN 1 AND 64),
    weight double precision NOT NULL CHECK (weight > 0 AND weight < 'Infinity'),
    priority text NOT NULL CHECK (priority IN ('high', 'normal', 'low')),
    limits jsonb NOT NULL CHECK (jsonb_typeof(limits) = 'object')
);

-- Gateways learn keys and tenants together, so both are told on one channel.
DROP TRIGGER keys_changed ON keys;
CREATE TRIGGER keys_changed
    AFTER INSERT OR DELETE OR TRUNCATE
        OR UPDATE OF id, name, tenant, role, digest, revoked_at, scopes, priority, limits ON keys
    FOR EACH STATEMENT EXECUTE FUNCTION sutazai_tell_keys();
CREATE TRIGGER tenants_changed
    AFTER INSERT OR DELETE OR TRUNCATE OR UPDATE ON tenants
    FOR EACH STATEMENT EXECUTE FUNCTION sutazai_tell_keys();

CREATE TABLE audit (
    number bigint PRIMARY KEY,
    at timestamptz NOT NULL,
    actor text NOT NULL,
    action text NOT NULL,
    subject text NOT NULL,
    detail jsonb NOT NULL,
    request_id text NOT NULL,
    outcome text NOT NULL,
    -- Digest of the entry before, 32 zero bytes for the first.
    previous bytea NOT NULL,
    digest bytea NOT NULL
);

-- Number, time and seal are the database's, whatever was given: nobody can write them wrong.
CREATE FUNCTION sutazai_seal_audit() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    last audit%ROWTYPE;
    field text;
    sealed bytea;
BEGIN
    -- One writer at a time: two entries after the same one would be a fork. The lock ends with the transaction.
    PERFORM pg_advisory_xact_lock(x'5357544155'::int8);
    SELECT * INTO last FROM audit ORDER BY number DESC LIMIT 1;
    NEW.number := coalesce(last.number, 0) + 1;
    NEW.at := clock_timestamp();
    NEW.previous := coalesce(last.digest, decode(repeat('00', 32), 'hex'));
    sealed := NEW.previous;
    FOREACH field IN ARRAY ARRAY[
        NEW.number::text,
        to_char(NEW.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US'),
        NEW.actor, NEW.action, NEW.subject, NEW.detail::text, NEW.request_id, NEW.outcome
    ] LOOP
        sealed := sealed || convert_to(octet_length(convert_to(field, 'UTF8')) || ':' || field, 'UTF8');
    END LOOP;
    NEW.digest := sha256(sealed);
    RETURN NEW;
END
$$;

CREATE TRIGGER audit_sealed
    BEFORE INSERT ON audit
    FOR EACH ROW EXECUTE FUNCTION sutazai_seal_audit();

CREATE FUNCTION sutazai_keep_audit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'entries of the audit log are never changed or removed (% was refused)', TG_OP;
END
$$;

CREATE TRIGGER audit_kept
    BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
    FOR EACH STATEMENT EXECUTE FUNCTION sutazai_keep_audit();
