"""
How an error looks in each dialect, and how to read one that a node sent.

Which status and which kind belong to which error is not decided here: see `edge/errors.py`.
"""

from __future__ import annotations

from typing import Final

import msgspec

from sutazai.core.request import Dialect, Place

MAX_MESSAGE_CHARACTERS: Final = 2000

_NO_MESSAGE: Final = "The node sent an error without a message; its log may tell more."
_REPLACED: Final = "\N{REPLACEMENT CHARACTER}"
_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder()


def error_body(dialect: Dialect, status: int, message: str, *, kind: str, where: str | None) -> bytes:
    """
    The body of an error answer.

    Args:
        dialect: the client's.
        status: the HTTP status; OpenAI clients also find it in `code`, as text.
        message: a sentence for people.
        kind: a word for programs, such as `invalid_request_error`; Ollama has no place for it.
        where: the JSON path of the field at fault; Ollama has no place for it.
    """
    if dialect is Dialect.OLLAMA:
        return _encode({"error": _writable(message)})
    fault = {
        "message": _writable(message),
        "type": kind,
        "param": where and _writable(where),
        "code": str(status),
    }
    return _encode({"error": fault})


def stream_error(dialect: Dialect, status: int, message: str, kind: str) -> bytes:
    """The last thing in a stream that broke off: one SSE event, or one line of JSON."""
    body = error_body(dialect, status, message, kind=kind, where=None)
    return body + b"\n" if dialect is Dialect.OLLAMA else b"data: " + body + b"\n\n"


def keep_alive(dialect: Dialect, place: Place | None = None) -> bytes:
    """
    What a client skips and a load balancer counts as life; for people who look, its place in line.

    Ollama's clients parse every line, so an empty one would break them; white space before a line does not.
    """
    if dialect is Dialect.OLLAMA:
        return b" "
    if place is None:
        return b": waiting\n\n"
    eta = "" if place.eta_s is None else f", about {place.eta_s:.0f} s"
    return f": waiting, position {place.position}{eta}\n\n".encode()


def error_message(body: bytes) -> str:
    """
    The sentence in a node's error, whichever of the usual forms it has; at most 2,000 characters.

    Known are `{"error": {"message"}}`, `{"error": "..."}`, `{"message"}` and `{"detail"}`; plain text is
    taken as it is. An empty body, a page of HTML or bytes that are no text give a general sentence.
    """
    try:
        found = _sentence(_decoder.decode(body))
    except RecursionError:
        found = ""
    except (msgspec.DecodeError, UnicodeDecodeError):
        found = _plain_text(body)
    return (found or _NO_MESSAGE)[:MAX_MESSAGE_CHARACTERS]


def _sentence(value: object) -> str:
    """The first text on the way that errors take through JSON; empty where there is none."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return next((text for text in map(_sentence, value) if text), "")
    if not isinstance(value, dict):
        return ""
    texts = (_sentence(value[key]) for key in ("error", "message", "detail", "msg") if key in value)
    return next((text for text in texts if text), "")


def _plain_text(body: bytes) -> str:
    """The text in bytes that are no JSON; empty for HTML and for what is no text."""
    text = body[: 4 * MAX_MESSAGE_CHARACTERS].decode(errors="replace").rstrip(_REPLACED).strip()
    if text.startswith("<") or _REPLACED in text or not "".join(text.split()).isprintable():
        return ""
    return text


def _writable(text: str) -> str:
    """Text without the lone surrogates that JSON in UTF-8 cannot hold."""
    return text.encode(errors="replace").decode()
