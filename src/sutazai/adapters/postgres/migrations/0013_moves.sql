-- Signs of life of those who move shard slots. Programs that know nothing of them give none, and are taken for gone.
ALTER TABLE shard_moves
    -- Who moves it; another one who begins anew takes its place.
    ADD COLUMN mover text NOT NULL DEFAULT '',
    -- Grows while the mover lives; 0 = it is gone.
    ADD COLUMN beat bigint NOT NULL DEFAULT 0;

-- Messages of agents have positions, given by each database as those of events are: one that came with its tenant keeps
-- its number, and gets a position past all that were told on the stream from here. The position of those that were
-- there before is their number: to write it into all of them would take long.
CREATE SEQUENCE agent_messages_position;
ALTER TABLE agent_messages ADD COLUMN position bigint;
-- Nobody writes to the table by now.
SELECT setval('agent_messages_position', last_value, is_called) FROM agent_messages_number_seq;
ALTER TABLE agent_messages ALTER COLUMN position SET DEFAULT nextval('agent_messages_position');
ALTER SEQUENCE agent_messages_position OWNED BY agent_messages.position;
CREATE INDEX idx_agent_messages_position ON agent_messages (coalesce(position, number));
