"""
JSON values against JSON schemas: the part of draft 2020-12 that models are held to.

Types, enum, const, properties, required, additionalProperties, items, the bounds of numbers, texts and lists, anyOf,
oneOf and allOf. `pattern` is told to the model and not checked, for a hostile one would take forever; keywords that
only describe are passed over; `$ref` is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sutazai.core.errors import BadRequest

MAX_SCHEMA_BYTES = 100_000
MAX_DEPTH = 32

_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: (
        (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())
    ),
}
_BOUNDS: tuple[tuple[str, str, Callable[[Any, Any], bool], str], ...] = (
    ("minimum", "number", lambda value, bound: value >= bound, "must be at least {}"),
    ("maximum", "number", lambda value, bound: value <= bound, "must be at most {}"),
    ("exclusiveMinimum", "number", lambda value, bound: value > bound, "must be more than {}"),
    ("exclusiveMaximum", "number", lambda value, bound: value < bound, "must be less than {}"),
    ("minLength", "string", lambda value, bound: len(value) >= bound, "must have at least {} characters"),
    ("maxLength", "string", lambda value, bound: len(value) <= bound, "must have at most {} characters"),
    ("minItems", "array", lambda value, bound: len(value) >= bound, "must have at least {} items"),
    ("maxItems", "array", lambda value, bound: len(value) <= bound, "must have at most {} items"),
)


def check_schema(schema: Any, *, where: str = "schema", depth: int = 0) -> None:
    """Raise `BadRequest` for a schema that is none, or says what is not understood here."""
    if isinstance(schema, bool):
        return
    if depth > MAX_DEPTH:
        raise BadRequest(f"{where} was nested more than {MAX_DEPTH} deep; flatten it.", where=where)
    if not isinstance(schema, dict):
        raise BadRequest(f"{where} must be an object or a boolean.", where=where)
    if "$ref" in schema:
        raise BadRequest(f"{where} used $ref, which is not understood; write out what it names.", where=where)
    kinds = schema.get("type", [])
    if any(kind not in _TYPES for kind in (kinds if isinstance(kinds, list) else [kinds]) if _is_name(kind, where)):
        raise BadRequest(f"{where}.type must be among {', '.join(_TYPES)}.", where=f"{where}.type")
    _check_forms(schema, where)
    for name, part in _parts(schema):
        check_schema(part, where=f"{where}.{name}", depth=depth + 1)


def mistakes(value: Any, schema: Any, where: str = "answer") -> list[str]:
    """A sentence for each way in which the value does not fit a schema that was checked."""
    return list(_mistakes(value, schema, where))


def _mistakes(value: Any, schema: Any, where: str) -> Iterator[str]:
    if isinstance(schema, bool):
        if not schema:
            yield f"{where} may not be there."
        return
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if kinds and not any(_TYPES[kind](value) for kind in kinds):
        yield f"{where} must be of type {' or '.join(kinds)}."
        return
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        yield f"{where} must be one of {schema['enum']}."
    if "const" in schema and not _same(value, schema["const"]):
        yield f"{where} must be {schema['const']!r}."
    for keyword, kind, holds, words in _BOUNDS:
        if keyword in schema and _TYPES[kind](value) and not holds(value, schema[keyword]):
            yield f"{where} {words.format(schema[keyword])}."
    if isinstance(value, dict):
        yield from _of_object(value, schema, where)
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            yield from _mistakes(item, schema["items"], f"{where}[{number}]")
    yield from _of_choices(value, schema, where)


def _of_object(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> Iterator[str]:
    known = schema.get("properties", {})
    for name in schema.get("required", []):
        if name not in value:
            yield f"{where}.{name} is missing."
    others = schema.get("additionalProperties", True)
    for name, part in value.items():
        yield from _mistakes(part, known.get(name, others), f"{where}.{name}")


def _of_choices(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    for part in schema.get("allOf", []):
        yield from _mistakes(value, part, where)
    for keyword in ("anyOf", "oneOf"):
        if keyword not in schema:
            continue
        fits = sum(not mistakes(value, part) for part in schema[keyword])
        if not fits or (keyword == "oneOf" and fits > 1):
            yield f"{where} must fit {'one' if keyword == 'oneOf' else 'any'} of {len(schema[keyword])} forms."


def _check_forms(schema: Mapping[str, Any], where: str) -> None:
    """The values of keywords, so that checking a value never stumbles over them."""
    forms: tuple[tuple[str, type[Any] | tuple[type[Any], ...], str], ...] = (
        ("properties", dict, "an object"),
        ("required", list, "a list"),
        ("enum", list, "a list"),
        ("anyOf", list, "a list"),
        ("oneOf", list, "a list"),
        ("allOf", list, "a list"),
        *((keyword, (int, float), "a number") for keyword, *_ in _BOUNDS),
    )
    for keyword, form, words in forms:
        if keyword in schema and (not isinstance(schema[keyword], form) or isinstance(schema[keyword], bool)):
            raise BadRequest(f"{where}.{keyword} must be {words}.", where=f"{where}.{keyword}")
    if any(not isinstance(name, str) for name in schema.get("required", [])):
        raise BadRequest(f"{where}.required must be a list of names.", where=f"{where}.required")


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, part in schema.get("properties", {}).items():
        yield f"properties.{name}", part
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield keyword, schema[keyword]
    for keyword in ("anyOf", "oneOf", "allOf"):
        for number, part in enumerate(schema.get(keyword, [])):
            yield f"{keyword}[{number}]", part


def _is_name(kind: Any, where: str) -> bool:
    if not isinstance(kind, str):
        raise BadRequest(f"{where}.type must be a name or a list of names.", where=f"{where}.type")
    return True


def _same(left: Any, right: Any) -> bool:
    """Equal as JSON: true is not 1."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)
