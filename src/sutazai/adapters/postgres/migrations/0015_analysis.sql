-- A look at a hundred thousand tasks takes half a second of a core, and under load a tenth of them has changed every few
-- seconds. What is known of a partition is as good when twice as much has changed as there is in it; those that grow
-- from little are looked at by `grown.py`. New ones get the same from `partitions.py`.
DO $$
DECLARE
    part regclass;
BEGIN
    FOR part IN SELECT inhrelid FROM pg_inherits WHERE inhparent IN ('tasks'::regclass, 'events'::regclass) LOOP
        EXECUTE format('ALTER TABLE %s SET (autovacuum_analyze_scale_factor = 2)', part);
    END LOOP;
END
$$;
