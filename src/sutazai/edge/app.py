"""The application: every address but inference, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from starlette.routing import Router
from starlette.types import Receive, Scope, Send

from sutazai.core.errors import NotFound
from sutazai.edge import (
    admin,
    admin_audit,
    admin_cache,
    admin_keys,
    admin_tenants,
    batches,
    files,
    health,
    ollama,
    openai,
    openapi,
    public,
    schedules,
    sessions,
    tasks,
)
from sutazai.edge.direct import Handler
from sutazai.edge.marks import marked
from sutazai.edge.pool import Pool

KEPT = (tasks, sessions, files, batches, schedules)
"""What tenants write and read again."""


def build(pool: Pool) -> Router:
    """
    The ASGI application.

    A bare router: errors leave it as exceptions and the connection gives them their form, so no middleware of a
    framework answers in a form of its own. It tries one address after another, so those that are asked most come first.
    """
    return Router(
        routes=[
            *marked(pool.marks, chain.from_iterable(kept.routes(pool) for kept in KEPT)),
            *health.routes(pool),
            *openai.routes(pool),
            *ollama.routes(pool),
            *admin.routes(pool),
            *admin_keys.routes(pool),
            *admin_tenants.routes(pool),
            *admin_audit.routes(pool),
            *admin_cache.routes(pool),
            *openapi.routes(),
            *public.routes(),
        ],
        default=_nowhere,
        redirect_slashes=False,
    )


def direct(pool: Pool) -> Mapping[tuple[bytes, bytes], Handler]:
    """What is answered before the application, by method and path."""
    return tasks.direct(pool)


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotFound(f"Nothing is at {scope['path'][:200]!r}. `GET /openapi.json` lists what there is.")
