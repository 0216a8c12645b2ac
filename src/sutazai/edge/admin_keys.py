"""`/admin/keys`: made, listed and revoked, for programs; people have `sutazai keys`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from sutazai.core.errors import NotFound
from sutazai.edge.admin_shapes import KeyBody, told_key
from sutazai.edge.audited import actor_of
from sutazai.edge.pool import Pool, for_admins
from sutazai.edge.replies import Address, body_as, json_reply, resource

_KEY = msgspec.json.Decoder(KeyBody)


def routes(pool: Pool) -> list[Address]:
    """All keys, and one of them."""

    async def all_keys(http: HttpRequest) -> Response:
        for_admins(http)
        return json_reply({"keys": [told_key(key) for key in await pool.keys.all()]})

    async def create(http: HttpRequest) -> Response:
        for_admins(http)
        asked = await body_as(http, _KEY)
        record, key = await pool.keys.create(
            name=asked.name,
            tenant=asked.tenant,
            role=asked.wanted_role(),
            scopes=asked.wanted_scopes(),
            priority=asked.wanted_priority(),
            limits=asked.limits.limits(),
            by=actor_of(http),
        )
        return json_reply({**told_key(record), "key": key}, status=201)

    async def revoke(http: HttpRequest) -> Response:
        for_admins(http)
        key_id = http.path_params["key_id"]
        key = await pool.keys.revoke(key_id, by=actor_of(http))
        if key is None:
            raise NotFound(f"No live key has the id or name {key_id[:64]!r}; `GET /admin/keys` lists all.")
        return json_reply(told_key(key))

    return [
        resource("/admin/keys", GET=all_keys, POST=create),
        resource("/admin/keys/{key_id}", DELETE=revoke),
    ]
