"""
What is told to whoever reads the stream `agent_coordination`, and how far it was told.

A message of the stream is a few notices, each a line of JSON with a `type`. Notices of one type and
shard come in the order of their positions; some come twice, so a reader passes over those whose position is not past
the highest that it knows. When a tenant was moved to another shard, its notices come again from there, in their order
as well: whoever minds that knows events by task and version, and messages by tenant, name and number.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import msgspec


class Source(enum.StrEnum):
    """What is carried; each has positions and an order of its own."""

    EVENTS = "events"
    """What happened to tasks."""
    MESSAGES = "messages"
    """What agents told each other."""


class EventNotice(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="event"):
    """An event of a task; task and version name it once and for all."""

    position: int
    task: str
    version: int
    tenant: str
    kind: str
    schema: int
    at: datetime
    shard: str = ""
    """Where it is kept; empty where there are none."""
    data: msgspec.Raw
    """`null` where it is too large; `GET /v1/tasks/{id}/events` has it."""


class MessageNotice(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """A message of an agent's; tenant, name and number name it once and for all."""

    position: int
    number: int = 0
    """Grows among those to one name of its tenant, wherever they are kept; 0 in what older programs have told."""
    tenant: str
    to: str
    sender: str
    """The task that sent it."""
    at: datetime
    shard: str = ""
    """As with events."""
    body: msgspec.Raw


Notice = EventNotice | MessageNotice
LEFT_OUT = msgspec.Raw(b"null")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Notices in the order of their positions."""

    notices: Sequence[Notice]
    newest: int
    """The highest position of all; there may be none with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """How far a source was told, and by whom."""

    position: int
    """All up to here were told."""
    fence: int
    """Who carries, or carried last: each has a higher number than those before."""
    beat: int
    """Grows while the carrier lives; 0 = nobody carries."""


class BroadcastStore(Protocol):
    """Notices that are kept in one database, and how far they were told. Methods raise `StoreUnavailable`."""

    @property
    def shard(self) -> str:
        """Which database; empty where there is one."""

    async def notices(self, source: Source, *, after: int, limit: int) -> Page:
        """Those past that position, and only those before which none can come."""

    async def turn(self, source: Source) -> Turn:
        """How it stands."""

    async def take(self, source: Source, seen: Turn) -> Turn | None:
        """Carry from now on, in place of whom was seen; None where somebody else was faster."""

    async def advance(self, source: Source, fence: int, position: int) -> bool:
        """All up to that position were told, and the carrier lives; False where another one carries by now."""

    async def leave(self, source: Source, fence: int) -> None:
        """Let another carry at once."""


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Notice)


def encode(notices: Iterable[Notice], *, max_bytes: int) -> Iterator[bytes]:
    """Messages of so many bytes at most, or of one notice that is longer."""
    part: list[bytes] = []
    size = 0
    for notice in map(_encoder.encode, notices):
        if part and size + len(notice) >= max_bytes:
            yield b"\n".join(part)
            part, size = [], 0
        part.append(notice)
        size += len(notice) + 1
    if part:
        yield b"\n".join(part)


class Unseen:
    """Passes over what a reader was told before."""

    def __init__(self) -> None:
        self._highest: dict[tuple[type[Notice], str], int] = {}

    def notices_of(self, message: bytes) -> Sequence[Notice]:
        """The notices of a message of the stream that are new. Raises `msgspec.DecodeError` where it is none."""
        found = []
        for notice in _decoder.decode_lines(message):
            source = type(notice), notice.shard
            if notice.position > self._highest.get(source, 0):
                self._highest[source] = notice.position
                found.append(notice)
        return found
