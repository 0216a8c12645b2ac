"""`/admin`: what is going on, and a hand on it."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from sutazai.core.errors import Conflict, NotFound
from sutazai.core.node import NodeState
from sutazai.edge.audited import audited
from sutazai.edge.exchange import Exchange
from sutazai.edge.pool import Pool, for_admins
from sutazai.edge.replies import Address, json_reply
from sutazai.gateway.experience import BreakerView
from sutazai.gateway.routed import Run
from sutazai.policy.routing import load, penalty_now
from sutazai.ports.audit import Action


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
        runs = {run.request.id: run for run in pool.routed.runs}
        exchanges = pool.in_flight().values()
        return json_reply({"requests": [_request(pool, one, runs.get(one.request.id), now) for one in exchanges]})

    async def cancel(http: HttpRequest) -> Response:
        for_admins(http)
        request_id = http.path_params["request_id"]
        exchange = pool.in_flight().get(request_id)
        if exchange is None:
            raise NotFound(f"No request {request_id[:64]!r} is in flight; `GET /admin/requests` lists those that are.")
        async with audited(pool.audit, http, Action.REQUEST_CANCELLED, request_id, tenant=exchange.request.tenant):
            if pool.in_flight().get(request_id) is not exchange:  # it went on while the log was written
                raise Conflict(f"The request {request_id} ended by itself before it could be cancelled.")
            exchange.end_by_operator()
        return json_reply({"id": request_id, "cancelled": True})

    async def breakers(http: HttpRequest) -> Response:
        for_admins(http)
        now = fleet.clock()
        return json_reply({"breakers": [_breaker(view, now) for view in fleet.breakers()]})

    return [
        Address("/admin/nodes", nodes),
        Address("/admin/breakers", breakers),
        Address("/admin/requests", requests),
        Address("/admin/requests/{request_id}", cancel, methods=["DELETE"]),
    ]


def _breaker(view: BreakerView, now: float) -> dict[str, object]:
    return {
        "node": view.node,
        "model": view.model,
        "position": view.position.value,
        "error_ratio": round(view.error_ratio, 3),
        "slow_ratio": round(view.slow_ratio, 3),
        "tried_again_in_s": round(max(0.0, view.opens_until - now), 1),
    }


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


def _request(pool: Pool, exchange: Exchange, run: Run | None, now: float) -> dict[str, object]:
    request = exchange.request
    place = pool.place_of(request.id)
    return {
        "id": request.id,
        "endpoint": request.endpoint.path,
        "model": request.model,
        "stream": request.stream,
        "tenant": request.tenant,
        "key": request.key_id,
        "priority": request.priority.name.lower(),
        "stage": run.stage.value if run is not None else "waiting" if place is not None else "shared",
        "position": place.position if place is not None else None,
        "eta_s": place.eta_s if place is not None else None,
        "node": run.node if run is not None else "",
        "attempts": run.attempts if run is not None else 0,
        "age_s": round(now - request.arrived_at, 3),
        "chunks": exchange.chunks,
    }
