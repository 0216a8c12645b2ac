"""
A node that runs Ollama.

Ollama reloads a model whenever a request names other load options than it was loaded with, so requests are given the
context length that the model has, or the next allowed one (`policy.context`). Where nothing is to be changed the
client's bytes pass untouched.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, cast

import msgspec

from sutazai.adapters.http.address import parse_address
from sutazai.adapters.http.call import HttpCall, Reading, as_parts
from sutazai.adapters.http.client import HttpClient
from sutazai.adapters.http.connection import ConnectionPool
from sutazai.adapters.http.readings import Translated, Untouched, UntouchedWhole
from sutazai.adapters.ollama.contexts import Contexts, LoadWatch
from sutazai.core.errors import BadRequest, NodeRejected
from sutazai.core.node import LoadedModel, ModelInfo, Node, NodeReport
from sutazai.core.request import Dialect, Endpoint, Request
from sutazai.dialects.from_ollama import RepliesFromOllama
from sutazai.dialects.load_options import with_context
from sutazai.dialects.to_ollama import request_to_ollama
from sutazai.policy.context import context_to_ask
from sutazai.ports.inference import Call, NoCall, Reply
from sutazai.settings.model import ModelSettings

PULL_IDLE_S = 120.0
"""Ollama is silent while it verifies the digest of a large file."""


class OllamaNode:
    """Ollama's own API."""

    def __init__(
        self,
        node: Node,
        *,
        api_key: str | None,
        connect_s: float,
        model_settings: Callable[[str], ModelSettings],
    ) -> None:
        """Make the client; `model_settings` gives the present settings of a model, which may change at any time."""
        self.node = node
        self._pool = ConnectionPool(node.name, parse_address(node.url), connect_s=connect_s)
        self._client = HttpClient(self._pool, bearer=api_key)
        self._model_settings = model_settings
        self._openings = {
            endpoint.path: self._client.opening("POST", endpoint.path)
            for endpoint in Endpoint
            if endpoint.dialect is Dialect.OLLAMA
        }
        self._contexts = Contexts()

    def start(self, request: Request, reply: Reply) -> Call:
        endpoint, body = request.endpoint, request.body
        reading: Reading
        try:
            if endpoint.dialect is Dialect.OLLAMA:
                reading = Untouched(endpoint) if request.stream else UntouchedWhole(endpoint)
            else:
                endpoint, body = request_to_ollama(endpoint, body, model=request.model)
                reading = Translated(_replies(request))
            body, reply = self._with_load_options(request, body, reply)
        except BadRequest as error:
            reply.fail(error)
            return NoCall()
        head = b"%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
            self._openings[endpoint.path],
            request.id.encode(),
            len(body),
        )
        return HttpCall(self._pool, as_parts(head, body), reply, reading, stream=request.stream)

    def _with_load_options(self, request: Request, body: bytes, reply: Reply) -> tuple[bytes, Reply]:
        """The body with the load options that the model is to have, and who is to hear how it went."""
        model, contexts = request.model, self._contexts
        settings = self._model_settings(model)
        context = context_to_ask(
            request.context_tokens, contexts.present(model), contexts.default(model), settings.context_buckets
        )
        if contexts.ask(model, context) and context is not None:
            reply = LoadWatch(contexts, model, context, reply)
        is_plain = not request.has_load_options and request.endpoint.dialect is Dialect.OLLAMA
        if context is None and not settings.load_options and is_plain:
            return body, reply
        return with_context(body, num_ctx=context, load_options=settings.load_options), reply

    async def probe(self) -> NodeReport:
        asked_in = self._contexts.turn
        tags = cast("dict[str, Any]", await self._client.fetch_json("GET", "/api/tags"))
        running = cast("dict[str, Any]", await self._client.fetch_json("GET", "/api/ps"))
        version = cast("dict[str, Any]", await self._client.fetch_json("GET", "/api/version"))
        loaded = {entry.name: entry for entry in map(_loaded_model, running.get("models") or [])}
        self._contexts.learn(loaded, asked_in=asked_in)
        return NodeReport(
            models={info.name: info for info in map(_model_info, tags.get("models") or [])},
            loaded=loaded,
            version=str(version.get("version") or ""),
        )

    async def show(self, model: str) -> Mapping[str, object]:
        return cast("dict[str, object]", await self._client.fetch_json("POST", "/api/show", {"model": model}))

    async def pull(self, model: str, *, insecure: bool) -> AsyncIterator[Mapping[str, object]]:
        """Fetch a model; yields Ollama's progress records."""
        wanted = {"model": model, "insecure": insecure, "stream": True}
        async for line in self._client.lines("POST", "/api/pull", wanted, idle_s=PULL_IDLE_S):
            if not line:
                continue
            record = msgspec.json.decode(line, type=dict[str, object])
            if "error" in record:
                raise NodeRejected(str(record["error"]), node=self.node.name, status=502)
            yield record

    async def delete(self, model: str) -> None:
        await self._client.fetch_json("DELETE", "/api/delete", {"model": model})

    async def copy(self, source: str, destination: str) -> None:
        await self._client.fetch_json("POST", "/api/copy", {"source": source, "destination": destination})

    async def close(self) -> None:
        self._pool.close()


def _replies(request: Request) -> RepliesFromOllama:
    return RepliesFromOllama.for_request(
        request.endpoint, request.body, model=request.model, request_id=request.id, created=int(time.time())
    )


def _model_info(entry: dict[str, Any]) -> ModelInfo:
    details = entry.get("details") or {}
    return ModelInfo(
        name=str(entry.get("name") or entry.get("model") or ""),
        size_bytes=int(entry.get("size") or 0),
        digest=str(entry.get("digest") or ""),
        modified_at=str(entry.get("modified_at") or ""),
        family=str(details.get("family") or ""),
        parameter_size=str(details.get("parameter_size") or ""),
        quantization=str(details.get("quantization_level") or ""),
    )


def _loaded_model(entry: dict[str, Any]) -> LoadedModel:
    return LoadedModel(
        name=str(entry.get("name") or entry.get("model") or ""),
        context_tokens=int(entry.get("context_length") or 0),
        size_bytes=int(entry.get("size") or 0),
        vram_bytes=int(entry.get("size_vram") or 0),
        expires_at=str(entry.get("expires_at") or ""),
    )
