"""The PostgreSQL stores when the server dies, hangs or changes, and the migrations."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tests.postgres_servers import need_postgres

import sutazai
from sutazai.adapters.postgres import migrate, statements
from sutazai.adapters.postgres.database import open_database
from sutazai.adapters.postgres.embedded import EmbeddedPostgres
from sutazai.adapters.postgres.keys import PostgresKeyStore
from sutazai.adapters.postgres.usage import PostgresUsageStore
from sutazai.core.errors import StoreUnavailable
from sutazai.core.identity import Role
from sutazai.ports.keys import UsageRow
from sutazai.settings.secret import Secret

SOURCE = Path(sutazai.__file__).parents[1]
FILES = SOURCE / "sutazai" / "adapters" / "postgres" / "migrations"
HOUR = datetime(2026, 3, 1, 12, tzinfo=UTC)
LIMIT_S = 2.0
SLACK_S = 2.0
BACK_S = 20.0


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    need_postgres()
    with tempfile.TemporaryDirectory(prefix="sutazai-") as name:
        yield Path(name)


@pytest.fixture
async def url(folder: Path) -> AsyncIterator[Secret]:
    """The address of an empty database."""
    server = EmbeddedPostgres()
    address = await server.start(folder)
    connection: Any = await asyncpg.connect(address)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.close()
    yield Secret(address)
    await server.stop()


@asynccontextmanager
async def keys_at(url: Secret, *, poll_s: float = 30.0) -> AsyncIterator[PostgresKeyStore]:
    async with open_database(url, timeout_s=LIMIT_S) as database:
        await migrate.migrate(database, migrate.read())
        yield PostgresKeyStore(database, poll_s=poll_s)


async def query(url: Secret, statement: str) -> list[Any]:
    connection: Any = await asyncpg.connect(url.reveal())
    try:
        return list(await connection.fetch(statement))
    finally:
        await connection.close()


def server_pids(folder: Path) -> list[int]:
    """The server and its processes, parent first."""
    parent = int((folder / "postgres" / "postmaster.pid").read_text().split()[0])
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [parent, *map(int, children)]


def kill_server(folder: Path) -> None:
    """Kill the server and wait until nothing of it is left."""
    pids = server_pids(folder)
    os.kill(pids[0], signal.SIGKILL)
    deadline = time.monotonic() + BACK_S
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        os.sched_yield()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class LossyWay:
    """A way to the server on which the first COMMIT, or else only the answer to it, is lost."""

    def __init__(self, there: Path, *, forward: bool) -> None:
        self._there = there
        self._forward = forward
        self._lost = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets: list[socket.socket] = []

    @asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator[None]:
        listener = self._socket()
        listener.bind(str(path))
        listener.listen()
        self._tasks.add(asyncio.create_task(self._accept(listener), name="accept"))
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
            for end in self._sockets:
                end.close()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            client, _ = await asyncio.get_running_loop().sock_accept(listener)
            self._sockets.append(client)
            self._tasks.add(asyncio.create_task(self._serve(client), name="serve"))

    async def _serve(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        server = self._socket()
        with suppress(OSError):
            await loop.sock_connect(server, str(self._there))
            answers = asyncio.create_task(self._pump(server, client), name="answers")
            self._tasks.add(answers)
            while chunk := await loop.sock_recv(client, 65536):
                if b"COMMIT;" in chunk and not self._lost:
                    self._lost = True
                    answers.cancel()
                    if self._forward:
                        await loop.sock_sendall(server, chunk)
                        await loop.sock_recv(server, 1)  # it was committed
                    break
                await loop.sock_sendall(server, chunk)
        for end in (client, server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    async def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while chunk := await asyncio.get_running_loop().sock_recv(source, 65536):
                await asyncio.get_running_loop().sock_sendall(sink, chunk)
            sink.shutdown(socket.SHUT_RDWR)

    def _socket(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.setblocking(False)
        self._sockets.append(made)
        return made


@asynccontextmanager
async def lossy(url: Secret, folder: Path, *, forward: bool) -> AsyncIterator[Secret]:
    way = LossyWay(folder / "postgres" / ".s.PGSQL.5432", forward=forward)
    with tempfile.TemporaryDirectory(prefix="sutazai-") as name:
        async with way.listening(Path(name) / ".s.PGSQL.5432"):
            yield Secret(url.reveal().replace(str(folder / "postgres"), name))


@contextmanager
def frozen(folder: Path) -> Iterator[None]:
    pids = server_pids(folder)
    signal_all(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        signal_all(pids, signal.SIGCONT)


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # one that was about to end
            os.kill(pid, number)


async def test_a_killed_server_is_told_within_the_limit_and_used_again_when_it_is_back(
    url: Secret, folder: Path
) -> None:
    async with keys_at(url) as keys:
        made, _ = await keys.create(name="laptop", tenant="acme", role=Role.USER)
        kill_server(folder)
        began = time.monotonic()

        for call in (keys.all(), keys.create(name="b", tenant="t", role=Role.USER), keys.revoke("laptop")):
            with pytest.raises(StoreUnavailable, match=r"database\.url"):
                await call
        assert time.monotonic() - began < 3 * (LIMIT_S + SLACK_S)

        again = EmbeddedPostgres()
        await again.start(folder)
        assert await keys.all() == [made]
        await again.stop()


async def test_a_silent_server_is_told_within_the_limit_and_used_again_when_it_speaks(
    url: Secret, folder: Path
) -> None:
    async with keys_at(url) as keys:
        made, _ = await keys.create(name="laptop", tenant="acme", role=Role.USER)
        with frozen(folder):
            for _ in range(2):  # on an open connection, then on a new one
                began = time.monotonic()
                with pytest.raises(StoreUnavailable, match="did not answer within 2 s"):
                    await keys.all()
                assert time.monotonic() - began < LIMIT_S + SLACK_S

        assert await keys.all() == [made]


async def test_a_server_that_dies_in_the_middle_of_a_call_is_told(url: Secret, folder: Path) -> None:
    async with open_database(url, timeout_s=BACK_S) as database:

        async def ask() -> None:
            async with database.transaction() as connection:
                kill_server(folder)
                await connection.fetchval("SELECT 1")

        with pytest.raises(StoreUnavailable):
            await ask()


async def test_many_callers_wait_no_longer_than_the_limit(url: Secret, folder: Path) -> None:
    """More callers than connections: those that wait for a connection have the same limit."""
    async with keys_at(url) as keys:
        with frozen(folder):
            began = time.monotonic()
            results = await asyncio.gather(*(keys.all() for _ in range(20)), return_exceptions=True)

            assert time.monotonic() - began < LIMIT_S + SLACK_S
        assert {type(result) for result in results} == {StoreUnavailable}
        assert await keys.all() == []


async def test_a_cancelled_call_leaves_a_store_that_works(url: Secret, folder: Path) -> None:
    async with keys_at(url) as keys:
        with frozen(folder):
            asking = [asyncio.create_task(keys.all(), name="ask") for _ in range(8)]
            await asyncio.sleep(0)
            for task in asking:
                task.cancel()
            results = await asyncio.gather(*asking, return_exceptions=True)
            assert {type(result) for result in results} == {asyncio.CancelledError}

        assert await keys.all() == []


@pytest.mark.alone
async def test_a_change_is_seen_by_another_connection_within_a_second(url: Secret) -> None:
    async with (
        keys_at(url) as here,
        keys_at(url) as there,
        aclosing(there.changes()) as changes,  # type: ignore[type-var]
    ):
        await anext(changes)
        for change in (here.create(name="a", tenant="t", role=Role.USER), here.revoke("a")):
            await change
            async with asyncio.timeout(1.0):
                await anext(changes)


@pytest.mark.parametrize("forward", [True, False], ids=["answer lost", "commit lost"])
async def test_a_write_whose_answer_was_lost_is_counted_once(url: Secret, folder: Path, forward: bool) -> None:
    row = UsageRow(key_id="k", tenant="t", model="m", hour=HOUR, requests=5, errors=1, input_tokens=7, output_tokens=9)
    async with open_database(url, timeout_s=LIMIT_S) as database:
        await migrate.migrate(database, migrate.read())
        async with lossy(url, folder, forward=forward) as way, open_database(way, timeout_s=LIMIT_S) as over:
            store = PostgresUsageStore(over)
            await store.add([row])
            counted = await PostgresUsageStore(database).total(since=HOUR)
            assert counted == ([row] if forward else [])

            await store.add([row])

        (total,) = await PostgresUsageStore(database).total(since=HOUR)
        assert (total.requests, total.errors, total.input_tokens, total.output_tokens) == (10, 2, 14, 18)


async def test_a_write_of_unknown_fate_is_kept_while_the_server_is_away(url: Secret, folder: Path) -> None:
    """What the ledger does: a write that raised is tried again, one that returned is not."""
    row = UsageRow(key_id="k", tenant="t", model="m", hour=HOUR, requests=1, errors=0, input_tokens=0, output_tokens=0)
    async with lossy(url, folder, forward=False) as way, open_database(way, timeout_s=LIMIT_S) as database:
        async with open_database(url, timeout_s=LIMIT_S) as direct:
            await migrate.migrate(direct, migrate.read())
        store = PostgresUsageStore(database)
        await store.add([row])
        with frozen(folder), pytest.raises(StoreUnavailable):
            await store.add([row])

        await store.add([row])

        (total,) = await store.total(since=HOUR)
        assert total.requests == 2


async def test_last_use_is_not_a_change(url: Secret) -> None:
    """Else every gateway would read all keys every few seconds."""
    async with open_database(url, timeout_s=LIMIT_S) as database:
        await migrate.migrate(database, migrate.read())
        async with database.own_connection() as connection:
            heard: list[str] = []
            await connection.add_listener("sutazai_keys", lambda *news: heard.append(news[2]))
            async with database.transaction() as other:
                await other.execute("UPDATE keys SET last_used_at = now()")
            async with database.transaction() as other:
                await other.execute("UPDATE keys SET revoked_at = now()")
            await connection.fetchval("SELECT 1")

            assert heard == ["sutazai_keys"]


async def test_a_change_without_a_notification_is_found_by_looking(url: Secret) -> None:
    async with keys_at(url, poll_s=0.01) as keys:
        await keys.create(name="laptop", tenant="acme", role=Role.USER)
        await query(url, "ALTER TABLE keys DISABLE TRIGGER keys_changed")
        async with aclosing(keys.changes()) as changes, asyncio.timeout(BACK_S):  # type: ignore[type-var]
            await anext(changes)
            await query(url, "UPDATE keys SET role = 'admin'")
            await anext(changes)

        assert (await keys.all())[0].role is Role.ADMIN


async def test_a_listener_outlives_the_server_and_says_when_it_is_back(url: Secret, folder: Path) -> None:
    async with keys_at(url) as keys:
        async with aclosing(keys.changes()) as changes, asyncio.timeout(BACK_S):  # type: ignore[type-var]
            await anext(changes)
            kill_server(folder)
            waiting = asyncio.ensure_future(anext(changes))
            again = EmbeddedPostgres()
            await again.start(folder)
            await waiting
            await keys.create(name="laptop", tenant="acme", role=Role.USER)
            await anext(changes)
        await again.stop()


async def test_the_key_is_nowhere_in_the_database(url: Secret, folder: Path) -> None:
    async with open_database(url, timeout_s=LIMIT_S) as database:
        await migrate.migrate(database, migrate.read())
        record, key = await PostgresKeyStore(database).create(name="laptop", tenant="acme", role=Role.USER)
    await query(url, "CHECKPOINT")
    secret = key.removeprefix("sk-sutazai-")

    tables = await query(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    texts = [str(row) for (name,) in tables for row in await query(url, f'TABLE "{name}"')]
    assert any(str(record.digest) in text for text in texts)
    assert not any(secret in text for text in texts)
    contents = [path.read_bytes() for path in (folder / "postgres").rglob("*") if path.is_file()]
    assert any(record.digest in content for content in contents)
    assert not any(secret.encode() in content for content in contents)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:hunter2@127.0.0.1:1/name",
        "postgresql://me:hunter2/x@127.0.0.1/name",
        "postgresql://me:hunter2@127.0.0.1:hunter2/name",
        "mysql://me:hunter2@127.0.0.1/name",
        "postgresql://me:[hunter2@127.0.0.1/name",
        "hunter2",
        "",
    ],
)
async def test_no_error_tells_the_password(address: str) -> None:
    async with open_database(Secret(address), timeout_s=LIMIT_S) as database:
        with pytest.raises(StoreUnavailable, match=r"database\.url") as caught:
            await PostgresKeyStore(database).all()

    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


async def test_a_database_that_is_missing_is_named(url: Secret) -> None:
    async with open_database(Secret(url.reveal().replace("@/sutazai?", "@/nothing?")), timeout_s=LIMIT_S) as database:
        with pytest.raises(StoreUnavailable, match=r'database "nothing" does not exist'):
            await PostgresKeyStore(database).all()


async def test_migrations_run_twice_change_nothing(url: Secret) -> None:
    async with open_database(url, timeout_s=LIMIT_S) as database:
        assert len(await migrate.migrate(database, migrate.read())) == len(migrate.read())
        applied = await query(url, "SELECT * FROM schema_migrations")
        assert not await migrate.migrate(database, migrate.read())

    assert await query(url, "SELECT * FROM schema_migrations") == applied
    assert [row["name"] for row in applied] == [migration.name for migration in migrate.read()]


async def test_processes_that_migrate_at_once_apply_each_file_once(url: Secret) -> None:
    script = """
import asyncio, sys
from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import open_database
from sutazai.settings.secret import Secret

async def main():
    async with open_database(Secret(sys.argv[1]), timeout_s=5) as database:
        sys.stdin.readline()
        print(len(await migrate.migrate(database, migrate.read())))

asyncio.run(main())
"""

    def run() -> str:
        return subprocess.run(
            [sys.executable, "-c", script, url.reveal()],
            input="go\n",
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            timeout=60,
        ).stdout

    counts = await asyncio.gather(*(asyncio.to_thread(run) for _ in range(3)))

    assert sum(int(count) for count in counts) == len(migrate.read())


async def test_tasks_that_migrate_at_once_apply_each_file_once(url: Secret) -> None:
    async with open_database(url, timeout_s=LIMIT_S) as database:
        counts = await asyncio.gather(*(migrate.migrate(database, migrate.read()) for _ in range(4)))

    assert sum(map(len, counts)) == len(migrate.read())


async def test_a_broken_migration_leaves_those_before_it(url: Secret, tmp_path: Path) -> None:
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    number = len(migrate.read()) + 1
    broken = tmp_path / f"{number:04}_more.sql"
    broken.write_text("CREATE TABLE half (id int); SELECT no_such_function();")
    async with open_database(url, timeout_s=LIMIT_S) as database:
        with pytest.raises(StoreUnavailable, match="no_such_function"):
            await migrate.migrate(database, migrate.read(tmp_path))

        assert [tuple(row) for row in await query(url, "SELECT to_regclass('half')::text")] == [(None,)]
        assert not await migrate.migrate(database, migrate.read())
        assert await PostgresKeyStore(database).all() == []

        broken.write_text("CREATE TABLE half (id int);")
        assert len(await migrate.migrate(database, migrate.read(tmp_path))) == 1


async def test_a_migration_cut_off_half_way_is_applied_whole_the_next_time(url: Secret, folder: Path) -> None:
    """The server dies after the first statements of a file."""
    async with open_database(url, timeout_s=BACK_S) as database:

        async def half() -> None:
            async with database.transaction() as connection:
                await connection.execute(database.sql["create_migrations_table"])
                await connection.execute(migrate.read()[0].sql)
                kill_server(folder)

        with pytest.raises(StoreUnavailable):
            await half()
        again = EmbeddedPostgres()
        await again.start(folder)

        assert len(await migrate.migrate(database, migrate.read())) == len(migrate.read())
        await again.stop()


async def test_a_changed_migration_is_refused(url: Secret, tmp_path: Path) -> None:
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    async with open_database(url, timeout_s=LIMIT_S) as database:
        await migrate.migrate(database, migrate.read(tmp_path))
        first = tmp_path / "0001_keys_and_usage.sql"
        first.write_text(first.read_text() + "-- changed\n")

        with pytest.raises(StoreUnavailable, match=r"Migration 1 .* was changed after"):
            await migrate.migrate(database, migrate.read(tmp_path))


async def test_a_newer_database_is_refused_with_a_remedy(url: Secret, tmp_path: Path) -> None:
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    number = len(migrate.read()) + 1
    (tmp_path / f"{number:04}_more.sql").write_text("SELECT 1")
    async with open_database(url, timeout_s=LIMIT_S) as database:
        await migrate.migrate(database, migrate.read(tmp_path))

        with pytest.raises(StoreUnavailable, match=f"at version {number} .*newer sutazai"):
            await migrate.migrate(database, migrate.read())


def test_migrations_with_a_gap_are_refused(tmp_path: Path) -> None:
    (tmp_path / "0001_one.sql").write_text("SELECT 1")
    (tmp_path / "0003_three.sql").write_text("SELECT 3")

    with pytest.raises(ValueError, match="1, 2, 3"):
        migrate.read(tmp_path)


async def test_a_migration_does_not_wait_forever_for_a_table_in_use(url: Secret, tmp_path: Path) -> None:
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    async with open_database(url, timeout_s=LIMIT_S) as database:
        await migrate.migrate(database, migrate.read(tmp_path))
        number = len(migrate.read()) + 1
        (tmp_path / f"{number:04}_more.sql").write_text("ALTER TABLE keys ADD COLUMN more text")
        connection: Any = await asyncpg.connect(url.reveal())
        await connection.execute("BEGIN; LOCK TABLE keys IN ACCESS SHARE MODE")

        with pytest.raises(StoreUnavailable, match="lock timeout"):
            await migrate.migrate(database, migrate.read(tmp_path))
        await connection.close()


async def test_the_table_holds_only_what_makes_sense(url: Secret) -> None:
    """The checks of the table itself, for those who write to it by hand."""
    async with keys_at(url):
        insert = "INSERT INTO keys (id, name, tenant, role, digest) VALUES ('i', '{}', 't', '{}', '{}')"
        digest = "\\x" + "00" * 32
        for name, role, bytes_ in (("", "user", digest), ("n", "king", digest), ("n", "user", "\\x00")):
            with pytest.raises(asyncpg.CheckViolationError):
                await query(url, insert.format(name, role, bytes_))


def test_statements_are_read_by_name() -> None:
    text = "-- About the file.\n\n-- name: one\nSELECT 1\n\n-- name: two\n-- Why.\nSELECT\n  2\n"

    assert statements.parse(text) == {"one": "SELECT 1", "two": "-- Why.\nSELECT\n  2"}


def test_what_statements_have_in_common_stands_in_each() -> None:
    text = "-- name: one\nSELECT\n-- part both\n-- part: both\n2\n-- name: two\n-- part both\n+ 1"

    assert statements.parse(text) == {"one": "SELECT\n2", "two": "2\n+ 1"}
