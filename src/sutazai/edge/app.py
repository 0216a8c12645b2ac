"""The application: every address but inference, and what is said where there is none."""

from __future__ import annotations

from starlette.routing import Router
from starlette.types import Receive, Scope, Send

from sutazai.core.errors import NotFound
from sutazai.edge import admin, health, ollama, openai, openapi
from sutazai.edge.pool import Pool


def build(pool: Pool) -> Router:
    """
    The ASGI application.

    A bare router: errors leave it as exceptions and the connection gives them their form, so no middleware of a
    framework answers in a form of its own.
    """
    return Router(
        routes=[
            *health.routes(pool),
            *openai.routes(pool),
            *ollama.routes(pool),
            *admin.routes(pool),
            *openapi.routes(),
        ],
        default=_nowhere,
        redirect_slashes=False,
    )


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotFound(f"Nothing is at {scope['path'][:200]!r}. `GET /openapi.json` lists what there is.")
