"""
Untyped values, as TOML or the environment gave them, become `Settings`; every mistake on the way is kept.

msgspec's own decoder stops at the first mistake, so the walk over the model is ours. What a type is called in
messages and in the reference stands here too.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import cast

from msgspec import inspect as shapes

from sutazai.settings import model
from sutazai.settings.check import mistakes_in
from sutazai.settings.places import Places, Spot, dotted
from sutazai.settings.secret import Secret

SHAPE = cast("shapes.StructType", shapes.type_info(model.Settings))
"""The model as msgspec sees it."""


class _Wrong:
    """Stands for a value that was no use; its mistake is noted."""


_WRONG = _Wrong()


class Decoder:
    """One reading of the settings; `mistakes` grows with each thing that was wrong."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.mistakes: list[str] = []

    def settings(self, raw: Mapping[str, object]) -> model.Settings:
        """The settings, with defaults where there were mistakes: use them only while `mistakes` is empty."""
        return cast("model.Settings", self._group(SHAPE, raw, ()))

    def _note(self, spot: Spot, wrong: str) -> None:
        end = "" if wrong.endswith("?") else "."
        self.mistakes.append(f"{self._places.name(spot)} {wrong}{end}")

    def _value(self, shape: shapes.Type, raw: object, spot: Spot) -> object:
        match shape:
            case shapes.StructType() if isinstance(raw, Mapping):
                return self._group(shape, raw, spot)
            case shapes.VarTupleType(item_type=item) if isinstance(raw, (list, tuple)):
                return self._items(item, raw, spot)
            case shapes.DictType(value_type=value) if isinstance(raw, Mapping):
                return self._table(value, raw, spot)
            case shapes.UnionType(types=types):
                shape = next((one for one in types if _fits(one, raw)), shape)
        if _fits(shape, raw):
            return _scalar(shape, raw)
        self._note(spot, f"was {_seen(shape, raw)}; give {words(shape)}")
        return _WRONG

    def _group(self, shape: shapes.StructType, raw: Mapping[str, object], spot: Spot) -> object:
        fields = {field.name: field for field in shape.fields}
        for key in raw:
            if key not in fields:
                self._unknown(key, fields.keys(), spot)
        values: dict[str, object] = {}
        lacking = False
        for name, field in fields.items():
            value = self._value(field.type, raw[name], (*spot, name)) if name in raw else _WRONG
            if value is not _WRONG:
                values[name] = value
            elif field.required:
                lacking = True
                if name not in raw:
                    self._note(spot, f"lacked {name}; give {words(field.type)}")
        if lacking:
            return _WRONG
        group = cast("model.Group", shape.cls(**values))
        for inside, wrong in mistakes_in(group):
            self._note((*spot, *inside), wrong)
        return group

    def _items(self, shape: shapes.Type, raw: Iterable[object], spot: Spot) -> object:
        values = [self._value(shape, value, (*spot, index)) for index, value in enumerate(raw)]
        return tuple(value for value in values if value is not _WRONG)

    def _table(self, shape: shapes.Type, raw: Mapping[str, object], spot: Spot) -> object:
        values = {key: self._value(shape, value, (*spot, key)) for key, value in raw.items()}
        return {key: value for key, value in values.items() if value is not _WRONG}

    def _unknown(self, key: str, known: Iterable[str], spot: Spot) -> None:
        nearest = difflib.get_close_matches(key, known, n=1)
        elsewhere = [dotted((group.name, key)) for group in SHAPE.fields if key in _field_names(group.type)]
        meant = [dotted((*spot, *nearest))] if nearest else elsewhere
        hint = f"did you mean {' or '.join(meant)}?" if meant else "remove it"
        self._note((*spot, key), f"was not known; {hint}")


def words(shape: shapes.Type) -> str:
    """What a type is called: `a whole number`, `a list of strings`. `None` is not told."""
    match shape:
        case shapes.UnionType(types=types):
            named = [words(one) for one in types if not isinstance(one, shapes.NoneType)]
            return " or ".join(named)
        case shapes.LiteralType():
            return "one of " + ", ".join(f'"{value}"' for value in choices(shape))
        case shapes.VarTupleType(item_type=item):
            noun, bracket, note = words(item).removeprefix("a ").partition(" (")
            return f"a list of {noun}s{bracket}{note.replace('its value is', 'their values are')}"
        case shapes.DictType(value_type=shapes.StructType()):
            return "a table of tables"
        case shapes.DictType(value_type=value):
            return f"a table whose values are each {words(value)}"
    return _WORDS[type(shape)]


def choices(shape: shapes.LiteralType) -> tuple[str, ...]:
    """The words that a choice takes, in alphabetical order."""
    return tuple(sorted(str(value) for value in shape.values))


_WORDS: Mapping[type[shapes.Type], str] = {
    shapes.IntType: "a whole number",
    shapes.FloatType: "a number",
    shapes.BoolType: "true or false",
    shapes.StrType: "a string",
    shapes.CustomType: "a string (its value is hidden)",
    shapes.StructType: "a table",
}


def _fits(shape: shapes.Type, raw: object) -> bool:
    match shape:
        case shapes.IntType():
            return type(raw) is int and _is_short(raw)
        case shapes.FloatType():
            return type(raw) is float or (type(raw) is int and _is_short(raw))
        case shapes.BoolType():
            return type(raw) is bool
        case shapes.StrType() | shapes.CustomType():
            return type(raw) is str
        case shapes.LiteralType(values=values):
            return type(raw) is str and raw in values
        case shapes.NoneType():
            return raw is None
    return False


def _scalar(shape: shapes.Type, raw: object) -> object:
    match shape, raw:
        case shapes.FloatType(), int():
            return float(raw)
        case shapes.CustomType(), str():
            return Secret(raw)
    return raw


def _is_short(number: int) -> bool:
    """Inside 64 bits, as TOML has it; beyond that even printing a number can fail."""
    return -(2**63) <= number < 2**63


def _seen(shape: shapes.Type, raw: object) -> str:
    """What was there instead. Strings are not repeated, as they may be secrets, except wrong choices."""
    match raw:
        case bool():
            return "true" if raw else "false"
        case int():
            return "a whole number" if _is_short(raw) else "a number of more than 64 bits"
        case float():
            return "a number with a point"
        case str():
            return json.dumps(raw[:40], ensure_ascii=False) if isinstance(shape, shapes.LiteralType) else "a string"
        case Mapping():
            return "a table"
        case list() | tuple():
            return "a list"
        case None:
            return "empty"
    return "a date or a time"


def _field_names(shape: shapes.Type) -> set[str]:
    return {field.name for field in shape.fields} if isinstance(shape, shapes.StructType) else set()
