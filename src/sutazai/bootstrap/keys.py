"""The door: who may come in, as of now."""

from __future__ import annotations

import structlog

from sutazai.adapters.postgres.stores import Stores
from sutazai.bootstrap.rules import Live, default_limits
from sutazai.core.errors import Forbidden, StoreUnavailable
from sutazai.edge.auth import Gatekeeper, is_loopback
from sutazai.settings.model import Settings

log = structlog.get_logger("sutazai")


async def open_door(settings: Settings, stores: Stores) -> Gatekeeper:
    """The door, with today's keys. Raises `Forbidden` for an open address without any."""
    is_open = not is_loopback(settings.server.host)
    gatekeeper = Gatekeeper(
        required=settings.auth.required or is_open,
        allowed_hosts=settings.server.allowed_hosts,
        allowed_origins=settings.server.allowed_origins,
    )
    gatekeeper.learn(await stores.keys.all(), await stores.tenants.all(), default_limits(settings))
    if is_open and not gatekeeper.keys:
        raise Forbidden(
            f"The gateway was to listen on {settings.server.host}, where other machines reach it, and there is no key "
            "yet. Make one with `sutazai keys create NAME`, or listen on 127.0.0.1."
        )
    return gatekeeper


def weight_of(gatekeeper: Gatekeeper, tenant: str) -> float:
    """The share of a tenant, relative to others; 1.0 for one that nobody set."""
    known = gatekeeper.tenants.get(tenant)
    return 1.0 if known is None else known.weight


async def follow_keys(stores: Stores, gatekeeper: Gatekeeper, live: Live) -> None:
    """Take up keys and tenants as they change; while the store is away the known ones stay good."""
    async for _ in stores.keys.changes():
        try:
            keys, tenants = await stores.keys.all(), await stores.tenants.all()
            gatekeeper.learn(keys, tenants, default_limits(live.settings))
        except StoreUnavailable as error:
            log.warning("keys not read", why=error.message)
