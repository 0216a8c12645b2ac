"""
The second tier as the cache sees it: one question at a time for each answer, bounded in time, and writing behind.

A store that is slow or away costs a request no more than `limit_s`, and never an error. Who asks while an equal
request asks already waits for the same `Search`. Answers are written after the client has them, from a bounded queue.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

import structlog

from sutazai.core.errors import StoreUnavailable
from sutazai.core.request import Request
from sutazai.ports.cache import Answer, AnswerStore, Forgotten

log = structlog.get_logger("sutazai.cache")

LEAD_S = 10.0
"""How long other gateways leave an answer to the one that makes it; a dead one costs them no more than `FOLLOW_S`."""
FOLLOW_S = 2.0
"""How long a request waits for an answer that another gateway makes, before it asks a node itself."""
WRITERS = 4
MOST_WAITING_BYTES = 32 * 1024 * 1024
"""Answers not yet written; further ones are dropped."""
MOST_WAITING = 8192
"""Writes of all kinds; past it a lead runs out by itself."""
WRITE_S = 1.0
"""For one write; nobody waits for it."""
PAUSE_S = 1.0
"""Before a store is listened to again that broke off without saying why."""


class Seeker(Protocol):
    """A request that waits for what the store says."""

    def told(self, answer: Answer | None, *, leads: bool) -> None:
        """
        What the store has; the answer may be past its freshness.

        With `leads` this request is the one, of all gateways, that is to make it.
        """


class Search:
    """One question to the store, and the requests that wait for it."""

    def __init__(self, fingerprint: bytes, until: float) -> None:
        self.fingerprint = fingerprint
        self.until = until
        """By when the store must have answered, in the event loop's seconds."""
        self.following: asyncio.Task[None] | None = None
        """Its task, while it waits for another gateway."""
        self._seekers: dict[Seeker, None] = {}

    def join(self, seeker: Seeker) -> None:
        """Wait for it too."""
        self._seekers[seeker] = None

    def leave(self, seeker: Seeker) -> None:
        """
        Wait no more; with nobody left nobody else is waited for.

        A question that was sent is heard out: it may have won the lead, which must be given up then.
        """
        self._seekers.pop(seeker, None)
        if not self._seekers and self.following is not None:
            self.following.cancel()

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody waits any more."""
        return not self._seekers

    def tell(self, answer: Answer | None, *, leads: bool) -> bool:
        """Tell everybody, the first that it leads where the store said so; False where nobody waits any more."""
        seekers, self._seekers = self._seekers, {}
        for number, seeker in enumerate(seekers):
            try:
                seeker.told(answer, leads=leads and not number)
            except Exception:  # the border of a request: the others are to hear it all the same
                log.exception("request failed")
        return bool(seekers)


class SecondTier:
    """Asks and fills a store that gateways share."""

    def __init__(self, store: AnswerStore, *, limit_s: float, is_fresh: Callable[[Answer], bool]) -> None:
        """
        Make it; it asks nothing before `run`.

        Args:
            limit_s: what a request may wait for the store, all in all.
            is_fresh: whether an answer may be given without a second thought.
        """
        self.store = store
        self.limit_s = limit_s
        self._is_fresh = is_fresh
        self._group: asyncio.TaskGroup | None = None
        self._searches: dict[bytes, Search] = {}
        self._waiting: deque[tuple[bytes, Answer | None, float]] = deque()
        self._waiting_bytes = 0
        self._news = asyncio.Event()
        self.errors = 0
        """Questions, writes and words of the store that came to nothing."""
        self.dropped = 0
        """Answers that were not written because too many waited."""

    @property
    def is_running(self) -> bool:
        """Whether it can be asked."""
        return self._group is not None

    def may_be_asked(self, request: Request) -> bool:
        """Whether it runs, and what the request may still wait is enough for an answer of the store."""
        left_s = self.limit_s - request.store_wait_s
        if self._group is None or left_s <= 0.0:
            return False
        search = self._searches.get(request.fingerprint)
        return search is None or search.until <= _now() + left_s

    def seek(self, request: Request, seeker: Seeker) -> Search:
        """Look for an answer and tell the seeker, later. Only while it `may_be_asked`."""
        fingerprint = request.fingerprint
        search = self._searches.get(fingerprint)
        if search is None:
            until = _now() + self.limit_s - request.store_wait_s
            search = self._searches[fingerprint] = Search(fingerprint, until)
            assert self._group is not None  # noqa: S101 - the caller looked
            self._group.create_task(self._search(search), name="seek an answer")
        search.join(seeker)
        return search

    def lead(self, fingerprint: bytes, then: Callable[[], None]) -> None:
        """Call `then`, later, if this gateway is the one to make an answer anew. Only while it runs."""
        assert self._group is not None  # noqa: S101 - the caller looked
        self._group.create_task(self._lead(fingerprint, then), name="lead a renewal")

    def keep(self, fingerprint: bytes, answer: Answer, *, keep_s: float) -> None:
        """Write it, soon."""
        if self._waiting_bytes + answer.size_bytes > MOST_WAITING_BYTES or len(self._waiting) >= MOST_WAITING:
            self.dropped += 1
            return
        self._waiting_bytes += answer.size_bytes
        self._waiting.append((fingerprint, answer, keep_s))
        self._news.set()

    def give_up(self, fingerprint: bytes) -> None:
        """The lead came to nothing."""
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append((fingerprint, None, 0.0))
            self._news.set()

    def forget_unwritten(self, what: Forgotten) -> None:
        """Let nothing be written that was forgotten meanwhile."""
        for _ in range(len(self._waiting)):
            fingerprint, answer, keep_s = self._waiting.popleft()
            if answer is not None and what.covers(fingerprint, answer):
                self._waiting_bytes -= answer.size_bytes
                answer, keep_s = None, 0.0  # others wait for the lead's end all the same
            self._waiting.append((fingerprint, answer, keep_s))

    async def run(self, forgotten: Callable[[Forgotten], None]) -> None:
        """Ask, write and listen until cancelled; what other gateways want forgotten is told to `forgotten`."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                for _ in range(WRITERS):
                    group.create_task(self._write_on(), name="write answers")
                await self._listen(forgotten)
            finally:
                self._group = None

    # parts

    async def _search(self, search: Search) -> None:
        answer: Answer | None = None
        leads = False
        try:
            async with asyncio.timeout_at(search.until):
                answer = await self.store.get(search.fingerprint)
                is_wanted = answer is None or not self._is_fresh(answer)
                leads = is_wanted and await self.store.lead(search.fingerprint, for_s=LEAD_S)
            if is_wanted and not leads and not search.is_abandoned:
                answer = await self._follow(search) or answer
        except (StoreUnavailable, TimeoutError):
            self.errors += 1
        except Exception:  # the border of a task
            self.errors += 1
            log.exception("store failed")
        finally:
            del self._searches[search.fingerprint]
            if not search.tell(answer, leads=leads) and leads:
                self.give_up(search.fingerprint)

    async def _follow(self, search: Search) -> Answer | None:
        search.following = asyncio.current_task()
        try:
            async with asyncio.timeout(FOLLOW_S + self.limit_s):
                return await self.store.follow(search.fingerprint, within_s=FOLLOW_S)
        finally:
            search.following = None

    async def _lead(self, fingerprint: bytes, then: Callable[[], None]) -> None:
        try:
            async with asyncio.timeout(self.limit_s):
                leads = await self.store.lead(fingerprint, for_s=LEAD_S)
            if leads:
                then()
        except (StoreUnavailable, TimeoutError):
            self.errors += 1
        except Exception:  # the border of a task
            self.errors += 1
            log.exception("store failed")

    async def _write_on(self) -> None:
        while True:
            while not self._waiting:
                self._news.clear()
                await self._news.wait()
            fingerprint, answer, keep_s = self._waiting.popleft()
            if answer is not None:
                self._waiting_bytes -= answer.size_bytes
            try:
                await self._write(fingerprint, answer, keep_s)
            except (StoreUnavailable, TimeoutError):
                self.errors += 1
            except Exception:  # the border of one turn
                self.errors += 1
                log.exception("store failed")

    async def _write(self, fingerprint: bytes, answer: Answer | None, keep_s: float) -> None:
        async with asyncio.timeout(WRITE_S):
            if answer is None:
                await self.store.give_up(fingerprint)
            else:
                await self.store.put(fingerprint, answer, keep_s=keep_s)

    async def _listen(self, forgotten: Callable[[Forgotten], None]) -> None:
        while True:
            try:
                async for what in self.store.forgotten():
                    forgotten(what)
            except Exception:  # the border of one turn
                self.errors += 1
                log.exception("store failed")
            forgotten(Forgotten())  # words may have been missed
            await asyncio.sleep(PAUSE_S)


def _now() -> float:
    return asyncio.get_running_loop().time()
