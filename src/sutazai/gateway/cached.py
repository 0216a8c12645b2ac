"""
The stage that gives answers which were given before.

First this process is asked (`answers_in_memory`), within the call; then, where there is one, the store that gateways
share (`second_tier`), by a task. What no tier has is asked for and recorded on its way. What may be kept and shared
is decided in `policy/cacheability.py`; a request without a fingerprint passes untouched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import structlog

from sutazai.core.request import Priority, Request, Usage
from sutazai.dialects.completeness import is_complete
from sutazai.gateway.answers_in_memory import AnswersInMemory, Kept
from sutazai.gateway.recorded import HIT_L1, Nobody, Recording, Seeking, give
from sutazai.gateway.second_tier import SecondTier
from sutazai.policy.cacheability import RENEWED_FROM, CacheRules, directives_in
from sutazai.ports.cache import Answer, AnswerStore, Forgotten
from sutazai.ports.inference import Call, Inference, NoCall, Reply

log = structlog.get_logger("sutazai.cache")

SWEEP_S = 1.0
MOST_RENEWALS = 16
"""Answers made anew at once; they take slots that clients could have."""
PIECE_BYTES = 64 * 1024
"""A stream from the cache is written in pieces of about this size."""
STORE_LIMIT_S = 0.02


class Cached:
    """An `Inference` that remembers answers."""

    def __init__(
        self,
        inner: Inference,
        *,
        memory: AnswersInMemory,
        store: AnswerStore | None,
        rules: CacheRules,
        is_public: Callable[[str], bool],
        clock: Callable[[], float],
        wall: Callable[[], float],
        store_limit_s: float = STORE_LIMIT_S,
    ) -> None:
        """
        Make the stage; the store is asked only while `run` runs.

        Args:
            is_public: whether all tenants may share a model's answers, as in `Fingerprints`.
            clock: monotonic seconds.
            wall: Unix seconds.
            store_limit_s: what a request may wait for the store, all in all.
        """
        self._inner = inner
        self._store = store
        self._clock = clock
        self._wall = wall
        self._is_public = is_public
        self._over = NoCall()
        self._asking: dict[bytes, Recording] = {}
        """Who asks the nodes now, of those who asked the store before: equal requests go where these went."""
        self._renewals: set[Recording] = set()
        self.memory = memory
        self.second = None if store is None else SecondTier(store, limit_s=store_limit_s, is_fresh=self._is_fresh)
        self.rules = rules
        self.forgets = 0
        """Orders to forget; an answer that was begun before the latest is not kept."""
        self.hits_l1 = 0
        """Requests answered from this process."""
        self.hits_l2 = 0
        """Requests answered from the shared store."""
        self.misses = 0
        """Requests that could have been answered from a cache and were not."""
        self.stale = 0
        """Requests given an answer past its time, because the pool had none."""
        self.refreshed = 0
        """Answers made anew before their time."""
        self.stored = 0
        """Answers kept."""

    @property
    def store_errors(self) -> int:
        """Questions to the shared store, and writes, that came to nothing."""
        return 0 if self.second is None else self.second.errors

    @property
    def size_bytes(self) -> int:
        """What the answers in this process take."""
        return self.memory.size_bytes

    @property
    def entries(self) -> int:
        """Answers in this process."""
        return len(self.memory)

    def adopt(self, rules: CacheRules, *, memory_bytes: int) -> None:
        """New settings; answers kept so far stay for as long as they were to."""
        self.rules = rules
        if memory_bytes != self.memory.limit_bytes:
            self.memory.resize(memory_bytes)

    def start(self, request: Request, reply: Reply) -> Call:
        fingerprint = request.fingerprint
        if not fingerprint:
            return self._inner.start(request, reply)
        if request.cache_control:
            return self._obey(request, reply)
        kept = self.memory.get(fingerprint)
        if kept is not None:
            now = self._clock()
            if now < kept.fresh_until:
                return self._hit(kept, request, reply, now)
        return self._miss(request, reply, None if kept is None else kept.answer)

    async def forget(self, what: Forgotten) -> int:
        """
        Forget in this process, in the store and in every other gateway; how many were in the store, or else here.

        Raises `StoreUnavailable` when the others could not be told; here it is forgotten all the same.
        """
        here = self.forget_here(what)
        return here if self._store is None else await self._store.forget(what)

    def forget_here(self, what: Forgotten) -> int:
        """Forget in this process; how many there were."""
        self.forgets += 1
        if self.second is not None:
            self.second.forget_unwritten(what)
        return self.memory.forget(what)

    def sweep(self) -> None:
        """Drop what is of no use any more."""
        self.memory.sweep(self._clock())

    async def run(self) -> None:
        """Sweep, ask the store and listen to it, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._sweep_often(), name="sweep answers")
                if self.second is not None:
                    group.create_task(self.second.run(self._forget_quietly), name="share answers")
        finally:
            for renewal in list(self._renewals):
                renewal.cancel()

    # ways through

    def _obey(self, request: Request, reply: Reply) -> Call:
        """The client has wishes of its own."""
        wishes = directives_in(request.cache_control)
        if not wishes.may_be_kept:
            return self._inner.start(request, reply)
        if not wishes.may_be_old:
            return self.ask(request, reply, None)
        kept = self.memory.get(request.fingerprint)
        now = self._clock()
        if kept is None or now >= kept.fresh_until:
            return self._miss(request, reply, None)
        if now - kept.made_at <= wishes.max_age_s:
            return self._hit(kept, request, reply, now)
        return self.ask(request, reply, None)

    def _hit(self, kept: Kept, request: Request, reply: Reply, now: float) -> Call:
        self.hits_l1 += 1
        kept.hits += 1
        give(kept.answer, reply, HIT_L1, now - kept.made_at)
        if now >= kept.renew_at and kept.hits >= self.rules.refresh_from_hits > 0:
            self._renew(kept, request)
        return self._over

    def _miss(self, request: Request, reply: Reply, stale: Answer | None) -> Call:
        second = self.second
        if second is None or request.fingerprint in self._asking or not second.may_be_asked(request):
            return self.ask(request, reply, stale)
        return Seeking(self, second, request, reply, stale)

    def ask(self, request: Request, reply: Reply, stale: Answer | None, *, leads: bool = False) -> Call:
        """Ask the nodes and record the answer; `stale` is given where they have none. For this stage's parts."""
        self.misses += 1
        if request.cache_control:
            stale = None  # who has wishes does not get what is worse than usual
        recording = Recording(self, request, reply, stale, leads=leads)
        if self.second is None:
            return self._inner.start(request, recording)
        self._asking.setdefault(request.fingerprint, recording)
        return recording.begin(self._inner)

    # for the parts of this stage

    def is_young_enough(self, answer: Answer, request: Request) -> bool:
        """Whether this request may get it."""
        max_age_s = directives_in(request.cache_control).max_age_s
        return self._is_fresh(answer) and self.age_s(answer) <= max_age_s

    def age_s(self, answer: Answer) -> float:
        """How long ago it was made; clocks of two machines may differ."""
        return max(0.0, self._wall() - answer.made_at)

    def fill(self, fingerprint: bytes, answer: Answer) -> None:
        """Keep an answer in this process."""
        now, age_s, rules = self._clock(), self.age_s(answer), self.rules
        ttl_s = min(rules.memory_ttl_s, answer.fresh_s - age_s)
        whole_s = rules.memory_ttl_s if self.second is None else answer.fresh_s
        kept = Kept(
            answer,
            made_at=now - age_s,
            fresh_until=now + ttl_s,
            dead_at=now + max(0.0, ttl_s) + rules.stale_if_error_s,
            renew_at=now - age_s + min(whole_s, answer.fresh_s) * RENEWED_FROM,
        )
        before = self.memory.peek(fingerprint)
        if before is not None and before.answer.made_at == answer.made_at:
            kept.hits = before.hits  # the same one, fetched again
        self.memory.put(fingerprint, kept, now)

    def record(self, request: Request, content_type: bytes, node: str, parts: list[bytes], usage: Usage | None) -> bool:
        """Keep a complete answer in both tiers, where it may be kept; whether it was."""
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        endpoint, rules = request.endpoint, self.rules
        whole = is_complete(endpoint, body, is_stream=request.stream)
        if not rules.may_keep(status=200, size_bytes=len(body), is_complete=whole):
            return False
        answer = Answer(
            status=200,
            content_type=content_type,
            parts=_pieces(body) if request.stream else (body,),
            is_stream=request.stream,
            node=node,
            model=request.model,
            tenant="" if self._is_public(request.model) else request.tenant,
            usage=usage,
            made_at=self._wall(),
            fresh_s=rules.fresh_s(endpoint.operation),
            tags=_tags(request, node),
        )
        self.stored += 1
        self.fill(request.fingerprint, answer)
        if self.second is not None and self.second.is_running:
            self.second.keep(request.fingerprint, answer, keep_s=answer.fresh_s + rules.stale_if_error_s)
        return True

    def ended(self, recording: Recording) -> None:
        """It listens no more."""
        fingerprint = recording.request.fingerprint
        if self._asking.get(fingerprint) is recording:
            del self._asking[fingerprint]
        self._renewals.discard(recording)
        if recording.leads and not recording.is_kept and self.second is not None:
            self.second.give_up(fingerprint)
        if recording.is_renewal and recording.is_kept:
            self.refreshed += 1

    # parts

    def _is_fresh(self, answer: Answer) -> bool:
        return self.age_s(answer) < answer.fresh_s

    def _renew(self, kept: Kept, request: Request) -> None:
        """Have an answer that is often asked for made anew, by one gateway, before its time is over."""
        if len(self._renewals) >= MOST_RENEWALS:
            return
        kept.renew_at = float("inf")  # once; where it fails, the answer's own time ends it
        again = replace(
            request, id=f"{request.id}.r1", priority=Priority.LOW, deadline_at=0.0, cache_control=b"", allowance=None
        )
        if self.second is None or not self.second.is_running:
            self._make_anew(again, leads=False)
        else:
            self.second.lead(request.fingerprint, lambda: self._make_anew(again, leads=True))

    def _make_anew(self, request: Request, *, leads: bool) -> None:
        if len(self._renewals) >= MOST_RENEWALS:  # many may have asked for the lead at once
            if leads and self.second is not None:
                self.second.give_up(request.fingerprint)
            return
        renewal = Recording(self, request, Nobody(), None, leads=leads, is_renewal=True)
        self._renewals.add(renewal)
        renewal.begin(self._inner)

    def _forget_quietly(self, what: Forgotten) -> None:
        count = self.forget_here(what)
        if count:
            log.info("answers forgotten", count=count)

    async def _sweep_often(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                self.sweep()
            except Exception:  # the border of one turn
                log.exception("sweep failed")


def _pieces(body: bytes) -> tuple[bytes, ...]:
    """A stream as it is written from the cache: what came token by token would cost a write for each."""
    return tuple(body[start : start + PIECE_BYTES] for start in range(0, len(body), PIECE_BYTES))


def _tags(request: Request, node: str) -> tuple[str, ...]:
    """By what an operator may want to forget it: a node that answered wrongly, a key that was misused."""
    return (f"node:{node}", f"key:{request.key_id}") if request.key_id else (f"node:{node}",)
