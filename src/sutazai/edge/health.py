"""`/healthz`, `/readyz` and `/metrics`."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from sutazai.edge.pool import Pool
from sutazai.edge.replies import Address, json_reply


def routes(pool: Pool) -> list[Address]:
    """The addresses for machines that watch."""

    async def healthz(_: HttpRequest) -> Response:
        return json_reply({"status": "ok"})

    async def readyz(_: HttpRequest) -> Response:
        ready, why = pool.is_ready()
        return json_reply({"status": "ready" if ready else why}, status=200 if ready else 503)

    async def metrics(_: HttpRequest) -> Response:
        return Response(pool.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return [Address("/healthz", healthz), Address("/readyz", readyz), Address("/metrics", metrics)]
