"""The same request for another model."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from sutazai.dialects.complaints import decoded

_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_encode = msgspec.json.Encoder().encode


def renamed(body: bytes, model: str) -> bytes:
    """The request with another `model`; all other values are copied byte for byte. Raises `BadRequest`."""
    fields = decoded(_FIELDS, body)
    return _encode({**fields, "model": model})
