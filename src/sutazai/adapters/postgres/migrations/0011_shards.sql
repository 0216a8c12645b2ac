-- Data of tenants over several databases: who has which shard slot, and in each database which of them it owns.

-- The home of a tenant: where its data is kept. Empty where there are no regions.
ALTER TABLE tenants ADD COLUMN region text NOT NULL DEFAULT '';

-- Of the directory: the shards, the owner of each slot, and moves that have begun and not ended.
CREATE TABLE shards (
    name text PRIMARY KEY,
    region text NOT NULL,
    added_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE shard_slots (
    region text NOT NULL,
    slot smallint NOT NULL CHECK (slot BETWEEN 0 AND 4095),
    shard text NOT NULL,
    PRIMARY KEY (region, slot)
);
CREATE TABLE shard_moves (
    region text NOT NULL,
    slot smallint NOT NULL,
    source text NOT NULL,
    target text NOT NULL,
    begun_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (region, slot)
);

-- Of each shard: which one it is, and the slots whose rows it has. Of a slot that is not owned, rows are on their way.
CREATE TABLE shard_here (
    name text PRIMARY KEY
);
CREATE TABLE slots_here (
    slot smallint PRIMARY KEY,
    state text NOT NULL CHECK (state IN ('owned', 'arriving', 'abandoned', 'left')),
    -- Of what is arriving: who moves it. Somebody else who begins anew takes its place.
    mover text NOT NULL DEFAULT ''
);

-- The slot of a tenant, as `policy/sharding.py` has it, and the one in the id of a task.
CREATE FUNCTION sutazai_slot(tenant text) RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT (get_byte(sha256(convert_to(tenant, 'UTF8')), 0) << 4) | (get_byte(sha256(convert_to(tenant, 'UTF8')), 1) >> 4)
$$;
CREATE FUNCTION sutazai_slot(task uuid) RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT ((get_byte(uuid_send(task), 6) & 15) << 8) | get_byte(uuid_send(task), 7)
$$;

-- Holds the slots here until the end of the transaction, or says that one is not here. -1 stands for none in
-- particular. It is volatile, so that its second statement sees what was committed while the first one waited.
CREATE FUNCTION sutazai_enter(slots smallint[]) RETURNS void LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(5461340, slot) FROM unnest(slots) AS wanted (slot);
    IF EXISTS (
        SELECT FROM unnest(slots) AS wanted (slot)
        WHERE slot >= 0 AND NOT EXISTS (
            SELECT FROM slots_here WHERE slots_here.slot = wanted.slot AND state = 'owned'
        )
    ) THEN
        RAISE EXCEPTION 'a shard slot is not here' USING ERRCODE = 'SU421';
    END IF;
END
$$;

CREATE FUNCTION sutazai_tell_shards() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('sutazai_shards', '');
    RETURN NULL;
END
$$;
CREATE TRIGGER shards_changed AFTER INSERT OR UPDATE OR DELETE ON shard_slots
    FOR EACH STATEMENT EXECUTE FUNCTION sutazai_tell_shards();
CREATE TRIGGER homes_changed AFTER INSERT OR UPDATE OR DELETE ON tenants
    FOR EACH STATEMENT EXECUTE FUNCTION sutazai_tell_shards();

-- Numbers are given by each shard, so those of two tenants that come together may be the same.
ALTER TABLE agent_messages DROP CONSTRAINT agent_messages_pkey, ADD PRIMARY KEY (tenant, name, number);
DROP INDEX idx_agent_messages_name;
