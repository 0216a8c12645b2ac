"""`sutazai tenants`: what each tenant may take, and its share of the pool."""

from __future__ import annotations

import sys
from dataclasses import asdict

import cyclopts

from sutazai.adapters.postgres.stores import Stores
from sutazai.cli.limits import NO_OPTIONS, CountOrNone, LimitOptions, PriorityName, told
from sutazai.cli.printing import print_json, print_table
from sutazai.cli.stores import refuse, who, with_stores
from sutazai.core.identity import Tenant
from sutazai.core.request import Priority

app = cyclopts.App(
    name="tenants",
    help="""Show and set what tenants may take, and their share of the pool.

A tenant is a name that keys carry. Those that nobody set have the defaults of `[limits]` in the settings.
Example: `sutazai tenants set acme --weight 2 --requests-per-minute 600`""",
)

_HEADS = ("TENANT", "WEIGHT", "PRIORITY", "LIMITS", "BURST", "TASKS", "KEYS", "REGION")


@app.command(name="set")
def set_(
    name: str,
    /,
    *,
    weight: float | None = None,
    priority: PriorityName | None = None,
    waiting_tasks: CountOrNone = None,
    region: str | None = None,
    limits: LimitOptions = NO_OPTIONS,
) -> int:
    """
    Make a tenant, or change what is given of one. Running gateways take it up within a second.

    Where a tenant has no limit of its own, the one in `[limits]` of the settings counts.

    Examples: `sutazai tenants set acme --weight 2 --requests-per-minute 600`,
    `sutazai tenants set acme --requests-per-minute none`, `sutazai tenants set acme --region eu`

    Parameters
    ----------
    name
        As in `keys create --tenant`.
    weight
        Its share of the pool when all are busy, relative to others, who have 1.
    priority
        The highest that its requests can have.
    waiting_tasks
        Its tasks that may wait to be started, or `none` for `tasks.max_waiting_per_tenant` of the settings.
    region
        Its home: where its tasks, files, sessions, schedules and messages are kept. It cannot be changed while there
        are any.
    """

    async def work(stores: Stores) -> int:
        before = await _defined(stores, name) or Tenant(name=name)
        after = Tenant(
            name=name,
            weight=before.weight if weight is None else weight,
            priority=before.priority if priority is None else Priority[priority.upper()],
            limits=limits.applied_to(before.limits),
            waiting_tasks=_typed(waiting_tasks, before.waiting_tasks),
            region=before.region if region is None else region,
        )
        await stores.tenants.set(after, by=who())
        sys.stdout.write(f"The tenant {name!r} is set.\n")
        return 0

    return with_stores(work)


@app.command(name="list")
def list_(*, json: bool = False) -> int:
    """
    Print all tenants by name, those too that only keys name.

    Examples: `sutazai tenants list`, `sutazai tenants list --json`

    Parameters
    ----------
    json
        Print JSON.
    """

    async def work(stores: Stores) -> int:
        return await _print(stores, None, json=json)

    return with_stores(work)


@app.command
def show(name: str, /, *, json: bool = False) -> int:
    """
    Print one tenant.

    Exits with 1, and says so, where nobody set it and no live key names it. Example: `sutazai tenants show acme`

    Parameters
    ----------
    name
        As in `sutazai tenants list`.
    json
        Print JSON.
    """

    async def work(stores: Stores) -> int:
        return await _print(stores, name, json=json)

    return with_stores(work)


@app.command
def delete(name: str, /) -> int:
    """
    Give a tenant the defaults again. Its keys stay; `sutazai keys revoke` ends those.

    Exits with 1, and says so, where nobody set it. Example: `sutazai tenants delete acme`

    Parameters
    ----------
    name
        As in `sutazai tenants list`.
    """

    async def work(stores: Stores) -> int:
        if await stores.tenants.delete(name, by=who()) is None:
            return refuse(f"The tenant {name!r} was not set. `sutazai tenants list` shows all.")
        sys.stdout.write(f"The tenant {name!r} has the defaults again.\n")
        return 0

    return with_stores(work)


def _typed(given: CountOrNone, before: int | None) -> int | None:
    if given == "none":
        return None
    return before if given is None else given


async def _defined(stores: Stores, name: str) -> Tenant | None:
    return next((tenant for tenant in await stores.tenants.all() if tenant.name == name), None)


async def _print(stores: Stores, name: str | None, *, json: bool) -> int:
    """All tenants, or the one of that name."""
    defined = {tenant.name: tenant for tenant in await stores.tenants.all()}
    named = [key.tenant for key in await stores.keys.all() if key.revoked_at is None]
    names = sorted(defined.keys() | set(named))
    if name is not None:
        if name not in names:
            return refuse(f"No tenant {name!r} was set, and no live key names it. `sutazai tenants list` shows all.")
        names = [name]
    tenants = [defined.get(one) or Tenant(name=one) for one in names]
    if json:
        told_ = [_shown(tenant, is_defined=tenant.name in defined) for tenant in tenants]
        print_json(told_ if name is None else told_[0])
    else:
        print_table(_HEADS, [_cells(tenant, named.count(tenant.name)) for tenant in tenants])
    return 0


def _shown(tenant: Tenant, *, is_defined: bool) -> dict[str, object]:
    plain = asdict(tenant)
    return plain | {"priority": tenant.priority.name.lower(), "is_defined": is_defined}


def _cells(tenant: Tenant, keys: int) -> list[str]:
    priority = tenant.priority.name.lower()
    waiting = "" if tenant.waiting_tasks is None else f"{tenant.waiting_tasks:,}"
    burst = f"{tenant.limits.burst_s:g} s"
    limits = told(tenant.limits)
    return [tenant.name, f"{tenant.weight:g}", priority, limits, burst, waiting, str(keys), tenant.region]
