-- Every statement of the store of files, in the form of `statements.sql`.

-- name: lock_files_of_tenant
-- Who counts and then inserts must not be overtaken. The first number sets these locks apart from others.
SELECT pg_advisory_xact_lock(5461335, hashtext($1))

-- name: add_file
INSERT INTO files (id, tenant, name, purpose, size_bytes, created_at)
SELECT $1, $2, $3, $4, $5, $6
WHERE (SELECT count(*) FROM files WHERE tenant = $2) < $7
RETURNING id

-- name: file
SELECT id, tenant, name, purpose, size_bytes, created_at
FROM files
WHERE id = $2 AND tenant = $1

-- name: files_newest_first
SELECT id, tenant, name, purpose, size_bytes, created_at
FROM files
WHERE tenant = $1 AND ($2 = '' OR purpose = $2) AND ($3 = '' OR id < $3)
ORDER BY id DESC
LIMIT $4

-- name: files_oldest_first
SELECT id, tenant, name, purpose, size_bytes, created_at
FROM files
WHERE tenant = $1 AND ($2 = '' OR purpose = $2) AND id > $3
ORDER BY id
LIMIT $4

-- name: delete_file
DELETE FROM files WHERE id = $2 AND tenant = $1 RETURNING id
