"""`/admin`: what is going on, and a hand on it."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from sutazai.core.errors import NotFound
from sutazai.core.node import NodeState
from sutazai.edge.exchange import Exchange
from sutazai.edge.pool import Pool, for_admins
from sutazai.edge.replies import Address, json_reply
from sutazai.gateway.routed import Run
from sutazai.policy.routing import load, penalty_now


def routes(pool: Pool) -> list[Address]:
    """Nodes, and requests in flight."""
    fleet = pool.fleet

    async def nodes(http: HttpRequest) -> Response:
        for_admins(http)
        now = fleet.clock()
        return json_reply({"nodes": [_node(pool, state, now) for state in fleet.states()]})

    async def requests(http: HttpRequest) -> Response:
        for_admins(http)
        now = fleet.clock()
        return json_reply({"requests": [_request(pool, exchange, now) for exchange in pool.in_flight().values()]})

    async def cancel(http: HttpRequest) -> Response:
        for_admins(http)
        request_id = http.path_params["request_id"]
        exchange = pool.in_flight().get(request_id)
        run = exchange.call if exchange is not None else None
        if not isinstance(run, Run):
            raise NotFound(f"No request {request_id[:64]!r} is in flight; `GET /admin/requests` lists those that are.")
        run.end_by_operator()
        return json_reply({"id": request_id, "cancelled": True})

    return [
        Address("/admin/nodes", nodes),
        Address("/admin/requests", requests),
        Address("/admin/requests/{request_id}", cancel, methods=["DELETE"]),
    ]


def _node(pool: Pool, state: NodeState, now: float) -> dict[str, object]:
    rules = pool.fleet.rules
    return {
        "name": state.node.name,
        "kind": state.node.kind.value,
        "url": state.node.url,
        "source": state.node.source,
        "health": state.health.value,
        "in_flight": state.in_flight,
        "slots": state.slots,
        "load": round(load(state, now, rules), 3),
        "penalty": round(penalty_now(state, now, rules), 2),
        "failures": state.failures,
        "last_error": state.last_error,
        "models": sorted(state.models),
        "loaded": sorted({entry.name for entry in state.loaded.values()}) if state.loaded is not None else None,
        "running": state.running,
        "waiting": state.waiting,
        "version": state.version,
        "probed_s_ago": round(now - state.probed_at, 1) if state.probed_at else None,
    }


def _request(pool: Pool, exchange: Exchange, now: float) -> dict[str, object]:
    request = exchange.request
    run = exchange.call
    position = pool.routed.position(run) if isinstance(run, Run) else 0
    return {
        "id": request.id,
        "endpoint": request.endpoint.path,
        "model": request.model,
        "stream": request.stream,
        "tenant": request.tenant,
        "key": request.key_id,
        "stage": run.stage.value if isinstance(run, Run) else "starting",
        "position": position or None,
        "node": run.node if isinstance(run, Run) else "",
        "attempts": run.attempts if isinstance(run, Run) else 0,
        "age_s": round(now - request.arrived_at, 3),
        "chunks": exchange.chunks,
    }
