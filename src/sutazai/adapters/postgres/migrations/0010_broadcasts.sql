-- How far events and messages of agents were carried to the stream, and who carries them.

CREATE TABLE broadcasts (
    source text PRIMARY KEY,
    -- Everything up to here is in the stream.
    position bigint NOT NULL DEFAULT 0,
    -- The number of whoever carries; one who takes over raises it, and the one before is refused.
    fence bigint NOT NULL DEFAULT 0,
    -- Grows while the carrier lives; 0 = nobody carries.
    beat bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

-- What was there before is in the tables, and not carried after the event.
INSERT INTO broadcasts (source, position) VALUES
    ('events', (SELECT coalesce(max(position), 0) FROM events)),
    ('messages', (SELECT coalesce(max(number), 0) FROM agent_messages));

-- So that it can be told how many read which queue.
ALTER TABLE dispatch_consumers ADD COLUMN queue text NOT NULL DEFAULT '';
