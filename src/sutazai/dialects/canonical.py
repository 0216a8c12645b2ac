"""
One form for all bodies that ask the same: keys sorted, numbers that are equal written the same.

Two requests may share an answer only where every reader understands them the same, so a body that could be read in
two ways has no such form: of two equal keys vLLM takes the last, and Ollama mixes the objects behind them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Final

import msgspec

EXACT: Final = 2**53
"""Up to here every whole number is a float too."""
_ADDRESS: Final = b'url":"'
_INLINE: Final = b'url":"data:'


class _NotOne(ValueError):
    """The body can be read in more than one way."""


def fields_of(body: bytes) -> dict[str, object] | None:
    """
    The object in a JSON body; None where there is none that everybody would read the same.

    Floats that are whole come as integers, so that 0.0 and 0 are one.
    """
    try:
        fields = _decoder.decode(body.decode())
    except (ValueError, RecursionError):  # numbers of thousands of digits are a `ValueError` too
        return None
    return fields if isinstance(fields, dict) else None


def canonical(fields: dict[str, object], *, without: Collection[str]) -> bytes | None:
    """The one form of these fields, less those that are named; None where some text is no Unicode."""
    try:
        return _encoder.encode({name: value for name, value in fields.items() if name not in without})
    except (UnicodeEncodeError, RecursionError):
        return None


def names_remote_file(form: bytes) -> bool:
    """Whether a canonical form names something that the node would fetch, and that may change meanwhile."""
    return form.count(_ADDRESS) != form.count(_INLINE)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _NotOne
    return fields


def _number(text: str) -> float | int:
    number = float(text)
    return int(number) if number.is_integer() and -EXACT < number < EXACT else number


def _no_number(_text: str) -> float:
    raise _NotOne  # NaN and Infinity are Python's, not JSON's


# The standard library's decoder, because only it shows keys that come twice; it takes three times msgspec's time.
_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=_no_number)
_encoder = msgspec.json.Encoder(order="sorted")
