"""Words that the description of the API is put together from."""

from __future__ import annotations

from typing import Any

from sutazai.core.mark import WRITTEN
from sutazai.core.request import Dialect

Schema = dict[str, Any]

ANYTHING: Schema = {"type": "object"}
PRIORITY: Schema = {"enum": ["high", "normal", "low"]}
MARK: Schema = {"type": "string", "pattern": "^[0-9a-f]{1,8}-[0-9a-f]{1,15}$"}
SEEN: Schema = {
    "name": WRITTEN,
    "in": "header",
    "description": "What the answer to a write had under this name: what is read here is not older than that.",
    "schema": MARK,
}
GIVEN: Schema = {
    "description": "A mark of what was written, where the database has replicas. Send it with what you read next.",
    "schema": MARK,
}


def body(required: list[str], **properties: Schema) -> Schema:
    """An object with these fields."""
    return {"type": "object", "required": required, "properties": properties}


def created(name: str, answer: Schema, body: Schema) -> Schema:
    """An operation that makes something out of a body."""
    operation = get(name, answer) | {"requestBody": json_body(body)}
    operation["responses"]["201"] = operation["responses"].pop("200")
    return operation


def at(name: str, operation: Schema) -> Schema:
    """The same at an address with a name in it."""
    return operation | {"parameters": [in_path(name)]}


def get(name: str, answer: Schema, dialect: Dialect = Dialect.OPENAI) -> Schema:
    """An operation that answers with JSON."""
    return {
        "operationId": name,
        "responses": {
            "200": {"description": "As asked.", "content": {"application/json": {"schema": answer}}},
            "default": error(dialect),
        },
    }


def json_body(schema: Schema) -> Schema:
    """A body that must be there."""
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def in_path(name: str) -> Schema:
    """A part of the address."""
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def in_query(name: str, schema: Schema) -> Schema:
    """A part of the query."""
    return {"name": name, "in": "query", "schema": schema}


def marked(paths: Schema) -> Schema:
    """What tenants write and read again: answers to writes carry a mark, and every request may."""
    for operations in paths.values():
        for method, operation in operations.items():
            operation["parameters"] = [*operation.get("parameters", ()), SEEN]
            if method != "get":
                good = next(answer for status, answer in operation["responses"].items() if status.startswith("2"))
                good["headers"] = {**good.get("headers", {}), WRITTEN: GIVEN}
    return paths


def error(dialect: Dialect) -> Schema:
    """Any error, in the form of the dialect."""
    name = "OpenAIError" if dialect is Dialect.OPENAI else "OllamaError"
    return {
        "description": "What went wrong, in a sentence.",
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}},
    }
