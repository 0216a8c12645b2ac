"""
The bytes that every part of the benchmark agrees on.

Only standard fields of the OpenAI API carry the parameters of a stream, because some gateways drop the fields
they do not know: `max_tokens` is the number of events and `user` the milliseconds between two of them. (A `seed`
would make the request deterministic, and all streams one.)
"""

from __future__ import annotations

import json
import re

import msgspec

CHAT_PATH = "/v1/chat/completions"
MODEL = "bench"
SMALL_BYTES = 399
LARGE_BYTES = 64 * 1024
REPLY_BYTES = 592

STAMP = re.compile(rb'"content": ?"(\d{19})"')
"""Finds the time of sending (monotonic nanoseconds) in an event, also in one that a gateway wrote anew."""


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """What each load prints when it is over, as one line of JSON."""

    count: int
    """Requests answered, or events received, from the first to the last."""
    failed: int
    """Requests refused, cut short or never answered."""
    wall_s: float
    rate_per_s: float
    """Of the time when all connections were open."""
    p50_ms: float
    p99_ms: float


_SENTENCE = 'A node that is free and has the model warm answers first; "slots" says how many.\n'


def chat_body(size_bytes: int, *, temperature: float = 0.2) -> bytes:
    """A chat request of exactly that size, with line ends and quotes in its prompt as real ones have."""
    room = size_bytes - len(_chat_json("", temperature))
    sentences, rest = divmod(room, len(json.dumps(_SENTENCE)) - 2)
    return _chat_json(_SENTENCE * sentences + "." * rest, temperature)


def _chat_json(prompt: str, temperature: float) -> bytes:
    messages = [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": prompt},
    ]
    return json.dumps({"model": MODEL, "messages": messages, "temperature": temperature, "max_tokens": 64}).encode()


def stream_body(*, events: int, interval_ms: int) -> bytes:
    """A request for a stream of so many events, the first at once."""
    messages = [{"role": "user", "content": "Tell me the time, again and again."}]
    fields = {"model": MODEL, "messages": messages, "max_tokens": events, "user": str(interval_ms), "stream": True}
    return json.dumps(fields).encode()


def request_bytes(body: bytes, *, port: int, key: str, path: str = CHAT_PATH) -> bytes:
    """A whole HTTP request for a client that writes to its socket itself."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def chat_reply() -> bytes:
    """The stub node's answer to a chat that is not streamed."""

    def filled(text: str) -> bytes:
        message = {"role": "assistant", "content": text}
        fields = {
            "id": "chatcmpl-bench",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 71, "completion_tokens": 64, "total_tokens": 135},
        }
        return json.dumps(fields).encode()

    return filled("x" * (REPLY_BYTES - len(filled(""))))


def percentile(values: list[float], share: float) -> float:
    """The value that `share` (0 to 1) of them do not pass; 0 where there are none."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0
