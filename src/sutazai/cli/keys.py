"""`sutazai keys`: make, list and revoke keys, and see what they took."""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

import cyclopts

from sutazai.adapters.postgres.stores import Stores
from sutazai.cli.limits import NO_OPTIONS, LimitOptions, PriorityName, told
from sutazai.cli.printing import print_json, print_table
from sutazai.cli.stores import refuse, who, with_stores
from sutazai.core.identity import ApiKey, Limits, Role, Scope
from sutazai.core.request import Priority
from sutazai.ports.keys import UsageRow

app = cyclopts.App(
    name="keys",
    help="""Make, list and revoke the keys that clients show.

Example: `sutazai keys create laptop`""",
)

_USAGE_HOURS = 24
_HEADS = ("ID", "NAME", "TENANT", "ROLE", "SCOPES", "PRIORITY", "LIMITS", "CREATED", "USED", "REVOKED")


@app.command
def create(
    name: str,
    /,
    *,
    tenant: str = "default",
    admin: bool = False,
    scope: Annotated[tuple[Literal["inference", "tasks", "admin"], ...], cyclopts.Parameter(negative="")] = (),
    priority: PriorityName | None = None,
    limits: LimitOptions = NO_OPTIONS,
    json: bool = False,
) -> int:
    """
    Make a key and print it. It is shown only this once.

    Examples: `sutazai keys create laptop`, `sutazai keys create ops --admin`,
    `sutazai keys create robot --tenant acme --scope inference --priority low --requests-per-minute 60`

    Parameters
    ----------
    name
        What `keys list` calls it: 1 to 64 characters, one live key for each name.
    tenant
        Who its requests are counted for, and share a place in the queue with.
    admin
        Let it use `/admin`, and pull, copy and delete models.
    scope
        What it may ask for; give it more than once for more. Left out: all that it can use.
    priority
        The highest that its requests can have. Left out: the tenant's.
    json
        Print JSON.
    """

    async def work(stores: Stores) -> int:
        record, key = await stores.keys.create(
            name=name,
            tenant=tenant,
            role=Role.ADMIN if admin else Role.USER,
            scopes=frozenset(map(Scope, scope)) or None,
            priority=None if priority is None else Priority[priority.upper()],
            limits=limits.applied_to(Limits()),
            by=who(),
        )
        if json:
            print_json({**_shown(record), "key": key})
        else:
            sys.stdout.write(f"{key}\n")
            sys.stderr.write(f"This is the key {record.name!r}. It is shown only this once; SutazAI keeps a hash.\n")
        return 0

    return with_stores(work)


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
        keys = await stores.keys.all()
        if json:
            print_json([_shown(key) for key in keys])
        else:
            print_table(_HEADS, [_cells(key) for key in keys])
        return 0

    return with_stores(work)


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
        key = await stores.keys.revoke(id_or_name, by=who())
        if key is None:
            return refuse(f"No live key has the id or name {id_or_name!r}. `sutazai keys list` shows all.")
        sys.stdout.write(f"The key {key.name!r} ({key.id}) was revoked.\n")
        return 0

    return with_stores(work)


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

    return with_stores(work)


def _shown(key: ApiKey) -> dict[str, object]:
    """A key without its hash, as JSON; an empty string where there is no date yet."""
    created_at, last_used_at, revoked_at = _dates(key)
    return {
        "id": key.id,
        "name": key.name,
        "tenant": key.tenant,
        "role": key.role.value,
        "scopes": _scopes(key),
        "priority": _priority(key),
        "limits": asdict(key.limits),
        "created_at": created_at,
        "last_used_at": last_used_at,
        "revoked_at": revoked_at,
    }


def _cells(key: ApiKey) -> list[str]:
    scopes = ",".join(_scopes(key))
    return [key.id, key.name, key.tenant, key.role.value, scopes, _priority(key), told(key.limits), *_dates(key)]


def _scopes(key: ApiKey) -> list[str]:
    return sorted(scope.value for scope in key.scopes)


def _priority(key: ApiKey) -> str:
    return "" if key.priority is None else key.priority.name.lower()


def _dates(key: ApiKey) -> list[str]:
    dates = (key.created_at, key.last_used_at, key.revoked_at)
    return [date.isoformat(timespec="seconds") if date else "" for date in dates]


def _usage_cells(row: UsageRow, key: str) -> list[str]:
    counts = (row.requests, row.errors, row.input_tokens, row.output_tokens)
    return [key or "(none)", row.tenant, row.model, *map(str, counts)]
