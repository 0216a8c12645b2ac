"""Ollama's addresses beside inference: what there is, what is loaded, and the keeping of models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from sutazai.core.errors import BadRequest, NodeTimeout, NoHealthyNode, UnknownModel
from sutazai.core.node import Health, LoadedModel, ModelInfo, NodeState
from sutazai.edge.audited import Record, audited, audited_records
from sutazai.edge.freshness import private_reply
from sutazai.edge.pool import Pool, for_admins, for_inference
from sutazai.edge.replies import Address, body_as, json_lines, json_reply
from sutazai.policy.nearest import nearest
from sutazai.ports.audit import Action

COMPATIBLE_VERSION = "0.12.0"
"""The Ollama whose API this is, told where no Ollama node tells its own; clients switch features by it."""
SHOW_LIMIT_S = 10.0
NO_TIME = "0001-01-01T00:00:00Z"


class ModelName(msgspec.Struct):
    """A body that names a model, by Ollama's present word or its older one."""

    model: str = ""
    name: str = ""

    def required(self) -> str:
        """The name. Raises `BadRequest`."""
        if not (self.model or self.name):
            raise BadRequest("model is missing; say which one.", where="model")
        return self.model or self.name


class Pull(ModelName):
    """The body of `/api/pull`."""

    insecure: bool = False
    stream: bool | None = None


class Copy(msgspec.Struct):
    """The body of `/api/copy`."""

    source: str
    destination: str


_NAME = msgspec.json.Decoder(ModelName)
_PULL = msgspec.json.Decoder(Pull)
_COPY = msgspec.json.Decoder(Copy)


def routes(pool: Pool) -> list[Address]:
    """Everything below `/api` but inference."""
    fleet = pool.fleet

    async def tags(http: HttpRequest) -> Response:
        for_inference(http)
        listed = fleet.listed_models()
        return private_reply(http, {"models": [_tag(listed[name][0].models[name]) for name in sorted(listed)]})

    async def running(http: HttpRequest) -> Response:
        for_inference(http)
        return json_reply({"models": [_running(state, entry) for state, entry in _loaded(fleet.states())]})

    async def version(_: HttpRequest) -> Response:
        versions = [state.version for state in fleet.states() if state.version and state.health is Health.UP]
        return json_reply({"version": min(versions, key=_version_key, default=COMPATIBLE_VERSION)})

    async def show(http: HttpRequest) -> Response:
        for_inference(http)
        model = (await body_as(http, _NAME)).required()
        candidates = fleet.candidates(model)
        if not candidates:
            raise UnknownModel(model, nearest(model, fleet.models()))
        up = [state for state in candidates if state.health is Health.UP]
        if not up:
            raise NoHealthyNode(f"Every node with {model!r} is down.", retry_after_s=5)
        node = up[0].node.name
        try:
            async with asyncio.timeout(SHOW_LIMIT_S):
                return json_reply(await fleet.client(node).show(model))
        except TimeoutError as error:
            raise NodeTimeout(f"The node {node} did not answer within {SHOW_LIMIT_S:g} s.", node=node) from error

    async def pull(http: HttpRequest) -> Response:
        for_admins(http)
        asked = await body_as(http, _PULL)
        model = asked.required()
        pulling = pool.keeping.pull(model, insecure=asked.insecure)
        progress = audited_records(pool.audit, http, Action.MODEL_PULLED, model, pulling)
        if asked.stream is not False:
            first = await anext(progress)  # a pull that cannot begin is an error, not a stream
            return json_lines(_with_first(first, progress))
        last: Record = {}
        async for record in progress:
            last = record
        return json_reply(last, status=502 if "error" in last else 200)

    async def delete(http: HttpRequest) -> Response:
        for_admins(http)
        model = (await body_as(http, _NAME)).required()
        async with audited(pool.audit, http, Action.MODEL_DELETED, model):
            await pool.keeping.delete(model)
        return Response(status_code=200)

    async def copy(http: HttpRequest) -> Response:
        for_admins(http)
        asked = await body_as(http, _COPY)
        async with audited(pool.audit, http, Action.MODEL_COPIED, asked.source, destination=asked.destination):
            await pool.keeping.copy(asked.source, asked.destination)
        return Response(status_code=200)

    return [
        Address("/api/tags", tags),
        Address("/api/ps", running),
        Address("/api/version", version),
        Address("/api/show", show, methods=["POST"]),
        Address("/api/pull", pull, methods=["POST"]),
        Address("/api/delete", delete, methods=["DELETE"]),
        Address("/api/copy", copy, methods=["POST"]),
    ]


async def _with_first(first: Record, rest: AsyncGenerator[Record, None]) -> AsyncIterator[Record]:
    async with aclosing(rest):
        yield first
        async for record in rest:
            yield record


def _tag(info: ModelInfo) -> dict[str, object]:
    return {
        "name": info.name,
        "model": info.name,
        "modified_at": info.modified_at or NO_TIME,
        "size": info.size_bytes,
        "digest": info.digest,
        "details": _details(info),
    }


def _details(info: ModelInfo) -> dict[str, object]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": info.family,
        "families": [info.family] if info.family else None,
        "parameter_size": info.parameter_size,
        "quantization_level": info.quantization,
    }


def _loaded(states: object) -> list[tuple[NodeState, LoadedModel]]:
    found: list[tuple[NodeState, LoadedModel]] = []
    for state in states:  # type: ignore[attr-defined]
        if state.health is not Health.UP:
            continue
        if state.loaded is None:
            # a node without such a notion holds all that it lists
            found += [(state, LoadedModel(name=name)) for name in state.models]
        else:
            unique = {entry.name: entry for entry in state.loaded.values()}
            found += [(state, entry) for entry in unique.values()]
    return found


def _running(state: NodeState, entry: LoadedModel) -> dict[str, object]:
    info = state.models.get(entry.name, ModelInfo(name=entry.name))
    return {
        "name": entry.name,
        "model": entry.name,
        "size": entry.size_bytes or info.size_bytes,
        "digest": info.digest,
        "details": _details(info),
        "expires_at": entry.expires_at or NO_TIME,
        "size_vram": entry.vram_bytes,
        "context_length": entry.context_tokens or info.context_tokens,
        "node": state.node.name,
    }


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("-", maxsplit=1)[0].split(".") if part.isdigit())
