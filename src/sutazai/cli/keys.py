"""`sutazai keys`: make, list and revoke keys, and see what they took."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cyclopts

from sutazai.adapters.postgres.stores import Stores, open_stores
from sutazai.cli.printing import print_json, print_table
from sutazai.core.errors import BadRequest, SettingsError, StoreUnavailable
from sutazai.core.identity import ApiKey, Role
from sutazai.ports.keys import UsageRow
from sutazai.settings import load as settings

app = cyclopts.App(
    name="keys",
    help="""Make, list and revoke the keys that clients show.

Example: `sutazai keys create laptop`""",
)

_USAGE_HOURS = 24
_REFUSED = 1
"""The exit code where the request made no sense, or the database was away."""
_MISTAKES = 2
"""The exit code for settings that hold mistakes, as in `sutazai config`."""


@app.command
def create(name: str, /, *, tenant: str = "default", admin: bool = False, json: bool = False) -> int:
    """
    Make a key and print it. It is shown only this once.

    Examples: `sutazai keys create laptop`, `sutazai keys create ops --admin`

    Parameters
    ----------
    name
        What `keys list` calls it: 1 to 64 characters, one live key for each name.
    tenant
        Who its requests are counted for, and share a place in the queue with.
    admin
        Let it use `/admin`, and pull, copy and delete models.
    json
        Print JSON.
    """

    async def work(stores: Stores) -> int:
        role = Role.ADMIN if admin else Role.USER
        record, key = await stores.keys.create(name=name, tenant=tenant, role=role)
        if json:
            print_json({**_shown(record), "key": key})
        else:
            sys.stdout.write(f"{key}\n")
            sys.stderr.write(f"This is the key {record.name!r}. It is shown only this once; SutazAI keeps a hash.\n")
        return 0

    return _with_stores(work)


@app.command(name="list")
def list_(*, json: bool = False) -> int:
    """
    Print all keys, revoked ones too, oldest first.

    Examples: `sutazai keys list`, `sutazai keys list --json`

    Parameters
    ----------
    json
        Print JSON.
    """

    async def work(stores: Stores) -> int:
        keys = [_shown(key) for key in await stores.keys.all()]
        if json:
            print_json(keys)
        else:
            heads = ["ID", "NAME", "TENANT", "ROLE", "CREATED", "USED", "REVOKED"]
            print_table(heads, [[*key.values()] for key in keys])
        return 0

    return _with_stores(work)


@app.command
def revoke(id_or_name: str, /) -> int:
    """
    Make a key worthless, at once and for good.

    Exits with 1, and says so, where there is no such live key. Example: `sutazai keys revoke laptop`

    Parameters
    ----------
    id_or_name
        As in `sutazai keys list`.
    """

    async def work(stores: Stores) -> int:
        key = await stores.keys.revoke(id_or_name)
        if key is None:
            return _refuse(f"No live key has the id or name {id_or_name!r}. `sutazai keys list` shows all.")
        sys.stdout.write(f"The key {key.name!r} ({key.id}) was revoked.\n")
        return 0

    return _with_stores(work)


@app.command
def usage(*, json: bool = False) -> int:
    """
    Print what each key took from each model in the last 24 hours.

    Examples: `sutazai keys usage`, `sutazai keys usage --json`

    Parameters
    ----------
    json
        Print JSON.
    """

    async def work(stores: Stores) -> int:
        since = datetime.now(UTC) - timedelta(hours=_USAGE_HOURS)
        rows = await stores.usage.total(since=since)
        if json:
            print_json(rows)
        else:
            names = {key.id: key.name for key in await stores.keys.all()}
            heads = ["KEY", "TENANT", "MODEL", "REQUESTS", "ERRORS", "INPUT", "OUTPUT"]
            print_table(heads, [_usage_cells(row, names.get(row.key_id, row.key_id)) for row in rows])
        return 0

    return _with_stores(work)


def _with_stores(work: Callable[[Stores], Awaitable[int]]) -> int:
    async def run() -> int:
        async with _stores() as stores:
            return await work(stores)

    try:
        return asyncio.run(run())
    except SettingsError as error:
        sys.stderr.write("".join(f"{mistake}\n" for mistake in error.mistakes))
        return _MISTAKES
    except (BadRequest, StoreUnavailable) as error:
        return _refuse(error.message)


@asynccontextmanager
async def _stores() -> AsyncIterator[Stores]:
    loaded = settings.load(settings.find(os.environ, Path.cwd()), os.environ)
    data_dir = settings.data_dir(loaded, os.environ, is_root=os.geteuid() == 0)
    async with open_stores(loaded.database, data_dir) as stores:
        yield stores


def _refuse(sentence: str) -> int:
    sys.stderr.write(f"{sentence}\n")
    return _REFUSED


def _shown(key: ApiKey) -> dict[str, str]:
    """A key without its hash, as cells or JSON; an empty string where there is no date yet."""
    dates = (key.created_at, key.last_used_at, key.revoked_at)
    created_at, last_used_at, revoked_at = (date.isoformat(timespec="seconds") if date else "" for date in dates)
    return {
        "id": key.id,
        "name": key.name,
        "tenant": key.tenant,
        "role": key.role.value,
        "created_at": created_at,
        "last_used_at": last_used_at,
        "revoked_at": revoked_at,
    }


def _usage_cells(row: UsageRow, key: str) -> list[str]:
    counts = (row.requests, row.errors, row.input_tokens, row.output_tokens)
    return [key or "(none)", row.tenant, row.model, *map(str, counts)]
