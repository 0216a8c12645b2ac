"""Answers in memory for several gateways of one event loop: the second implementation of `AnswerStore`, for tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from sutazai.core.errors import StoreUnavailable
from sutazai.ports.cache import Answer, Forgotten


@dataclass(slots=True)
class Shelf:
    """What the stores of several gateways share."""

    clock: Callable[[], float] = time.monotonic
    answers: dict[bytes, tuple[Answer, float]] = field(default_factory=dict)
    """With the time at which each expires."""
    leads: dict[bytes, tuple[MemoryAnswerStore, float]] = field(default_factory=dict)
    """Who makes an answer, and until when the others leave it to them."""
    listeners: list[asyncio.Queue[Forgotten]] = field(default_factory=list)
    moved: asyncio.Condition = field(default_factory=asyncio.Condition)
    """Told of every answer that came and every lead that ended."""


class MemoryAnswerStore:
    """One gateway's end of a `Shelf`. It can be told to be away, or to be slow."""

    def __init__(self, shelf: Shelf | None = None) -> None:
        self.shelf = shelf or Shelf()
        self.asked = 0
        """Questions so far, those that failed too."""
        self.is_away = False
        """Every call raises `StoreUnavailable`."""
        self._free = asyncio.Event()
        self._free.set()

    def stall(self) -> None:
        """From now on calls hang until `go_on`, as no store that keeps its word would let them."""
        self._free.clear()

    def go_on(self) -> None:
        """Answer those that hang, and the others."""
        self._free.set()

    async def get(self, fingerprint: bytes) -> Answer | None:
        """The answer, or None."""
        await self._answers()
        return self._get(fingerprint)

    async def put(self, fingerprint: bytes, answer: Answer, *, keep_s: float) -> None:
        """Keep it for so long, and end the lead of the one who made it."""
        await self._answers()
        self.shelf.answers[fingerprint] = (answer, self.shelf.clock() + keep_s)
        await self._end_lead(fingerprint)

    async def forget(self, what: Forgotten) -> int:
        """Forget here and tell every gateway; how many answers are gone."""
        await self._answers()
        kept = self.shelf.answers
        meant = [fingerprint for fingerprint, (answer, _) in kept.items() if what.covers(fingerprint, answer)]
        for fingerprint in meant:
            del kept[fingerprint]
        for listener in self.shelf.listeners:
            listener.put_nowait(what)
        return len(meant)

    async def forgotten(self) -> AsyncGenerator[Forgotten, None]:
        """What any gateway wants forgotten."""
        heard: asyncio.Queue[Forgotten] = asyncio.Queue()
        self.shelf.listeners.append(heard)
        try:
            while True:
                yield await heard.get()
        finally:
            self.shelf.listeners.remove(heard)

    def lose_words(self) -> None:
        """As after a broken connection: listeners may have missed something."""
        for listener in self.shelf.listeners:
            listener.put_nowait(Forgotten())

    async def lead(self, fingerprint: bytes, *, for_s: float) -> bool:
        """Whether the caller is the one who makes the answer now."""
        await self._answers()
        if self._leader(fingerprint) is not None:
            return False
        self.shelf.leads[fingerprint] = (self, self.shelf.clock() + for_s)
        return True

    async def follow(self, fingerprint: bytes, *, within_s: float) -> Answer | None:
        """Wait for whoever leads."""
        await self._answers()
        try:
            async with asyncio.timeout(within_s), self.shelf.moved:
                await self.shelf.moved.wait_for(lambda: self._leader(fingerprint) is None)
        except TimeoutError:
            return None
        return self._get(fingerprint)

    async def give_up(self, fingerprint: bytes) -> None:
        """The lead ends without an answer."""
        await self._answers()
        await self._end_lead(fingerprint)

    async def _answers(self) -> None:
        self.asked += 1
        if self.is_away:
            raise StoreUnavailable("The store in memory was told to be away. Set `is_away` to False.")
        await self._free.wait()

    def _get(self, fingerprint: bytes) -> Answer | None:
        answer, until = self.shelf.answers.get(fingerprint, (None, 0.0))
        return answer if self.shelf.clock() < until else None

    def _leader(self, fingerprint: bytes) -> MemoryAnswerStore | None:
        leader, until = self.shelf.leads.get(fingerprint, (None, 0.0))
        return leader if self.shelf.clock() < until else None

    async def _end_lead(self, fingerprint: bytes) -> None:
        if self._leader(fingerprint) is self:
            del self.shelf.leads[fingerprint]
        async with self.shelf.moved:
            self.shelf.moved.notify_all()
