"""
The frames of AMQP 0-9-1 that come and go by the thousand, as bytes: pure, and nothing of the rest of the protocol.

The driver writes and reads each of them through tasks, futures and objects of its own, which costs more than
everything else that is done for a task. What is here is used for publishing, confirms, deliveries and acknowledgements.

Source: AMQP 0-9-1, sections 2.3.5 and 4.2; RabbitMQ's extensions for `basic.nack`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pamqp.header import ContentHeader

GREETING = b"AMQP"
METHOD, HEADER, BODY = 1, 2, 3
END = b"\xce"
HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"
RETURN, DELIVER, ACK, NACK = (60 << 16 | number for number in (50, 60, 80, 120))
"""Class and method in one number."""

_START = struct.Struct(">BHL")
START_BYTES = _START.size
"""Before the payload of a frame; one byte follows it."""
_METHOD = struct.Struct(">L")
_SETTLED = struct.Struct(">QB")
_DELIVERED = struct.Struct(">QB")
_CONTENT = struct.Struct(">HHQ")
_PUBLISH_FLAGS = 0x1800
"""Properties that a published message has: how it is kept, and its priority."""
_HAS_HEADERS = 0x20
"""In the first byte of these flags."""
PERSISTENT = 2
_MANDATORY = 1


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message that was delivered."""

    tag: int
    """The number of the delivery on its channel."""
    is_redelivered: bool
    header: bytes
    """Of its content, as it came."""
    body: bytes

    @property
    def headers(self) -> dict[str, Any]:
        """The headers among its properties."""
        if not self.header[12] & _HAS_HEADERS:
            return {}
        content = ContentHeader()
        content.unmarshal(self.header)
        return dict(content.properties.headers or {})


@dataclass(frozen=True, slots=True)
class Settled:
    """A broker's word about messages that were published."""

    tag: int
    """The number of the message on its channel."""
    has_kept: bool
    is_multiple: bool
    """All up to this number are meant."""


@dataclass(frozen=True, slots=True)
class Returned:
    """A message that no queue took; its confirm follows."""

    queue: str
    body: bytes


def frames_of(data: bytes) -> tuple[list[tuple[int, int, int, int]], int]:
    """
    Where the whole frames are.

    Returns:
        Of each its kind, its channel, and where its payload begins and ends; and where the first begins that is not
        whole.
    """
    found, at, size = [], 0, len(data)
    while size - at >= START_BYTES:
        kind, channel, length = _START.unpack_from(data, at)
        end = at + START_BYTES + length
        if end >= size:
            break
        found.append((kind, channel, at + START_BYTES, end))
        at = end + 1
    return found, at


def method_of(payload: bytes) -> int:
    """Class and method of a method frame."""
    number: int = _METHOD.unpack_from(payload)[0]
    return number


def settled(payload: bytes) -> Settled:
    """What a `basic.ack` or `basic.nack` says."""
    tag, flags = _SETTLED.unpack_from(payload, 4)
    return Settled(tag, method_of(payload) == ACK, bool(flags & 1))


def delivered(payload: bytes, header: bytes, body: bytes) -> Arrival:
    """The message of a `basic.deliver` and its content."""
    tag, flags = _DELIVERED.unpack_from(payload, 5 + payload[4])
    return Arrival(tag, bool(flags & 1), header, body)


def returned(payload: bytes, body: bytes) -> Returned:
    """The message of a `basic.return` and its content."""
    at = 6
    for _ in range(2):  # what was wrong with it, and its exchange
        at += 1 + payload[at]
    return Returned(payload[at + 1 : at + 1 + payload[at]].decode(), body)


def body_size_of(header: bytes) -> int:
    """How many bytes follow a content header."""
    size: int = _CONTENT.unpack_from(header)[2]
    return size


def publish(channel: int, queue: str, body: bytes, *, priority: int, max_frame_bytes: int) -> bytes:
    """A message to a queue, to be kept on disk, and returned where there is no such queue."""
    name = queue.encode()
    if len(name) > 255:
        raise ValueError(f"The name of the queue {queue[:64]!r} was longer than 255 bytes.")
    method = struct.pack(">LHBB", 60 << 16 | 40, 0, 0, len(name)) + name + bytes((_MANDATORY,))
    header = _CONTENT.pack(60, 0, len(body)) + struct.pack(">HBB", _PUBLISH_FLAGS, PERSISTENT, priority)
    parts = [_frame(METHOD, channel, method), _frame(HEADER, channel, header)]
    parts += (_frame(BODY, channel, piece) for piece in _pieces(body, max_frame_bytes - START_BYTES - 1))
    return b"".join(parts)


def acknowledge(channel: int, tag: int, *, is_multiple: bool) -> bytes:
    """A delivery, or all up to it, is dealt with."""
    return _frame(METHOD, channel, _METHOD.pack(ACK) + _SETTLED.pack(tag, is_multiple))


def hand_back(channel: int, tag: int, *, is_multiple: bool) -> bytes:
    """A delivery, or all up to it, is for somebody else."""
    return _frame(METHOD, channel, _METHOD.pack(NACK) + _SETTLED.pack(tag, is_multiple | 2))


def _frame(kind: int, channel: int, payload: bytes) -> bytes:
    return b"".join((_START.pack(kind, channel, len(payload)), payload, END))


def _pieces(body: bytes, size: int) -> Iterator[bytes]:
    return (body[at : at + size] for at in range(0, len(body), size))
