"""Frames as bytes, held against the driver's own; and lanes, fed in pieces of any size."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

import pamqp.frame
from hypothesis import given
from hypothesis import strategies as st
from pamqp.body import ContentBody
from pamqp.commands import Basic, Channel
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from sutazai.adapters.rabbitmq import frames
from sutazai.adapters.rabbitmq.express import ALIVE_S, Lane, Sorter

MAX_FRAME_BYTES = 64
tags = st.integers(1, 2**63 - 1)
names = st.text(min_size=1, max_size=60).filter(lambda name: len(name.encode()) <= 255)


def read(data: bytes) -> list[tuple[int, Any]]:
    """Channel and frame, as the driver reads them."""
    found = []
    while data:
        size, channel, frame = pamqp.frame.unmarshal(data)
        found.append((channel, frame))
        data = data[size:]
    return found


@given(st.integers(1, 2047), names, st.binary(max_size=300), st.integers(0, 255))
def test_a_published_message_reads_as_the_driver_reads_it(channel: int, queue: str, body: bytes, priority: int) -> None:
    data = frames.publish(channel, queue, body, priority=priority, max_frame_bytes=MAX_FRAME_BYTES)

    (first, method), (second, header), *pieces = read(data)

    assert {first, second, *(number for number, _ in pieces)} == {channel}
    assert (method.name, method.exchange, method.routing_key) == ("Basic.Publish", "", queue)
    assert (method.mandatory, method.immediate) == (True, False)
    assert (header.body_size, header.properties.delivery_mode, header.properties.priority) == (len(body), 2, priority)
    assert b"".join(piece.value for _, piece in pieces) == body
    assert all(len(piece.value) <= MAX_FRAME_BYTES - 8 for _, piece in pieces)


@given(tags, st.booleans())
def test_what_is_said_of_a_delivery_reads_as_the_driver_reads_it(tag: int, is_multiple: bool) -> None:
    ((_, done),) = read(frames.acknowledge(7, tag, is_multiple=is_multiple))
    ((_, back),) = read(frames.hand_back(7, tag, is_multiple=is_multiple))

    assert (done.name, done.delivery_tag, done.multiple) == ("Basic.Ack", tag, is_multiple)
    assert (back.name, back.delivery_tag, back.multiple, back.requeue) == ("Basic.Nack", tag, is_multiple, True)


def delivery(channel: int, tag: int, body: bytes, *, is_redelivered: bool = False, headers: Any = None) -> bytes:
    """Frames as a broker sends them, the body in pieces."""
    header = ContentHeader(body_size=len(body), properties=Basic.Properties(delivery_mode=2, headers=headers))
    pieces = [ContentBody(body[at : at + 5]) for at in range(0, len(body), 5)]
    whole: list[Any] = [Basic.Deliver("ctag1.x", tag, is_redelivered, "", "tasks"), header, *pieces]
    return b"".join(pamqp.frame.marshal(frame, channel) for frame in whole)


def returned(channel: int, queue: str, body: bytes) -> bytes:
    """Frames of a message that no queue took."""
    header = ContentHeader(body_size=len(body), properties=Basic.Properties())
    whole: list[Any] = [Basic.Return(312, "NO_ROUTE", "", queue), header, *([ContentBody(body)] if body else [])]
    return b"".join(pamqp.frame.marshal(frame, channel) for frame in whole)


class FakeChannel:
    """Number and sizes."""

    number = 3
    max_content_size = 100
    CONTENT_FRAME_SIZE = 8


class Heard:
    """A sorter with one lane, and what came where."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.sorter = Sorter(loop)
        self.lane = self.sorter.lanes[3] = Lane(cast("Any", FakeChannel()), cast("Any", None))
        self.told: list[object] = []
        self.lane.on_arrival = self.lane.on_settled = self.lane.on_returned = self.told.append

    def feed(self, data: bytes, cuts: list[int]) -> None:
        """Give it in pieces."""
        places = sorted({0, *(cut % (len(data) + 1) for cut in cuts), len(data)})
        for begins, ends in itertools.pairwise(places):
            self.sorter.feed_data(data[begins:ends])

    async def for_driver(self) -> list[tuple[int, Any]]:
        """All that the driver has to read."""
        self.sorter.feed_eof()
        return read(await self.sorter.read())


@given(st.lists(st.integers(0, 10**6), max_size=20), st.binary(max_size=23))
def test_a_lane_takes_its_frames_and_leaves_the_others_however_they_come(cuts: list[int], body: bytes) -> None:
    data = b"".join(
        (
            pamqp.frame.marshal(Channel.OpenOk(), 3),
            delivery(3, 1, body, is_redelivered=True, headers={"x-delivery-count": 2}),
            delivery(4, 1, b"of another channel"),
            pamqp.frame.marshal(Basic.Ack(8, True), 3),
            returned(3, "gone", body),
            pamqp.frame.marshal(Basic.Nack(9), 3),
            pamqp.frame.marshal(Basic.CancelOk("ctag1.x"), 3),
        )
    )

    async def run() -> tuple[list[object], list[tuple[int, Any]]]:
        heard = Heard(asyncio.get_running_loop())
        heard.feed(data, cuts)
        return heard.told, await heard.for_driver()

    told, for_driver = asyncio.run(run())

    (arrival, *others) = told
    assert isinstance(arrival, frames.Arrival)
    assert (arrival.tag, arrival.is_redelivered, arrival.body) == (1, True, body)
    assert arrival.headers == {"x-delivery-count": 2}
    assert others == [
        frames.Settled(8, has_kept=True, is_multiple=True),
        frames.Returned("gone", body),
        frames.Settled(9, has_kept=False, is_multiple=False),
    ]
    assert [frame.name for channel, frame in for_driver if channel == 3] == ["Channel.OpenOk", "Basic.CancelOk"]
    assert [frame.name for channel, frame in for_driver if channel == 4][:2] == ["Basic.Deliver", "ContentHeader"]


async def test_the_driver_hears_that_the_node_lives_while_lanes_alone_are_busy() -> None:
    heard = Heard(asyncio.get_running_loop())
    now = [ALIVE_S]
    heard.sorter.clock = lambda: now[0]

    for _ in range(3):
        heard.sorter.feed_data(delivery(3, 1, b"x"))
    now[0] += ALIVE_S
    heard.sorter.feed_data(delivery(3, 2, b"y"))

    assert [type(frame) for _, frame in await heard.for_driver()] == [Heartbeat, Heartbeat]
    assert len(heard.told) == 4


async def test_a_server_of_another_version_is_heard_by_the_driver() -> None:
    heard = Heard(asyncio.get_running_loop())

    heard.sorter.feed_data(b"AMQP\x00\x01\x00\x00")
    heard.sorter.feed_eof()

    assert await heard.sorter.read() == b"AMQP\x00\x01\x00\x00"


def test_a_message_without_headers_has_none() -> None:
    data = delivery(1, 5, b"")
    found, _ = frames.frames_of(data)
    (_, _, begins, ends), (_, _, header, header_ends) = found

    arrival = frames.delivered(data[begins:ends], data[header:header_ends], b"")

    assert (arrival.headers, arrival.tag, arrival.is_redelivered) == ({}, 5, False)


async def test_a_connection_without_a_lane_leaves_everything_to_the_driver() -> None:
    sorter = Sorter(asyncio.get_running_loop())
    data = delivery(3, 1, b"whole") + pamqp.frame.marshal(Basic.Ack(1), 3)

    sorter.feed_data(data[:9])
    sorter.feed_data(data[9:])
    sorter.feed_eof()

    assert await sorter.read() == data
