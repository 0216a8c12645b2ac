"""
Answers that are kept for others who ask the same, outside of the process.

The cache inside the process belongs to `gateway.cached`; this port is what several gateways share.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from sutazai.core.request import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A complete answer as it was sent: whole, or as the parts of a stream."""

    status: int
    content_type: bytes
    parts: tuple[bytes, ...]
    """One part for an answer that did not stream."""
    is_stream: bool
    node: str
    """Which node gave it."""
    model: str
    tenant: str
    """Empty where the model is public and the answer is everybody's."""
    usage: Usage | None
    made_at: float
    """Unix seconds."""
    fresh_s: float
    """How long from then on it may be given without a second thought."""
    tags: tuple[str, ...] = ()
    """By which it can be forgotten, beside its model and tenant: `node:NAME` of who gave it, `key:ID` of who asked."""

    @property
    def size_bytes(self) -> int:
        """What it takes in memory, about."""
        return sum(len(part) + 33 for part in self.parts) + 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What is to be forgotten: all that matches every part that is given. With no part, everything."""

    tenant: str | None = None
    model: str | None = None
    tag: str | None = None
    fingerprint: bytes | None = None

    def covers(self, fingerprint: bytes, answer: Answer) -> bool:
        """Whether this answer is among what is to be forgotten."""
        return (
            (self.tenant is None or self.tenant == answer.tenant)
            and (self.model is None or self.model == answer.model)
            and (self.tag is None or self.tag in answer.tags)
            and (self.fingerprint is None or self.fingerprint == fingerprint)
        )


class AnswerStore(Protocol):
    """
    The second tier.

    Each method raises `StoreUnavailable` within the time limit that the store was made with, and never anything
    else: a store that is away costs a miss, not an error.
    """

    async def get(self, fingerprint: bytes) -> Answer | None:
        """The answer, or None. May be past its freshness; the caller decides what that is worth."""

    async def put(self, fingerprint: bytes, answer: Answer, *, keep_s: float) -> None:
        """Keep it for so long."""

    async def forget(self, what: Forgotten) -> int:
        """Forget here and tell every other gateway; how many answers are gone from the store, where it can tell."""

    def forgotten(self) -> AsyncIterator[Forgotten]:
        """
        What any gateway wants forgotten, as it comes.

        Yields `Forgotten()` (everything) after words may have been missed. Never ends; raises only on cancellation.
        """

    async def lead(self, fingerprint: bytes, *, for_s: float) -> bool:
        """Whether the caller is the one, of all gateways, who makes the answer now; for that long at most."""

    async def follow(self, fingerprint: bytes, *, within_s: float) -> Answer | None:
        """
        Wait for whoever leads to `put` or `give_up`; the answer, or None when there was none within the time.

        Does not wait where nobody leads: the answer may have come between `lead` and this.
        """

    async def give_up(self, fingerprint: bytes) -> None:
        """The leader has no answer: let another lead. Nothing happens where somebody else leads by now."""
