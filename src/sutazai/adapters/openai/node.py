"""A node with OpenAI's API."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast

from sutazai.adapters.http.address import parse_address
from sutazai.adapters.http.call import HttpCall, Reading, as_parts
from sutazai.adapters.http.client import HttpClient
from sutazai.adapters.http.connection import ConnectionPool
from sutazai.adapters.http.readings import Translated, Untouched, UntouchedWhole
from sutazai.core.errors import BadRequest, NodeFault, NodeRejected
from sutazai.core.node import ModelInfo, Node, NodeKind, NodeReport
from sutazai.core.request import Dialect, Endpoint, Head, Request
from sutazai.dialects.assembled import Assembled, AssembledForOllama
from sutazai.dialects.for_llamacpp import continues_a_turn, streamed, with_forced_tool
from sutazai.dialects.from_openai import RepliesFromOpenAI, load_reply
from sutazai.dialects.to_openai import request_to_openai
from sutazai.ports.inference import Call, NoCall, Reply


class OpenAINode:
    """vLLM, llama.cpp's server, LM Studio and whatever else answers `/v1/models`."""

    def __init__(self, node: Node, *, api_key: str | None, connect_s: float) -> None:
        self.node = node
        self._pool = ConnectionPool(node.name, parse_address(node.url), connect_s=connect_s)
        self._client = HttpClient(self._pool, bearer=api_key)
        self._is_llamacpp = node.kind is NodeKind.LLAMACPP
        paths = [endpoint.path for endpoint in Endpoint if endpoint.dialect is Dialect.OPENAI]
        self._openings = {path: self._client.opening("POST", path) for path in paths}
        self._last_openings = {path: self._client.opening("POST", path, close=True) for path in paths}
        """Of streams of llama.cpp: it drops the connection after each, although it announces to keep it."""
        self._has_metrics = True

    def start(self, request: Request, reply: Reply) -> Call:
        endpoint, body = request.endpoint, request.body
        openings = self._openings
        reading: Reading
        try:
            if endpoint.dialect is Dialect.OPENAI:
                reading = Untouched(endpoint) if request.stream else UntouchedWhole(endpoint)
            elif request.loads_only:
                self._answer_load(request, reply)
                return NoCall()
            else:
                endpoint, body = request_to_openai(endpoint, body, model=request.model)
                reading = Translated(_replies(request))
            if self._is_llamacpp:
                body, reading, is_streamed = _for_llamacpp(request, endpoint, body, reading)
                openings = self._last_openings if is_streamed else openings
        except BadRequest as error:
            reply.fail(error)
            return NoCall()
        head = b"%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
            openings[endpoint.path],
            request.id.encode(),
            len(body),
        )
        return HttpCall(self._pool, as_parts(head, body), reply, reading, stream=request.stream)

    def _answer_load(self, request: Request, reply: Reply) -> None:
        """These nodes hold their models always, so a request to load one is answered here."""
        body = load_reply(request.endpoint, request.model, _now_rfc3339())
        content_type = b"application/x-ndjson" if request.stream else b"application/json"
        reply.whole(Head(200, content_type, len(body), self.node.name, ""), body, None)

    async def probe(self) -> NodeReport:
        listed = cast("dict[str, Any]", await self._client.fetch_json("GET", "/v1/models"))
        models = {info.name: info for info in map(_model_info, listed.get("data") or []) if info.name}
        slots = running = waiting = None
        if self.node.kind is NodeKind.LLAMACPP:
            slots, running = await self._slots()
        elif self._has_metrics:
            running, waiting = await self._metrics()
        return NodeReport(models=models, loaded=None, slots=slots, running=running, waiting=waiting)

    async def show(self, model: str) -> Mapping[str, object]:
        report = await self.probe()
        info = report.models.get(model, ModelInfo(name=model))
        return {
            "modelfile": "",
            "parameters": "",
            "template": "",
            "details": {
                "parent_model": "",
                "format": "gguf" if self.node.kind is NodeKind.LLAMACPP else "",
                "family": info.family,
                "families": [info.family] if info.family else [],
                "parameter_size": info.parameter_size,
                "quantization_level": info.quantization,
            },
            "model_info": {"general.architecture": info.family, "context_length": info.context_tokens},
            "capabilities": ["completion", "tools", "embedding"],
        }

    async def close(self) -> None:
        self._pool.close()

    async def _slots(self) -> tuple[int | None, int | None]:
        """llama.cpp tells its slots one by one, unless it was started without that."""
        try:
            slots = cast("list[dict[str, Any]]", await self._client.fetch_json("GET", "/slots"))
        except NodeRejected:
            return None, None
        return len(slots), sum(bool(slot.get("is_processing")) for slot in slots)

    async def _metrics(self) -> tuple[int | None, int | None]:
        """What vLLM works on; other servers have no such page and are not asked again."""
        try:
            answer = await self._client.fetch("GET", "/metrics")
        except NodeFault:
            return None, None
        if answer.status != 200:
            self._has_metrics = False
            return None, None
        return _gauge(answer.body, b"vllm:num_requests_running"), _gauge(answer.body, b"vllm:num_requests_waiting")


def _for_llamacpp(request: Request, endpoint: Endpoint, body: bytes, reading: Reading) -> tuple[bytes, Reading, bool]:
    """
    What to send, how to read the answer, and whether that is a stream: it is where it can be, see `for_llamacpp`.

    `endpoint`, `body` and `reading` are what any other node would get. Raises `BadRequest`.
    """
    is_chat = endpoint is Endpoint.OPENAI_CHAT
    is_translated = endpoint is not request.endpoint
    if is_chat and not is_translated:
        body = with_forced_tool(body)
    if request.stream:
        return body, reading, True
    if endpoint is Endpoint.OPENAI_EMBEDDING or (is_chat and not is_translated and continues_a_turn(body)):
        return body, reading, False
    as_stream = streamed(body)
    if as_stream is None:
        return body, reading, False
    if is_translated:
        return as_stream, Translated(AssembledForOllama(endpoint, _replies(request))), True
    return as_stream, Translated(Assembled(endpoint), is_verbatim=True), True


def _replies(request: Request) -> RepliesFromOpenAI:
    return RepliesFromOpenAI(
        request.endpoint, model=request.model, stream=request.stream, now=time.monotonic, clock=_now_rfc3339
    )


def _now_rfc3339() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _model_info(entry: dict[str, Any]) -> ModelInfo:
    meta = entry.get("meta") or {}
    parameters = meta.get("n_params") or 0
    return ModelInfo(
        name=str(entry.get("id") or ""),
        size_bytes=int(meta.get("size") or 0),
        modified_at=_rfc3339(entry.get("created")),
        family=str(entry.get("owned_by") or ""),
        parameter_size=f"{parameters / 1e9:.1f}B"
        if parameters >= 1e8
        else f"{parameters / 1e6:.1f}M"
        if parameters
        else "",
        context_tokens=int(entry.get("max_model_len") or meta.get("n_ctx") or 0),
    )


def _rfc3339(unix_s: object) -> str:
    if not isinstance(unix_s, int | float) or isinstance(unix_s, bool):
        return ""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_s))


def _gauge(page: bytes, name: bytes) -> int | None:
    """The sum of a gauge over its labels in a Prometheus page."""
    total: float | None = None
    for line in page.splitlines():
        if line.startswith(name):
            try:
                total = (total or 0.0) + float(line.rsplit(b" ", 1)[-1])
            except ValueError:
                continue
    return None if total is None else int(total)
