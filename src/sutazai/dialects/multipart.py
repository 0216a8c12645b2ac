"""
Reads `multipart/form-data` (RFC 7578) out of a body that is in memory already.

Strict: what is not clearly a form is refused, so that nobody behind can read it in another way. Encodings of parts,
nested forms and `filename*` do not belong here; clients of OpenAI send none of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sutazai.core.errors import BadRequest

MAX_PARTS = 32
MAX_HEAD_BYTES = 4096
_BOUNDARY = re.compile(
    r"""multipart/form-data\s*;\s*boundary=("?)([A-Za-z0-9'()+_,./:=? -]{1,70})\1\s*""", re.IGNORECASE
)
_NAME = re.compile(r';\s*name="([^"\r\n]*)"', re.IGNORECASE)
_FILENAME = re.compile(r';\s*filename="([^"\r\n]*)"', re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One field of a form."""

    filename: str | None
    """None for a field that is no file."""
    content: bytes


def form_of(content_type: str, body: bytes) -> dict[str, Part]:
    """The fields by name. Raises `BadRequest`, also for a name that comes twice."""
    found = _BOUNDARY.fullmatch(content_type.strip())
    if found is None:
        raise BadRequest("The body was no form. Send it as `multipart/form-data` with its boundary.")
    mark = b"\r\n--" + found[2].encode()
    if not body.startswith(mark[2:]):
        raise BadRequest("The form did not begin with its boundary. Send the parts without anything before them.")
    parts: dict[str, Part] = {}
    position = len(mark) - 2
    while body[position : position + 2] == b"\r\n":
        position += 2
        head_end = body.find(b"\r\n\r\n", position, position + MAX_HEAD_BYTES)
        end = body.find(mark, head_end + 4) if head_end >= 0 else -1
        if end < 0 or len(parts) == MAX_PARTS:
            raise BadRequest(f"The form was cut off, or had more than {MAX_PARTS} parts. Send it whole.")
        name, filename = _named(body[position:head_end])
        if name in parts:
            raise BadRequest(f"The form had {name[:64]!r} twice. Send it once.", where=name[:64])
        parts[name] = Part(filename=filename, content=body[head_end + 4 : end])
        position = end + len(mark)
    if body[position:].rstrip(b"\r\n") != b"--":
        raise BadRequest("The form did not end with its boundary. Send it whole.")
    return parts


def _named(head: bytes) -> tuple[str, str | None]:
    """The name of a part and of its file."""
    try:
        lines = head.decode().split("\r\n")
    except UnicodeDecodeError as error:
        raise BadRequest("The head of a part was not UTF-8. Encode names in UTF-8.") from error
    for line in lines:
        header, _, value = line.partition(":")
        if header.strip().lower() == "content-disposition" and value.strip().lower().startswith("form-data"):
            name, filename = _NAME.search(value), _FILENAME.search(value)
            if name is not None:
                return name[1], None if filename is None else filename[1]
    raise BadRequest('A part of the form had no name. Give it `Content-Disposition: form-data; name="..."`.')
