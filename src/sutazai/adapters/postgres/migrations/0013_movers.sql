-- Signs of life of those who move shard slots. Programs that know nothing of them give none, and are taken for gone.
ALTER TABLE shard_moves
    -- Who moves it; another one who begins anew takes its place.
    ADD COLUMN mover text NOT NULL DEFAULT '',
    -- Grows while the mover lives; 0 = it is gone.
    ADD COLUMN beat bigint NOT NULL DEFAULT 0;
