"""`/openapi.json`: our own API described, for clients, documentation and fuzzing."""

from __future__ import annotations

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from sutazai import __version__
from sutazai.core.request import Dialect, Endpoint
from sutazai.edge.freshness import public_reply
from sutazai.edge.openapi_batches import batch_paths
from sutazai.edge.openapi_files import file_paths
from sutazai.edge.openapi_tasks import task_paths
from sutazai.edge.openapi_words import ANYTHING, PRIORITY, Schema
from sutazai.edge.openapi_words import at as _at
from sutazai.edge.openapi_words import body as _body
from sutazai.edge.openapi_words import created as _created
from sutazai.edge.openapi_words import error as _error
from sutazai.edge.openapi_words import get as _get
from sutazai.edge.openapi_words import in_path as _in_path
from sutazai.edge.openapi_words import in_query as _in_query
from sutazai.edge.openapi_words import json_body as _json_body
from sutazai.edge.openapi_words import marked as marked_paths
from sutazai.edge.replies import Address

TEXT: Schema = {"type": "string", "minLength": 1}
MODEL: Schema = {"type": "string", "minLength": 1, "maxLength": 256, "examples": ["sutazai-trial"]}
STREAM: Schema = {"type": ["boolean", "null"]}
NUMBER: Schema = {"type": ["number", "null"], "minimum": 0, "maximum": 2}
TOKENS: Schema = {"type": ["integer", "null"], "minimum": 0, "maximum": 1_000_000}
SEED: Schema = {"type": ["integer", "null"], "minimum": 0, "maximum": 2**31 - 1}
INPUT: Schema = {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 64}]}
MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": {"type": "string"}},
    },
}
OPTIONS: Schema = {
    "type": "object",
    "properties": {"temperature": NUMBER, "num_predict": TOKENS, "seed": SEED, "num_ctx": TOKENS},
}
EVENT: Schema = {
    "type": "object",
    "description": "One server-sent event: JSON, an error in its place, or at the end `[DONE]`.",
    "required": ["data"],
    "properties": {"data": TEXT},
}
LINES: Schema = {"type": "string", "description": "JSON, one object a line; the last has `done` or `error`."}
USAGE: Schema = {"type": "object", "required": ["prompt_tokens"]}


LABEL: Schema = {"type": "string", "minLength": 1, "maxLength": 64, "pattern": "^[a-z0-9-]+$"}
WORD: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": ["integer", "null"], "minimum": 0, "maximum": 2**53}
LIMITS: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "requests_per_minute": COUNT,
        "tokens_per_minute": COUNT,
        "bytes_per_minute": COUNT,
        "concurrent_requests": COUNT,
        "tokens_per_month": COUNT,
        "money_per_month": {"type": ["number", "null"], "minimum": 0, "maximum": 2**53},
        "burst_s": {"type": "number", "minimum": 0.1, "maximum": 3600},
    },
}
TENANT_BODY: Schema = _body(
    [],
    weight={"type": "number", "exclusiveMinimum": 0, "maximum": 1000},
    priority=PRIORITY,
    limits=LIMITS,
    waiting_tasks=COUNT,
    region={"type": "string"},
)
KEY_BODY: Schema = _body(
    ["name"],
    name=LABEL,
    tenant=LABEL,
    role={"enum": ["user", "admin"]},
    scopes={"anyOf": [{"type": "null"}, {"type": "array", "items": {"enum": ["inference", "tasks", "admin"]}}]},
    priority={"enum": ["high", "normal", "low", None]},
    limits=LIMITS,
)
SESSION_BODY: Schema = _body(
    ["model"],
    model=MODEL,
    system={"type": ["string", "null"], "pattern": "^[^\\x00]*$"},
    metadata={
        "type": ["object", "null"],
        "maxProperties": 16,
        "propertyNames": LABEL,
        "additionalProperties": {"type": "string", "maxLength": 512, "pattern": "^[^\\x00]*$"},
    },
    ttl_s={"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 86_400},
)
SESSION: Schema = _body(
    ["id", "object", "model", "system", "metadata", "ttl_s", "created_at", "expires_at", "turns", "messages"],
    metadata={"type": "object"},
)
FORGET_BODY: Schema = _body([], tenant=WORD, model=WORD, tag=WORD, fingerprint=WORD)
TENANT: Schema = _body(["name", "weight", "priority", "limits", "region", "is_defined"], limits={"type": "object"})
KEY: Schema = _body(["id", "name", "tenant", "role", "scopes", "priority", "limits"], scopes={"type": "array"})
NEW_KEY: Schema = KEY | {"required": [*KEY["required"], "key"]}

REQUESTS: dict[Endpoint, Schema] = {
    Endpoint.OPENAI_CHAT: _body(
        ["model", "messages"],
        model=MODEL,
        messages=MESSAGES,
        stream=STREAM,
        temperature=NUMBER,
        max_tokens=TOKENS,
        seed=SEED,
    ),
    Endpoint.OPENAI_COMPLETION: _body(
        ["model", "prompt"],
        model=MODEL,
        prompt=TEXT,
        stream=STREAM,
        temperature=NUMBER,
        max_tokens=TOKENS,
        seed=SEED,
    ),
    Endpoint.OPENAI_EMBEDDING: _body(["model", "input"], model=MODEL, input=INPUT),
    Endpoint.OLLAMA_CHAT: _body(["model", "messages"], model=MODEL, messages=MESSAGES, stream=STREAM, options=OPTIONS),
    Endpoint.OLLAMA_GENERATE: _body(["model", "prompt"], model=MODEL, prompt=TEXT, stream=STREAM, options=OPTIONS),
    Endpoint.OLLAMA_EMBED: _body(["model", "input"], model=MODEL, input=INPUT),
    Endpoint.OLLAMA_EMBEDDINGS: _body(["model", "prompt"], model=MODEL, prompt=TEXT),
}
ANSWERS: dict[Endpoint, Schema] = {
    Endpoint.OPENAI_CHAT: _body(["object", "choices"], choices={"type": "array"}, usage=USAGE),
    Endpoint.OPENAI_COMPLETION: _body(["object", "choices"], choices={"type": "array"}, usage=USAGE),
    Endpoint.OPENAI_EMBEDDING: _body(["object", "data"], data={"type": "array"}, usage=USAGE),
    Endpoint.OLLAMA_CHAT: _body(["model", "message", "done"], done={"type": "boolean"}),
    Endpoint.OLLAMA_GENERATE: _body(["model", "response", "done"], done={"type": "boolean"}),
    Endpoint.OLLAMA_EMBED: _body(["model", "embeddings"], embeddings={"type": "array"}),
    Endpoint.OLLAMA_EMBEDDINGS: _body(["embedding"], embedding={"type": "array"}),
}


def routes() -> list[Address]:
    """The description of everything."""
    described = msgspec.json.encode(document())

    async def openapi(http: HttpRequest) -> Response:
        return public_reply(http, described, "application/json")

    return [Address("/openapi.json", openapi)]


def document() -> Schema:
    """OpenAPI 3.1."""
    paths: Schema = {endpoint.path: {"post": _inference(endpoint)} for endpoint in Endpoint}
    paths |= _openai_paths() | _ollama_paths() | _other_paths() | _admin_paths()
    paths |= marked_paths(_session_paths() | task_paths() | file_paths() | batch_paths())
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "SutazAI",
            "version": __version__,
            "description": "A pool of local models behind the APIs of OpenAI and Ollama.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "OpenAIError": _body(
                    ["error"],
                    error=_body(["message", "type"], message={"type": "string"}, type={"type": "string"}),
                ),
                "OllamaError": _body(["error"], error={"type": "string"}),
            },
        },
        "security": [{}, {"key": []}],
        "paths": paths,
    }


def _inference(endpoint: Endpoint) -> Schema:
    is_openai = endpoint.dialect is Dialect.OPENAI
    stream_type, stream = ("text/event-stream", EVENT) if is_openai else ("application/x-ndjson", LINES)
    content: Schema = {"application/json": {"schema": ANSWERS[endpoint]}}
    if "stream" in REQUESTS[endpoint]["properties"]:
        content[stream_type] = {"schema": stream}
    return {
        "operationId": endpoint.name.lower(),
        "tags": ["inference"],
        "requestBody": _json_body(REQUESTS[endpoint]),
        "responses": {
            "200": {
                "description": "The answer, or its stream.",
                "headers": {
                    name: {"schema": {"type": "string"}}
                    for name in ("x-request-id", "x-sutazai-node", "x-sutazai-reason")
                },
                "content": content,
            },
            "default": _error(endpoint.dialect),
        },
    }


def _openai_paths() -> Schema:
    one = _get("model", _body(["id", "object"], id={"type": "string"}))
    one["parameters"] = [_in_path("name")]
    return {
        "/v1/models": {"get": _get("models", _body(["object", "data"], data={"type": "array"}))},
        "/v1/models/{name}": {"get": one},
    }


def _ollama_paths() -> Schema:
    ollama = Dialect.OLLAMA
    named = _body(["model"], model=MODEL)
    copied = _body(["source", "destination"], source=MODEL, destination=MODEL)
    return {
        "/api/tags": {"get": _get("tags", _body(["models"], models={"type": "array"}), ollama)},
        "/api/ps": {"get": _get("ps", _body(["models"], models={"type": "array"}), ollama)},
        "/api/version": {"get": _get("version", _body(["version"], version={"type": "string"}), ollama)},
        "/api/show": {"post": _send("show", named, ANYTHING)},
        "/api/pull": {"post": _send("pull", named | {"properties": {"model": MODEL, "stream": STREAM}}, ANYTHING)},
        "/api/delete": {"delete": _send("delete", named, None)},
        "/api/copy": {"post": _send("copy", copied, None)},
    }


def _other_paths() -> Schema:
    ready = _get("readyz", ANYTHING)
    ready["responses"]["503"] = ready["responses"]["200"]
    metrics = _get("metrics", ANYTHING)
    metrics["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "/healthz": {"get": _get("healthz", ANYTHING)},
        "/readyz": {"get": ready},
        "/metrics": {"get": metrics},
        "/openapi.json": {"get": _get("openapi", ANYTHING)},
        "/": {"get": _files("start", "text/html", "text/plain")},
        "/assets/{name}": {"get": _at("name", _files("asset", "text/css", "image/svg+xml"))},
    }


def _files(name: str, *media_types: str) -> Schema:
    operation = _get(name, ANYTHING)
    operation["responses"]["200"]["content"] = {kind: {"schema": {"type": "string"}} for kind in media_types}
    return operation


def _session_paths() -> Schema:
    listed = _get("sessions", _body(["object", "data", "has_more"], data={"type": "array", "items": SESSION}))
    listed["parameters"] = [
        _in_query("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
        _in_query("after", {"type": "string"}),
    ]
    said = _get("session_messages", _body(["object", "data"], data={"type": "array"}))
    one = "/v1/sessions/{session_id}"
    return {
        "/v1/sessions": {"get": listed, "post": _created("create_session", SESSION, SESSION_BODY)},
        one: {
            "get": _at("session_id", _get("session", SESSION)),
            "delete": _at("session_id", _get("delete_session", _body(["id", "deleted"], deleted={"const": True}))),
        },
        f"{one}/messages": {"get": _at("session_id", said)},
        f"{one}/chat/completions": {"post": _at("session_id", _turn())},
    }


def _turn() -> Schema:
    operation = _inference(Endpoint.OPENAI_CHAT)
    asked = REQUESTS[Endpoint.OPENAI_CHAT]
    return operation | {"operationId": "turn", "requestBody": _json_body(asked | {"required": ["messages"]})}


def _admin_paths() -> Schema:
    return _admin_views() | {
        "/admin/requests/{request_id}": {"delete": _at("request_id", _admin("cancel", ANYTHING))},
        "/admin/keys": {"get": _listed("keys"), "post": _admin("create_key", NEW_KEY, KEY_BODY, status="201")},
        "/admin/keys/{key_id}": {"delete": _at("key_id", _admin("revoke_key", KEY))},
        "/admin/tenants": {"get": _listed("tenants")},
        "/admin/tenants/{name}": {
            "get": _at("name", _admin("tenant", TENANT)),
            "put": _at("name", _admin("set_tenant", TENANT, TENANT_BODY)),
            "delete": _at("name", _admin("delete_tenant", TENANT)),
        },
        "/admin/cache/forget": {
            "post": _admin("forget", _body(["forgotten"], forgotten={"type": "integer"}), FORGET_BODY)
        },
    }


def _admin_views() -> Schema:
    audit = _listed("entries")
    audit["operationId"] = "audit"
    audit["parameters"] = [
        _in_query("limit", {"type": "integer", "minimum": 1, "maximum": 1000}),
        _in_query("before", {"type": "integer", "minimum": 1, "maximum": 2**63 - 1}),
    ]
    usage = _listed("usage")
    usage["parameters"] = [_in_query("since", {"type": "string", "format": "date-time"})]
    return {
        "/admin/nodes": {"get": _listed("nodes")},
        "/admin/breakers": {"get": _listed("breakers")},
        "/admin/requests": {"get": _listed("requests")},
        "/admin/audit": {"get": audit},
        "/admin/usage": {"get": usage},
    }


def _listed(name: str) -> Schema:
    return _admin(name, _body([name], **{name: {"type": "array"}}))


def _admin(name: str, answer: Schema, body: Schema | None = None, *, status: str = "200") -> Schema:
    operation = _get(name, answer)
    operation["tags"] = ["admin"]
    if body is not None:
        operation["requestBody"] = _json_body(body)
    if status != "200":
        operation["responses"][status] = operation["responses"].pop("200")
    return operation


def _send(name: str, body: Schema, answer: Schema | None) -> Schema:
    done: Schema = {"description": "Done."}
    if answer is not None:
        done["content"] = {
            "application/json": {"schema": answer},
            "application/x-ndjson": {"schema": {"type": "string"}},
        }
    return {
        "operationId": name,
        "tags": ["models"],
        "requestBody": _json_body(body),
        "responses": {"200": done, "default": _error(Dialect.OLLAMA)},
    }
