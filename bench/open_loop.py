"""
Requests at a given rate, whether or not answers keep up: `python -m bench.open_loop '{"port": ...}'`.

wrk sends the next request when an answer came, which hides waiting. Here each has a time at which it is due
(Poisson arrivals, a fixed seed), and its latency counts from then. A plain `select` on an epoll: its timeout is
exact to microseconds, where those of event loops are to milliseconds.
"""

from __future__ import annotations

import random
import re
import select
import socket
import sys
import time
from collections import deque

import msgspec

from bench.payload import CHAT_PATH, SMALL_BYTES, LoadResult, chat_body, percentile, request_bytes

_ANSWER_LIMIT_S = 10.0
_MAX_WAITING = 20_000
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class RateLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What to send."""

    port: int
    key: str
    rate_per_s: float
    seconds: float
    connections: int = 64
    path: str = CHAT_PATH
    body: str = ""
    """Empty: a small chat."""


class OpenLoop:
    """The requests that are due, under way and answered."""

    def __init__(self, load: RateLoad) -> None:
        body = load.body.encode() or chat_body(SMALL_BYTES)
        self._request = request_bytes(body, port=load.port, key=load.key, path=load.path)
        self._idle = [
            socket.create_connection(("127.0.0.1", load.port), timeout=_ANSWER_LIMIT_S) for _ in range(load.connections)
        ]
        self._by_number = {connection.fileno(): connection for connection in self._idle}
        self._answers = select.epoll(load.connections)
        for number in self._by_number:
            self._answers.register(number, select.EPOLLIN)
        self._busy: dict[socket.socket, float] = {}
        self._partial: dict[socket.socket, bytes] = {}
        self._waiting: deque[float] = deque()
        self._latencies_ms: list[float] = []
        self._failed = 0
        self._load = load

    def run(self) -> LoadResult:
        """Send for `seconds`, then wait for what is still under way, but not for long."""
        arrivals = random.Random(self._load.port)
        began_at = now = due_at = time.monotonic()
        end_at = began_at + self._load.seconds
        while now < end_at or ((self._busy or self._waiting) and now < end_at + _ANSWER_LIMIT_S):
            while due_at <= min(now, end_at) and len(self._waiting) < _MAX_WAITING:
                self._waiting.append(due_at)
                due_at += arrivals.expovariate(self._load.rate_per_s)
            self._send_waiting()
            # Nothing more is due at the end, or while too many wait: then only answers are of interest.
            pause_s = due_at - now if due_at > now else 0.01
            ready, _, _ = select.select([self._answers], [], [], min(pause_s, 0.1))
            for number, _ in self._answers.poll(0) if ready else ():
                self._receive(self._by_number[number])
            now = time.monotonic()
        return self._result(now - began_at)

    def _send_waiting(self) -> None:
        while self._waiting and self._idle:
            connection = self._idle.pop()
            connection.sendall(self._request)
            self._busy[connection] = self._waiting.popleft()

    def _receive(self, connection: socket.socket) -> None:
        received = connection.recv(65536)
        answer = self._partial.pop(connection, b"") + received
        if received and not _is_complete(answer):
            self._partial[connection] = answer
            return
        if not received:
            self._answers.unregister(connection)
        due_at = self._busy.pop(connection, None)
        if due_at is None:  # closed while nothing was asked
            self._idle.remove(connection)
            return
        self._latencies_ms.append((time.monotonic() - due_at) * 1000)
        self._failed += not answer.startswith(b"HTTP/1.1 2")
        if received:
            self._idle.append(connection)

    def _result(self, wall_s: float) -> LoadResult:
        return LoadResult(
            count=len(self._latencies_ms),
            failed=self._failed + len(self._busy) + len(self._waiting),
            wall_s=wall_s,
            rate_per_s=len(self._latencies_ms) / wall_s,
            p50_ms=percentile(self._latencies_ms, 0.5),
            p99_ms=percentile(self._latencies_ms, 0.99),
        )


def _is_complete(answer: bytes) -> bool:
    head_end = answer.find(b"\r\n\r\n") + 4
    if head_end < 4:
        return False
    length = _LENGTH.search(answer, 0, head_end)
    if length is None:
        return answer.endswith(b"\r\n0\r\n\r\n")
    return len(answer) >= head_end + int(length[1])


if __name__ == "__main__":
    print(msgspec.json.encode(OpenLoop(msgspec.json.decode(sys.argv[1], type=RateLoad)).run()).decode())
