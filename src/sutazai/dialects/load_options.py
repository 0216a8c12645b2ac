"""
Ollama requests with the options that are fixed at load time set by us instead of by the client.

Each other value of one of them would make the node throw its model out and load it again, for everybody.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Raw

from sutazai.dialects.complaints import decoded
from sutazai.dialects.ollama_shapes import LOAD_OPTIONS

_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_OPTIONS = msgspec.json.Decoder(dict[str, Raw] | None)
_encode = msgspec.json.Encoder().encode


def with_context(body: bytes, *, num_ctx: int | None, load_options: Mapping[str, int | float | bool]) -> bytes:
    """
    The same request with other load options: those of the client are dropped, `load_options` and `num_ctx`
    are set.

    All other values are copied byte for byte. `num_ctx` is in tokens; None leaves it to the node. Raises
    `BadRequest` where `body` is not an object or its options are none.
    """
    fields = decoded(_FIELDS, body)
    asked = decoded(_OPTIONS, fields["options"], under="options") if "options" in fields else None
    options: dict[str, object] = {name: value for name, value in (asked or {}).items() if name not in LOAD_OPTIONS}
    options |= load_options
    if num_ctx is not None:
        options["num_ctx"] = num_ctx
    rest: dict[str, object] = {name: value for name, value in fields.items() if name != "options"}
    return _encode(rest | {"options": options} if options else rest)
