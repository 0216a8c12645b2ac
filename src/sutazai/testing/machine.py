"""What the APIs of one fake server share: its models, its capacity, and the made-up facts that it tells."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from sutazai.core.node import NodeKind
from sutazai.testing.capacity import Capacity, Tally
from sutazai.testing.received import Received
from sutazai.testing.script import Answer
from sutazai.testing.steps import LoadOptions, Steps

VECTOR_FORMAT = "<8f"
"""An embedding: eight 32-bit floats."""

Inference: TypeAlias = Callable[[Received, Answer], Steps]
"""Answers a request for a model; the script says how."""
Other: TypeAlias = Callable[[Received], Steps]
"""Answers any other request."""


class Api(Protocol):
    """A set of addresses and what answers there."""

    def inference(self) -> Mapping[str, Inference]:
        """By path; the method is POST."""

    def other(self) -> Mapping[tuple[str, str], Other]:
        """By method and path."""


@dataclass(slots=True, kw_only=True, eq=False)
class Machine:
    """One fake server, apart from its connections."""

    kind: NodeKind
    models: list[str]
    """As on the wire: Ollama's names always carry a tag."""
    slots: int
    context_tokens: int
    """What models are loaded with where the client does not ask for a length."""
    pull_s: float
    """How long a pull takes."""
    registry: tuple[str, ...] | None
    """Models that can be pulled; None = any."""
    capacity: Capacity
    tally: Tally

    def wire_name(self, model: str) -> str:
        """The name in full."""
        last = model.rpartition("/")[2]
        return f"{model}:latest" if self.kind is NodeKind.OLLAMA and ":" not in last else model

    def has(self, model: str) -> bool:
        """Whether it can be asked for."""
        return self.wire_name(model) in self.models

    def add(self, model: str) -> None:
        """Have it from now on."""
        if not self.has(model):
            self.models.append(self.wire_name(model))

    def remove(self, model: str) -> None:
        """Have it no more, neither on the disk nor in memory."""
        self.models.remove(self.wire_name(model))
        self.capacity.unload(self.wire_name(model))

    def default_options(self) -> LoadOptions:
        """What models are loaded with where the client asks for nothing."""
        return LoadOptions(self.context_tokens)


def digest(model: str) -> str:
    """A digest made from the name: 64 hexadecimal digits."""
    return hashlib.sha256(model.encode()).hexdigest()


def size_bytes(model: str) -> int:
    """A size made from the name, 1 to 5 GB."""
    return 10**9 + int(digest(model)[:8], 16)


def words(text: str) -> int:
    """Tokens of a prompt: its words."""
    return len(text.split())


def vector(text: str) -> tuple[float, ...]:
    """An embedding made from the text: eight numbers of length 1 together, exact in 32 bits."""
    numbers = struct.unpack("<8i", hashlib.sha256(text.encode()).digest())
    norm = sum(number * number for number in numbers) ** 0.5
    return struct.unpack(VECTOR_FORMAT, struct.pack(VECTOR_FORMAT, *(number / norm for number in numbers)))


def limited(answer: Answer, limit: int | None) -> tuple[tuple[str, ...], bool]:
    """The tokens for a client that asked for so many at most (None, negative: all); whether some were cut."""
    if limit is None or limit < 0 or limit >= len(answer.tokens):
        return answer.tokens, False
    return answer.tokens[:limit], True
