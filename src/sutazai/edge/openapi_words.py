"""Words that the description of the API is put together from."""

from __future__ import annotations

from typing import Any

from sutazai.core.request import Dialect

Schema = dict[str, Any]

ANYTHING: Schema = {"type": "object"}
PRIORITY: Schema = {"enum": ["high", "normal", "low"]}


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


def error(dialect: Dialect) -> Schema:
    """Any error, in the form of the dialect."""
    name = "OpenAIError" if dialect is Dialect.OPENAI else "OllamaError"
    return {
        "description": "What went wrong, in a sentence.",
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}},
    }
