"""
Whether a body that ended properly as HTTP is a complete answer.

Nodes tell of trouble inside of a stream that began well, as an event or a line, and then end it as if nothing were.
Such a stream passes to the client who asked for it, but nobody else is to get it.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from sutazai.core.request import Dialect, Endpoint

_DONE: Final = b"data: [DONE]"
_SSE_ERROR: Final = re.compile(rb'(?:^|\n)(?:data:\s*\{\s*"error"\s*:|event:\s*error)')
_BROKEN_OFF: Final = re.compile(rb'"(?:finish_reason|done_reason)"\s*:\s*"(?:error|abort|cancelled)"')
_ERROR_FIRST: Final = re.compile(rb'(?:\A|\n)\s*\{\s*"error"\s*:')


class _LastLine(msgspec.Struct):
    done: bool = False
    error: msgspec.Raw = msgspec.Raw()


_last_line = msgspec.json.Decoder(_LastLine)


def is_complete(endpoint: Endpoint, body: bytes, *, is_stream: bool) -> bool:
    """Whether the whole `body` of an answer with a good status is one without an error and with its proper end."""
    if not body or _tells_trouble(body):
        return False
    if not is_stream:
        return True
    if endpoint.dialect is Dialect.OPENAI:
        return body.rstrip().endswith(_DONE)
    return _ends_well(body.rstrip())


def _tells_trouble(body: bytes) -> bool:
    # mostly none of these words is there, and to search for a word costs a tenth of a pattern
    if not (b'"error"' in body or b'"abort"' in body or b'"cancelled"' in body or b"event: error" in body):
        return False
    return any(pattern.search(body) is not None for pattern in (_BROKEN_OFF, _SSE_ERROR, _ERROR_FIRST))


def _ends_well(lines: bytes) -> bool:
    """Whether the last line of an Ollama stream says that it is the last."""
    try:
        last = _last_line.decode(lines[lines.rfind(b"\n") + 1 :])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return last.done and not last.error
