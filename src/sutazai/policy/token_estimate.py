"""
About how many tokens a request will take, guessed before it runs and without decoding it again.

It need not be good: what was guessed is set aside, and corrected as soon as the truth is known.
"""

from __future__ import annotations

import re

from sutazai.core.request import Operation, Request

BYTES_PER_TOKEN = 4
"""Of English text, with the JSON around it."""
MAX_INPUT_TOKENS = 131_072
"""Images make bodies large; no model reads more than about this."""
OUTPUT_TOKENS = 256
"""Where the client does not say how much it wants."""
LOOK_BYTES = 4096
"""At either end of the body: clients put their options before or after the messages."""

_NAMED = re.compile(rb'"(?:max_tokens|max_completion_tokens|num_predict)"\s*:\s*(\d{1,9})')
"""In a text these names would have their quotes escaped, so only a key of the body looks like this."""
_STARTS = (b'"max_', b'"num_predict')


def estimated_tokens(request: Request) -> tuple[int, int]:
    """Input and output tokens."""
    return min(len(request.body) // BYTES_PER_TOKEN + 1, MAX_INPUT_TOKENS), _output_tokens(request)


def _output_tokens(request: Request) -> int:
    if request.loads_only or request.endpoint.operation is Operation.EMBEDDING:
        return 0
    body = request.body
    named = _named(body, 0, LOOK_BYTES)
    if named is None and len(body) > LOOK_BYTES:
        named = _named(body, len(body) - LOOK_BYTES, len(body))
    return int(named.group(1)) if named else OUTPUT_TOKENS


def _named(body: bytes, begin: int, end: int) -> re.Match[bytes] | None:
    """The first of the names in a part of the body. Their beginnings are looked for first: a pattern takes longer."""
    for start in _STARTS:
        at = body.find(start, begin, end)
        if at >= 0 and (found := _NAMED.match(body, at) or _NAMED.search(body, at, end)):
            return found
    return None
