"""`sutazai keys`, `tenants` and `audit` as a user runs them: their own processes, over a real database."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tests.postgres_servers import embedded

import sutazai
from sutazai.adapters.postgres.embedded import EmbeddedPostgres
from sutazai.adapters.postgres.stores import open_stores
from sutazai.ports.keys import UsageRow
from sutazai.settings.model import Database

SOURCE = Path(sutazai.__file__).parents[1]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder whose server runs, so that commands need not start one."""
    with embedded() as (_, folder):
        yield folder


def keys(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return command(folder, "keys", *arguments, **settings)


def command(folder: Path, name: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "sutazai", name, *arguments],
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


# what a key may do and take


def test_a_key_is_made_with_scopes_a_priority_and_limits(folder: Path) -> None:
    made = json.loads(
        keys(
            folder,
            *("create", "scoped", "--scope", "inference", "--priority", "low", "--json"),
            *("--requests-per-minute", "60", "--money-per-month", "2.5", "--burst-s", "10"),
        ).stdout
    )
    table = keys(folder, "list").stdout

    assert (made["scopes"], made["priority"]) == (["inference"], "low")
    set_ = {name: value for name, value in made["limits"].items() if value is not None}
    assert set_ == {"requests_per_minute": 60, "money_per_month": 2.5, "burst_s": 10.0}
    assert "requests-per-minute=60, money-per-month=2.5" in table


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--scope", "admin"), "given to a key that is no admin's"),
        (("--requests-per-minute", "-1"), "requests_per_minute was -1"),
    ],
)
def test_a_key_that_cannot_be_is_one_sentence(folder: Path, options: tuple[str, ...], sentence: str) -> None:
    refused = keys(folder, "create", "impossible", *options)

    assert (refused.returncode, refused.stdout) == (1, "")
    assert sentence in refused.stderr
    assert refused.stderr.count("\n") == 1


# tenants


def test_a_tenant_is_set_changed_in_part_shown_and_deleted(folder: Path) -> None:
    first = command(
        folder, "tenants", "set", "acme", "--weight", "2", "--requests-per-minute", "600", "--tokens-per-minute", "9"
    )
    second = command(folder, "tenants", "set", "acme", "--priority", "high", "--tokens-per-minute", "none")
    shown = json.loads(command(folder, "tenants", "show", "acme", "--json").stdout)
    table = command(folder, "tenants", "list").stdout
    deleted = command(folder, "tenants", "delete", "acme")
    again = command(folder, "tenants", "delete", "acme")

    assert (first.returncode, second.returncode, deleted.returncode, again.returncode) == (0, 0, 0, 1)
    assert (shown["weight"], shown["priority"], shown["is_defined"]) == (2.0, "high", True)
    assert (shown["limits"]["requests_per_minute"], shown["limits"]["tokens_per_minute"]) == (600, None)
    assert re.search(r"acme +2 +high +requests-per-minute=600 +60 s", table)
    assert "was not set" in again.stderr


def test_a_tenant_that_only_a_key_names_is_listed_with_the_defaults(folder: Path) -> None:
    keys(folder, "create", "branch", "--tenant", "branch office")
    (found,) = [one for one in json.loads(command(folder, "tenants", "list", "--json").stdout) if " " in one["name"]]
    unknown = command(folder, "tenants", "show", "nobody")

    assert (found["name"], found["weight"], found["is_defined"]) == ("branch office", 1.0, False)
    assert unknown.returncode == 1
    assert "No tenant 'nobody' was set" in unknown.stderr


# the log


def test_what_was_done_here_is_in_the_log_under_the_name_of_the_user(folder: Path) -> None:
    keys(folder, "create", "logged")
    keys(folder, "revoke", "logged")
    listed = json.loads(command(folder, "audit", "list", "--limit", "2", "--json").stdout)
    table = command(folder, "audit", "list", "--limit", "2").stdout
    older = json.loads(command(folder, "audit", "list", "--before", str(listed[1]["number"]), "--json").stdout)
    nowhere = [command(folder, "audit", "list", "--before", number) for number in ("0", str(2**63))]

    user = pwd.getpwuid(os.geteuid()).pw_name
    assert [(one.returncode, "There is no entry" in one.stderr) for one in nowhere] == [(1, True)] * 2
    assert [entry["action"] for entry in listed] == ["key.revoked", "key.created"]
    assert {entry["actor"] for entry in listed} == {f"cli:{user}"}
    assert {entry["subject"] for entry in listed} == {listed[0]["subject"]}
    assert f"cli:{user}" in table
    assert all(entry["number"] < listed[1]["number"] for entry in older)


def test_a_log_is_verified_and_must_hold_what_it_held_before(folder: Path) -> None:
    keys(folder, "create", "sealed")
    first = command(folder, "audit", "verify")
    keys(folder, "revoke", "sealed")
    known = command(folder, "audit", "verify", "--known", first.stdout.strip())
    number, _, seal = first.stdout.strip().partition(":")
    strange = command(folder, "audit", "verify", "--known", f"{number}:{seal[::-1]}")
    longer = command(folder, "audit", "verify", "--known", f"{int(number) + 1000}:{seal}")

    assert re.fullmatch(r"\d+:[0-9a-f]{64}\n", first.stdout)
    assert "are whole" in first.stderr
    assert (known.returncode, strange.returncode, longer.returncode) == (0, 1, 1)
    assert "does not hold the entry" in strange.stderr


def test_a_log_that_was_changed_is_told(folder: Path) -> None:
    """The last test: it spoils the log of this folder."""
    for name in ("spoiled-1", "spoiled-2", "spoiled-3"):  # entries of its own, whichever tests ran before
        keys(folder, "create", name)

    async def spoil() -> None:
        server = EmbeddedPostgres()
        connection: Any = await asyncpg.connect(await server.start(folder))
        await connection.execute("ALTER TABLE audit DISABLE TRIGGER audit_kept; DELETE FROM audit WHERE number = 2")
        await connection.close()
        await server.stop()

    asyncio.run(spoil())
    spoiled = command(folder, "audit", "verify")

    assert (spoiled.returncode, spoiled.stdout) == (1, "")
    assert spoiled.stderr == "Entry 2 is missing: the next one there is 3. The 1 before it are whole.\n"
