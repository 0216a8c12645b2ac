"""OpenAI's addresses beside inference: the list of models."""

from __future__ import annotations

import time
from calendar import timegm

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from sutazai.core.errors import UnknownModel
from sutazai.core.node import NodeState
from sutazai.edge.freshness import private_reply
from sutazai.edge.pool import Pool, for_inference
from sutazai.edge.replies import Address, json_reply
from sutazai.policy.nearest import nearest


def routes(pool: Pool) -> list[Address]:
    """`/v1/models` and one of them."""

    async def models(http: HttpRequest) -> Response:
        for_inference(http)
        listed = pool.fleet.listed_models()
        data = [_model(name, listed[name][0]) for name in sorted(listed)]
        choice = pool.choice()
        return private_reply(http, {"object": "list", "data": [*([_chosen(choice)] if choice else []), *data]})

    async def model(http: HttpRequest) -> Response:
        for_inference(http)
        name = http.path_params["name"]
        if name == pool.choice():
            return json_reply(_chosen(name))
        candidates = pool.fleet.candidates(name)
        if not candidates:
            raise UnknownModel(name, nearest(name, pool.fleet.models()))
        return json_reply(_model(name, candidates[0]))

    return [Address("/v1/models", models), Address("/v1/models/{name:path}", model)]


def _model(name: str, state: NodeState) -> dict[str, object]:
    info = state.models.get(name) or state.models.get(f"{name}:latest")
    modified_at = info.modified_at if info is not None else ""
    return {"id": name, "object": "model", "created": _unix_s(modified_at), "owned_by": "sutazai"}


def _chosen(name: str) -> dict[str, object]:
    """The name under which a model is chosen by what is asked."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "sutazai"}


def _unix_s(rfc3339: str) -> int:
    """Seconds since 1970; 0 where the node gave no time or one of another form."""
    try:
        return timegm(time.strptime(rfc3339[:19], "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return 0
