"""
The steps of an answer: all that a fake server does after it has read a request.

The APIs yield the steps of a healthy answer, a `Fault` bends them, the wire plays them. A generator of
steps needs no task, so ten thousand requests cost little, and closing the generator is all that it takes to
drop one.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

JSON_TYPE = "application/json; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Head:
    """The status line and the headers."""

    status: int
    content_type: str
    length: int | None = None
    """What `Content-Length` says; None sends the body in chunks."""
    closes: bool = False
    """Announce `Connection: close`, and close after the answer."""
    extra: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class TrickledHead:
    """The same, one byte at a time."""

    head: Head
    byte_s: float


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the body: one write, and one chunk where the body goes in chunks."""

    data: bytes
    is_token: bool = False


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes that go out as they are."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Wait:
    """A pause; 0 is one turn of the event loop."""

    seconds: float


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a model is loaded with. A request with others loads it anew."""

    context_tokens: int
    others: tuple[int | bool | None, ...] = ()


@dataclass(frozen=True, slots=True)
class TakeSlot:
    """Wait for the model where it must be loaded first, and for a free slot; hold it until the end."""

    model: str
    options: LoadOptions
    keep_loaded: bool = True
    """False unloads the model when its last request has ended."""


@dataclass(frozen=True, slots=True)
class End:
    """The answer is complete; the slot is free again."""


@dataclass(frozen=True, slots=True)
class CloseIdle:
    """Close the connection some time after the answer, without a word, if no request comes before."""

    after_s: float


class Cut(enum.Enum):
    """An end that is none."""

    RESET = "reset"
    """The connection is reset (TCP RST)."""
    CLOSE = "close"
    """The connection is closed (TCP FIN)."""
    SILENCE = "silence"
    """Nothing comes any more, and the connection stays."""


Step: TypeAlias = Head | TrickledHead | Part | Raw | Wait | TakeSlot | End | CloseIdle | Cut
Steps: TypeAlias = Iterator[Step]
Bend: TypeAlias = Callable[[Steps], Steps]


def whole(status: int, content_type: str, body: bytes, *, closes: bool = False) -> Steps:
    """An answer in one piece."""
    yield Head(status, content_type, len(body), closes)
    if body:
        yield Part(body)
    yield End()


def document(status: int, value: object, *, closes: bool = False) -> Steps:
    """A JSON document in one piece."""
    return whole(status, JSON_TYPE, msgspec.json.encode(value), closes=closes)


def pause(seconds: float) -> Steps:
    """A wait, or nothing at all where there is nothing to wait for."""
    if seconds > 0:
        yield Wait(seconds)
