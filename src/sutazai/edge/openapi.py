"""`/openapi.json`: our own API described, for clients, documentation and fuzzing."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from sutazai import __version__
from sutazai.core.request import Dialect, Endpoint
from sutazai.edge.replies import Address, json_reply

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
MODEL: Schema = {"type": "string", "minLength": 1, "maxLength": 256, "examples": ["sutazai-trial"]}
STREAM: Schema = {"type": ["boolean", "null"]}
NUMBER: Schema = {"type": ["number", "null"], "minimum": 0, "maximum": 2}
TOKENS: Schema = {"type": ["integer", "null"], "minimum": 0, "maximum": 1_000_000}
SEED: Schema = {"type": ["integer", "null"], "minimum": 0, "maximum": 2**31 - 1}
ANYTHING: Schema = {"type": "object"}
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


def _body(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "required": required, "properties": properties}


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
    described = document()

    async def openapi(_: HttpRequest) -> Response:
        return json_reply(described)

    return [Address("/openapi.json", openapi)]


def document() -> Schema:
    """OpenAPI 3.1."""
    paths: Schema = {endpoint.path: {"post": _inference(endpoint)} for endpoint in Endpoint}
    paths |= _openai_paths() | _ollama_paths() | _other_paths()
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
    cancel = _get("cancel", ANYTHING)
    cancel["parameters"] = [_in_path("request_id")]
    ready = _get("readyz", ANYTHING)
    ready["responses"]["503"] = ready["responses"]["200"]
    metrics = _get("metrics", ANYTHING)
    metrics["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "/healthz": {"get": _get("healthz", ANYTHING)},
        "/readyz": {"get": ready},
        "/metrics": {"get": metrics},
        "/admin/nodes": {"get": _get("nodes", _body(["nodes"], nodes={"type": "array"}))},
        "/admin/requests": {"get": _get("requests", _body(["requests"], requests={"type": "array"}))},
        "/admin/requests/{request_id}": {"delete": cancel},
        "/openapi.json": {"get": _get("openapi", ANYTHING)},
    }


def _get(name: str, answer: Schema, dialect: Dialect = Dialect.OPENAI) -> Schema:
    return {
        "operationId": name,
        "responses": {
            "200": {"description": "As asked.", "content": {"application/json": {"schema": answer}}},
            "default": _error(dialect),
        },
    }


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


def _json_body(schema: Schema) -> Schema:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _in_path(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _error(dialect: Dialect) -> Schema:
    name = "OpenAIError" if dialect is Dialect.OPENAI else "OllamaError"
    return {
        "description": "What went wrong, in a sentence.",
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}},
    }
