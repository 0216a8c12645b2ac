"""`/admin/tenants`: shares, priorities and limits."""

from __future__ import annotations

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from sutazai.core.errors import NotFound
from sutazai.core.identity import Tenant
from sutazai.edge.admin_shapes import TenantBody, told_tenant
from sutazai.edge.audited import actor_of
from sutazai.edge.pool import Pool, for_admins
from sutazai.edge.replies import Address, body_as, json_reply, resource

_TENANT = msgspec.json.Decoder(TenantBody)


def routes(pool: Pool) -> list[Address]:
    """All tenants, and one of them."""

    async def told() -> dict[str, dict[str, object]]:
        """Those that are defined, and those that live keys name; by name, in order."""
        defined = {tenant.name: tenant for tenant in await pool.tenants.all()}
        named = {key.tenant for key in await pool.keys.all() if key.revoked_at is None}
        return {
            name: told_tenant(defined.get(name) or Tenant(name=name), is_defined=name in defined)
            for name in sorted(defined.keys() | named)
        }

    async def all_tenants(http: HttpRequest) -> Response:
        for_admins(http)
        return json_reply({"tenants": list((await told()).values())})

    async def one(http: HttpRequest) -> Response:
        for_admins(http)
        name = http.path_params["name"]
        tenant = (await told()).get(name)
        if tenant is None:
            raise NotFound(
                f"No tenant is named {name[:64]!r}, and no live key names it; `GET /admin/tenants` lists all."
            )
        return json_reply(tenant)

    async def put(http: HttpRequest) -> Response:
        for_admins(http)
        tenant = (await body_as(http, _TENANT)).tenant(http.path_params["name"])
        await pool.tenants.set(tenant, by=actor_of(http))
        return json_reply(told_tenant(tenant, is_defined=True))

    async def delete(http: HttpRequest) -> Response:
        for_admins(http)
        name = http.path_params["name"]
        tenant = await pool.tenants.delete(name, by=actor_of(http))
        if tenant is None:
            raise NotFound(f"No tenant {name[:64]!r} is defined; `GET /admin/tenants` lists those that are.")
        return json_reply(told_tenant(tenant, is_defined=False))

    return [
        resource("/admin/tenants", GET=all_tenants),
        resource("/admin/tenants/{name}", GET=one, PUT=put, DELETE=delete),
    ]
