"""
A short way for the frames that come by the thousand, beside the driver on the same connection.

The driver opens connections and channels, answers heartbeats and hears of trouble. Between it and the socket stands a
reader that looks at each frame: confirms, deliveries and returned messages of a channel with a lane go there, all
others to the driver. What a lane writes goes whole to the same transport, so it never comes in between the frames of
one message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex

from aiormq import SSLContextProvider, TransportFactory
from aiormq.channel import Channel
from yarl import URL

from sutazai.adapters.rabbitmq import frames
from sutazai.adapters.rabbitmq.frames import Arrival, Returned, Settled

ALIVE_S = 1.0
"""How often the driver is told that the node lives, while it is lanes alone that hear of it."""


class Lane:
    """The frames of one channel. Whoever opened the channel says who is told of what."""

    def __init__(self, channel: Channel, writer: asyncio.StreamWriter) -> None:
        self.on_arrival: Callable[[Arrival], object] = _ignored
        self.on_settled: Callable[[Settled], object] = _ignored
        self.on_returned: Callable[[Returned], object] = _ignored
        self.published = 0
        """Messages, which is the number of the last one too."""
        self._number = channel.number
        self._max_frame_bytes = channel.max_content_size + channel.CONTENT_FRAME_SIZE
        self._writer = writer
        self._method = b""
        """Whose content has not come whole yet."""
        self._header = b""
        self._left_bytes = 0
        self._pieces: list[bytes] = []

    def publish(self, messages: Sequence[tuple[str, bytes, int]]) -> range:
        """Write messages, each with its queue and priority; their numbers. Returns before any is confirmed."""
        written = b"".join(
            frames.publish(self._number, queue, body, priority=priority, max_frame_bytes=self._max_frame_bytes)
            for queue, body, priority in messages
        )
        first = self.published + 1
        self.published += len(messages)
        self._writer.write(written)
        return range(first, self.published + 1)

    def acknowledge(self, tags: Sequence[tuple[int, bool]]) -> None:
        """Deliveries are dealt with; where the second is true, all up to that one."""
        self._writer.write(b"".join(frames.acknowledge(self._number, tag, is_multiple=up_to) for tag, up_to in tags))

    def hand_back(self, tags: Sequence[tuple[int, bool]]) -> None:
        """Deliveries are for somebody else; where the second is true, all up to that one."""
        self._writer.write(b"".join(frames.hand_back(self._number, tag, is_multiple=up_to) for tag, up_to in tags))

    def take(self, kind: int, payload: bytes) -> bool:
        """Take a frame of this channel; False where it is the driver's."""
        if kind == frames.METHOD:
            return self._take_method(payload)
        if not self._method:
            return False
        if kind == frames.HEADER:
            self._header, self._left_bytes = payload, frames.body_size_of(payload)
        else:
            self._pieces.append(payload)
            self._left_bytes -= len(payload)
        if self._left_bytes <= 0:
            self._tell()
        return True

    def _take_method(self, payload: bytes) -> bool:
        self._method = b""
        match frames.method_of(payload):
            case frames.ACK | frames.NACK:
                self.on_settled(frames.settled(payload))
            case frames.DELIVER | frames.RETURN:
                self._method = payload
            case _:
                return False
        return True

    def _tell(self) -> None:
        method, self._method = self._method, b""
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        if frames.method_of(method) == frames.DELIVER:
            self.on_arrival(frames.delivered(method, self._header, body))
        else:
            self.on_returned(frames.returned(method, body))


class Express(TransportFactory):
    """Makes the transport of one connection, and lanes on it."""

    def __init__(self) -> None:
        self._sorter: Sorter | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **known: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """What the driver reads from and writes to."""
        provider: SSLContextProvider = known.pop("ssl_context_provider")
        context = await provider.get_context() if url.scheme == "amqps" else None
        loop = asyncio.get_running_loop()
        sorter = Sorter(loop)
        protocol = asyncio.StreamReaderProtocol(sorter, loop=loop)
        transport, _ = await loop.create_connection(
            lambda: protocol, url.host or "", url.port or 0, ssl=context, **known
        )
        self._sorter = sorter
        self._writer = asyncio.StreamWriter(transport, protocol, sorter, loop)
        return sorter, self._writer

    def lane(self, channel: Channel) -> Lane:
        """The lane of a channel of this connection."""
        if self._sorter is None or self._writer is None:
            raise RuntimeError("the connection was not opened")
        lane = self._sorter.lanes[channel.number] = Lane(channel, self._writer)
        return lane


class Sorter(asyncio.StreamReader):
    """What the driver reads: all that comes but what lanes take."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.lanes: dict[int, Lane] = {}
        self.clock = loop.time
        self._rest = b""
        """The beginning of a frame."""
        self._told_at = 0.0
        self._has_begun = self._is_foreign = False

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        come = bytes(data)
        if not self._has_begun:
            self._has_begun = True
            self._is_foreign = come[:1] == frames.GREETING[:1]
        if self._is_foreign:  # a server of another version names its own, in no frame
            super().feed_data(come)
            return
        come = self._rest + come if self._rest else come
        found, end = frames.frames_of(come)
        self._rest = come[end:]
        for_driver = []
        for kind, channel, begins, ends in found:
            lane = self.lanes.get(channel)
            if lane is None or not lane.take(kind, come[begins:ends]):
                for_driver.append(come[begins - frames.START_BYTES : ends + 1])
        now = self.clock()
        if found and not for_driver and now - self._told_at >= ALIVE_S:
            for_driver.append(frames.HEARTBEAT)
        if for_driver:
            self._told_at = now
            super().feed_data(b"".join(for_driver))


def _ignored(_: object) -> None:
    """Nobody wanted to know."""
