"""
Many streams at once, and when each of their events came: `python -m bench.stream_client '{"port": ...}'`.

The parameter is a `StreamLoad` as JSON. A stream that ends is opened again until the time is over. Answers
are not parsed: ends of events are counted and stamps looked up, so one core can serve this client, the stub
node and 50,000 events a second.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import suppress
from typing import cast

import msgspec
import uvloop

from bench.payload import STAMP, LoadResult, percentile, request_bytes, stream_body

_OPENED_AT_ONCE = 25
_OPENING_LIMIT_S = 15.0


class StreamLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What to open."""

    port: int
    key: str
    streams: int
    events: int
    """Of each stream."""
    interval_ms: int
    seconds: float
    """How long to count, from the moment that every stream is open."""
    is_timing_events: bool = False
    """
    Time each event from the node's sending to its arrival here, not the first ones from their requests on.

    It costs about as much as receiving one, so not where many are counted.
    """


class Tally:
    """What all streams add to."""

    def __init__(self, load: StreamLoad) -> None:
        self.request = request_bytes(
            stream_body(events=load.events, interval_ms=load.interval_ms), port=load.port, key=load.key
        )
        self.is_timing_events = load.is_timing_events
        self.is_over = False
        self.open = 0
        self.all_open = asyncio.Event()
        self.failed = 0
        self.events = 0
        self.times_ms: list[float] = []
        self._streams = load.streams

    def note_open(self) -> None:
        """One more stream has its first event."""
        self.open += 1
        if self.open == self._streams:
            self.all_open.set()


class StreamProtocol(asyncio.Protocol):
    """One connection, one stream after the other."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._transport: asyncio.Transport | None = None
        self._sent_at = 0.0
        self._has_begun = False
        self._was_open = False
        self._is_ending = False
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._tally.is_over:
            self._tally.failed += 1

    def data_received(self, data: bytes) -> None:
        tally = self._tally
        ends = data.count(b"\n\n") + (data.startswith(b"\n") and self._tail.endswith(b"\n"))
        if not self._has_begun and ends:
            self._begin()
        if tally.is_timing_events:
            now_ns = time.monotonic_ns()
            tally.times_ms.extend((now_ns - int(stamp)) / 1e6 for stamp in STAMP.findall(data))
        tally.events += ends
        self._look_for_end(data)

    def close(self) -> None:
        """Drop the connection, whatever is under way."""
        if self._transport is not None:
            self._transport.abort()

    def _ask(self) -> None:
        assert self._transport is not None
        self._has_begun = self._is_ending = False
        self._tail = b""
        self._sent_at = time.monotonic()
        self._transport.write(self._tally.request)

    def _begin(self) -> None:
        self._has_begun = True
        if not self._tally.is_timing_events:
            self._tally.times_ms.append((time.monotonic() - self._sent_at) * 1000)
        if not self._was_open:
            self._was_open = True
            self._tally.note_open()

    def _look_for_end(self, data: bytes) -> None:
        seam = self._tail + data[-64:]
        self._tail = data[-16:] if len(data) >= 16 else seam[-16:]
        # The last chunk is "0"; a head may end in the same bytes, so the last event must have come before.
        self._is_ending = self._is_ending or b"[DONE]" in seam
        if self._is_ending and self._tail.endswith(b"\r\n0\r\n\r\n") and not self._tally.is_over:
            self._ask()


async def measure(load: StreamLoad) -> LoadResult:
    """Open the streams, count for a while, drop them all. Bounded by the time to open them and `seconds`."""
    tally = Tally(load)
    protocols: list[StreamProtocol] = []
    # What did not open in time is counted as failed below.
    with suppress(TimeoutError):
        async with asyncio.timeout(_OPENING_LIMIT_S):
            await _connect(load, tally, protocols)
            await tally.all_open.wait()
    events_before, began_at = tally.events, time.monotonic()
    tally.times_ms.clear()
    await asyncio.sleep(load.seconds)
    counted_events, wall_s = tally.events - events_before, time.monotonic() - began_at
    tally.is_over = True
    for protocol in protocols:
        protocol.close()
    return LoadResult(
        count=tally.events,
        failed=tally.failed + load.streams - tally.open,
        wall_s=wall_s,
        rate_per_s=counted_events / wall_s,
        p50_ms=percentile(tally.times_ms, 0.5),
        p99_ms=percentile(tally.times_ms, 0.99),
    )


async def _connect(load: StreamLoad, tally: Tally, protocols: list[StreamProtocol]) -> None:
    loop = asyncio.get_running_loop()
    for number in range(load.streams):
        _, protocol = await loop.create_connection(lambda: StreamProtocol(tally), "127.0.0.1", load.port)
        protocols.append(protocol)
        if number % _OPENED_AT_ONCE == 0:
            await asyncio.sleep(0.005)


if __name__ == "__main__":
    result = uvloop.run(measure(msgspec.json.decode(sys.argv[1], type=StreamLoad)))
    print(msgspec.json.encode(result).decode())
