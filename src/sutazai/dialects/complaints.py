"""
What is wrong with a request body, as one sentence and a place.

The decoders of msgspec find the fault; this module turns their terse finding into words for the person who
wrote the request. Nothing here runs for a request that is well formed.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from sutazai.core.errors import BadRequest

T = TypeVar("T")

FAULTS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""All that a msgspec decoder raises for any bytes at all."""

_WRONG_TYPE = re.compile(r"Expected `([^`]+)`, got `([^`]+)`")
_OUT_OF_BOUNDS = re.compile(r"Expected `[^`]+` (>=|<=|>|<) (\S+)")
_MISSING = re.compile(r"missing required field `([^`]+)`")
_UNKNOWN_VALUE = re.compile(r"Invalid enum value (\S+)")
_PLACE = re.compile(r" - at `\$\.?([^`]*)`$")
_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)

_WANTED = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
_GOT = _WANTED | {"int": "a number", "float": "a number with a decimal point"}
_BOUNDS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
_CHOICES = {
    "role": "system, user, assistant or tool",
    "encoding_format": "float or base64",
}
_KINDS = {
    ord('"'): "a string",
    ord("["): "a list",
    ord("{"): "an object",
    ord("t"): "true",
    ord("f"): "false",
    ord("n"): "null",
}


def decoded(decoder: msgspec.json.Decoder[T], body: bytes, *, under: str = "") -> T:
    """What `decoder` makes of `body`, which stands at `under` in the request. Raises only `BadRequest`."""
    try:
        return decoder.decode(body)
    except FAULTS as error:
        raise complaint(error, bytes(body), under=under) from error


def complaint(error: Exception, body: bytes, *, under: str = "") -> BadRequest:
    """The sentence for one of `FAULTS`."""
    if isinstance(error, msgspec.ValidationError):
        return _invalid(str(error), under)
    subject = f"The JSON in {under}" if under else "The body"
    return BadRequest(f"{subject} {_unreadable(error, body)}", where=under or None)


def wrong_type(where: str, wanted: str, value: bytes) -> BadRequest:
    """A field whose JSON `value` is not what it must be; an empty value means that it is missing."""
    if not value:
        return missing(where)
    return BadRequest(f"{where} must be {wanted}, not {kind_of(value)}.", where=where)


def missing(where: str) -> BadRequest:
    """A field that must be there and is not."""
    return BadRequest(f"{where} is missing; the request cannot be answered without it.", where=where)


def kind_of(value: bytes) -> str:
    """What a JSON value is, told by its first byte."""
    return _KINDS.get(memoryview(value)[0], "a number")


def _invalid(finding: str, under: str) -> BadRequest:
    """JSON of the wrong shape: every finding of msgspec that has a place."""
    place = _PLACE.search(finding)
    path = place[1] if place else ""
    where = under + ("" if not under or not path or path.startswith("[") else ".") + path
    if absent := _MISSING.search(finding):
        return missing(f"{where}.{absent[1]}" if where else absent[1])
    subject = where or "The body"
    return BadRequest(f"{subject} {_finding_in_words(finding, where)}.", where=where or None)


def _finding_in_words(finding: str, where: str) -> str:
    if wrong := _WRONG_TYPE.search(finding):
        wanted = [_WANTED.get(word, word) for word in wrong[1].split(" | ") if word != "null"]
        if not where:
            wanted = ["a JSON object"]
        return f"must be {' or '.join(dict.fromkeys(wanted))}, not {_GOT.get(wrong[2], wrong[2])}"
    if bound := _OUT_OF_BOUNDS.search(finding):
        return f"must be {_BOUNDS[bound[1]]} {bound[2]}"
    if unknown := _UNKNOWN_VALUE.search(finding):
        choices = _CHOICES.get(where.rpartition(".")[2])
        return f"must be {choices}, not {unknown[1]}" if choices else f"cannot be {unknown[1]}"
    if "out of range" in finding:
        return "is a number too large to read"
    return f"was not understood: {_PLACE.sub('', finding)}"


def _unreadable(error: Exception, body: bytes) -> str:
    """Bytes that are no JSON at all: what follows "The body"."""
    if isinstance(error, RecursionError):
        return "is nested too deeply; flatten it."
    try:
        body.decode()
    except UnicodeDecodeError as broken:
        return f"is not UTF-8: byte {broken.start} cannot be read."
    if not body.strip():
        return "is empty; send a JSON object."
    if body.startswith(b"\xef\xbb\xbf"):
        return "starts with a byte order mark; send it without."
    if half := _HALF_PAIR.search(body):
        return f"holds half of a surrogate pair at byte {half.start()}: {half[0].decode()} stands alone."
    if "truncated" in str(error):
        return f"is not JSON: it ends in the middle, after {len(body)} bytes."
    return f"is not JSON: {str(error).removeprefix('JSON is malformed: ')}."
