"""
A model server without a model, far faster than any gateway: `python -m bench.stub_node PORT [PORT ...]`.

It answers every chat with the same reply, or with a stream whose events carry the time they were sent. One
timer serves all streams: a wheel with a slot for each millisecond, so that a thousand of them cost no more
than their writes. It trusts its clients and is for loopback only.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import cast

import uvloop

from bench.payload import CHAT_PATH, MODEL, chat_reply

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_STREAM = re.compile(rb'"stream": ?true')
_EVENTS = re.compile(rb'"max_tokens": ?(\d+)')
_INTERVAL = re.compile(rb'"user": ?"(\d+)"')
_SLOTS = 1000


def _answer(status: str, fields: Mapping[str, object] | bytes) -> bytes:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(delta: Mapping[str, str], **more: object) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": None}] if delta else []
    fields = {
        "id": "chatcmpl-bench",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": MODEL,
    }
    return b"data: " + json.dumps({**fields, "choices": choices, **more}).encode() + b"\n\n"


_CHAT = _answer("200 OK", chat_reply())
_MODELS = _answer(
    "200 OK",
    {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "bench"}]},
)
_MISSING = _answer("404 Not Found", {"error": {"message": "nothing here"}})
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_BEFORE_STAMP, _AFTER_STAMP = _http_chunk(_event({"content": "0" * 19})).split(b"0" * 19)
_USAGE = {"prompt_tokens": 12, "completion_tokens": 64, "total_tokens": 76}
_STREAM_END = _http_chunk(_event({}, usage=_USAGE)) + _http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Wheel:
    """When the next event of each stream is due. It turns only while there are streams."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: list[list[StubProtocol]] = [[] for _ in range(_SLOTS)]
        self._now_ms = 0
        self._opened = 0
        self._streams = 0

    def add(self, stream: StubProtocol) -> None:
        """Start a stream. Streams of one interval are spread over it, however close together they began."""
        if self._streams == 0:
            self._now_ms = int(self._loop.time() * 1000)
            self._loop.call_later(0.001, self._turn)
        self._streams += 1
        self._opened += 1
        self._slots[(self._now_ms + 1 + self._opened % stream.interval_ms) % _SLOTS].append(stream)

    def _turn(self) -> None:
        until_ms = int(self._loop.time() * 1000)
        while self._now_ms < until_ms:
            self._now_ms += 1
            slot = self._now_ms % _SLOTS
            due, self._slots[slot] = self._slots[slot], []
            for stream in due:
                if stream.send_event():
                    self._slots[(slot + stream.interval_ms) % _SLOTS].append(stream)
                else:
                    self._streams -= 1
        if self._streams:
            self._loop.call_later(0.001, self._turn)


class StubProtocol(asyncio.Protocol):
    """One connection of a gateway; at most one request at a time."""

    interval_ms = 1
    """Between two events of the stream under way, 1 to 999."""

    def __init__(self, wheel: Wheel) -> None:
        self._wheel = wheel
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._events_left = 0
        self._is_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=64 * 1024)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False

    def data_received(self, data: bytes) -> None:
        if self._received:
            data = self._received + data
        head_end = data.find(b"\r\n\r\n") + 4
        length = _LENGTH.search(data, 0, head_end) if head_end > 4 else None
        if head_end < 4 or len(data) < head_end + (int(length[1]) if length else 0):
            self._received = data
            return
        self._received = b""
        self._reply(data)

    def send_event(self) -> bool:
        """Send the next event; False when the stream is over. A full reader gets it at a later turn."""
        if self._transport is None:
            return False
        if self._is_paused:
            return True
        self._events_left -= 1
        event = b"%b%019d%b" % (_BEFORE_STAMP, time.monotonic_ns(), _AFTER_STAMP)
        self._transport.write(event if self._events_left else event + _STREAM_END)
        return self._events_left > 0

    def _reply(self, request: bytes) -> None:
        assert self._transport is not None
        if not request.startswith(b"POST " + CHAT_PATH.encode()):
            is_known = request.startswith((b"GET /v1/models", b"GET /health"))
            self._transport.write(_MODELS if is_known else _MISSING)
        elif (field_at := request.find(b'"stream"')) >= 0 and _STREAM.match(request, field_at):
            # The plain search comes first: over 64 KiB it is far faster than the pattern.
            self._start_stream(request)
        else:
            self._transport.write(_CHAT)

    def _start_stream(self, request: bytes) -> None:
        assert self._transport is not None
        events, interval_ms = _EVENTS.search(request), _INTERVAL.search(request)
        self._events_left = int(events[1]) if events else 1
        self.interval_ms = int(interval_ms[1]) if interval_ms else 1
        # Head and first event leave together: what is timed is the gateway, not a second packet.
        self._transport.write(_STREAM_HEAD)
        if self.send_event():
            self._wheel.add(self)


async def serve(ports: Sequence[int]) -> None:
    """Answer on these ports until cancelled."""
    loop = asyncio.get_running_loop()
    wheel = Wheel(loop)
    for port in ports:
        await loop.create_server(lambda: StubProtocol(wheel), "127.0.0.1", port, backlog=4096)
    await loop.create_future()


if __name__ == "__main__":
    uvloop.run(serve([int(port) for port in sys.argv[1:]]))
