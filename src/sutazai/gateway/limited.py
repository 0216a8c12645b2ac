"""
The stage of limits: a request goes on only where its tenant and its key have room, and pays what it took at its end.

A gateway by itself counts in memory, within `start`. Where several share their counts, the store is asked first, and
the request waits for its word as long as the store's own time limit. A store that does not answer is no error: then
each gateway lets through its share of every limit by its own count. Only a month's budget stays shut where nobody
knows what was spent of it.

Whatever was set aside is settled exactly once, on each way a request can end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import structlog

from sutazai.core.errors import StoreUnavailable, SutazaiError
from sutazai.core.identity import Allowance
from sutazai.core.request import Head, Request, Usage
from sutazai.gateway.counts import Counts
from sutazai.gateway.limit_words import header_lines, refusal
from sutazai.policy.rate_limit import Amounts, Bounds, Verdict, amounts_of
from sutazai.policy.token_estimate import estimated_tokens
from sutazai.ports.inference import Call, Inference, Reply
from sutazai.ports.limits import LimitStore, Settlement, Spent

log = structlog.get_logger("sutazai.limits")

RENEW_S = 10.0
"""How often the places of running requests are renewed; a third of the time they last in the store."""
LOOK_AGAIN_S = 1.0
"""How often a store that is away is tried."""
RENEW_TOGETHER = 500
SETTLE_TOGETHER = 32
MAX_UNSETTLED = 10_000
"""Settlements kept for a store that is away, about 3 MB; past it the oldest are given up."""
WARN_EVERY_S = 60.0
MILLION = 1e6


class Limited:
    """Lets requests through as far as limits allow."""

    def __init__(
        self,
        inner: Inference,
        *,
        local: Counts,
        shared: LimitStore | None = None,
        price: Callable[[str], tuple[float, float]],
    ) -> None:
        """
        Make the stage.

        Args:
            shared: None for a gateway that has its limits to itself.
            price: of a model, as the client names it: money for a million input and a million output tokens.
        """
        self.inner = inner
        self._local = local
        self._shared = shared
        self._price = price
        self._held: dict[str, Allowance] = {}
        self._unsettled: deque[Settlement] = deque()
        self._settling: asyncio.Task[None] | None = None
        self._asking: set[asyncio.Task[None]] = set()
        self._is_away = False
        self._warned_at = float("-inf")
        self.gateways = 0
        """That share the limits, as far as is known; 0: nobody told yet."""
        self.admitted = 0
        """Limited requests that went on."""
        self.refused = 0
        """Requests that were over a limit."""
        self.alone = 0
        """Requests that this gateway judged by its own count, because the store did not answer."""
        self.lost = 0
        """Settlements that were given up: they stay counted as they were estimated."""

    @property
    def unsettled(self) -> int:
        """Ended requests that the store has not heard of."""
        return len(self._unsettled)

    def start(self, request: Request, reply: Reply) -> Call:
        allowance = request.allowance
        if allowance is None:
            return self.inner.start(request, reply)
        local = self._local
        bounds = local.bounds(allowance)
        if not bounds.all:
            return self.inner.start(request, reply)
        tokens = estimated_tokens(request) if bounds.counts_tokens else (0, 0)
        run = Run(self, request, reply, bounds, tokens)
        if self._shared is None:
            run.judge(local.take(bounds, run.amounts))
        else:
            task = asyncio.create_task(self._ask(self._shared, run), name="ask for limits")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        return run

    def amounts(self, request: Request, bounds: Bounds, tokens: tuple[int, int], places: int) -> Amounts:
        """What so many input and output tokens come to."""
        input_tokens, output_tokens = tokens
        money = 0.0
        if bounds.counts_money:
            per_input, per_output = self._price(request.model)
            money = (input_tokens * per_input + output_tokens * per_output) / MILLION
        return amounts_of(tokens=input_tokens + output_tokens, size_bytes=len(request.body), money=money, places=places)

    async def seed(self, spent: Sequence[Spent], *, month: int) -> None:
        """
        What the ledger says was spent in a month (`policy.rate_limit.month_of`), here and in the store.

        To be told now and then: a new month has to be opened, and a store that was emptied filled again. Where the
        store is away, until the next time.
        """
        self._local.seed(spent, month=month)
        if self._shared is not None:
            try:
                await self._shared.seed(spent, month=month)
            except StoreUnavailable as error:
                self._is_gone(error)

    async def run(self) -> None:
        """Renew places, settle what is left over and forget what is over, until cancelled; then settle once more."""
        try:
            while True:
                try:
                    await self._turn()
                except Exception:  # the border of one turn
                    log.exception("limits not kept up")
                await asyncio.sleep(LOOK_AGAIN_S if self._is_away else RENEW_S)
        finally:
            await self._settle_the_rest()

    # for `Run`

    def hold(self, run: Run) -> None:
        """The store gave the request a place: keep it."""
        self._held[run.request.id] = run.bounds.allowance

    def settle(self, run: Run, true: Amounts) -> None:
        """A request that was admitted ended."""
        request_id, was_taken = run.request.id, run.is_shared
        if not was_taken:
            self._local.settle(run.bounds, run.amounts, true)
        if self._shared is not None:
            self._held.pop(request_id, None)
            self._owe(self._shared, Settlement(run.bounds, request_id, run.amounts, true, was_taken))

    # the shared store

    async def _ask(self, shared: LimitStore, run: Run) -> None:
        clock = asyncio.get_running_loop().time
        began_at = clock()
        try:
            try:
                verdict = await shared.take(run.bounds, run.request.id, run.amounts)
            finally:
                run.request.store_wait_s = clock() - began_at
        except StoreUnavailable as error:
            self._is_gone(error)
            self._judge_alone(run)
        except Exception:  # the border of a request
            log.exception("limits not checked", request_id=run.request.id)
            run.give_up(SutazaiError("Something went wrong in the gateway itself; its log has the details."))
        else:
            self._is_back(shared)
            if run.bounds.has_budget:
                self._local.note(verdict)
            run.judge(verdict, is_shared=True)

    def _judge_alone(self, run: Run) -> None:
        self.alone += 1
        bounds = run.bounds
        if bounds.has_budget and not (self.gateways and self._local.knows(bounds)):
            owner = f"tenant {bounds.allowance.tenant!r}"
            run.give_up(StoreUnavailable(f"What the {owner} spent this month could not be looked up; try again soon."))
        elif not run.is_over:
            run.judge(self._local.take(bounds, run.amounts, share=1.0 / max(1, self.gateways)))

    def _is_gone(self, error: StoreUnavailable) -> None:
        self._is_away = True
        now = asyncio.get_running_loop().time()
        if now - self._warned_at >= WARN_EVERY_S:  # a store that is slow now and then comes and goes all the time
            self._warned_at = now
            log.warning("limits counted by this gateway alone", gateways=self.gateways, why=error.message)

    def _is_back(self, shared: LimitStore) -> None:
        if self._is_away:
            self._is_away = False
            self._settle_soon(shared)

    def _owe(self, shared: LimitStore, settlement: Settlement) -> None:
        if len(self._unsettled) >= MAX_UNSETTLED:
            self._unsettled.popleft()
            self.lost += 1
        self._unsettled.append(settlement)
        if not self._is_away:
            self._settle_soon(shared)

    def _settle_soon(self, shared: LimitStore) -> None:
        if self._settling is None or self._settling.done():
            self._settling = asyncio.create_task(self._settle_all(shared), name="settle limits")

    async def _settle_all(self, shared: LimitStore) -> None:
        """
        Tell the store of all that ended, until it does not answer.

        What it did not answer to is told again. A request that it had never said yes to may be charged twice by that,
        where only its answer was lost; the other way round it might not be charged at all.
        """
        while self._unsettled:
            some = [self._unsettled.popleft() for _ in range(min(SETTLE_TOGETHER, len(self._unsettled)))]
            try:
                told = await asyncio.gather(*map(shared.settle, some), return_exceptions=True)
            except asyncio.CancelledError:
                self._unsettled.extendleft(reversed(some))
                raise
            untold = [one for one, error in zip(some, told, strict=True) if isinstance(error, StoreUnavailable)]
            self._unsettled.extendleft(reversed(untold))
            for error in told:
                if isinstance(error, StoreUnavailable):
                    self._is_gone(error)
                elif error is not None:
                    self.lost += 1
                    log.error("limits not settled", exc_info=error)
            if untold:
                return

    async def _turn(self) -> None:
        self._local.sweep()
        shared = self._shared
        if shared is None:
            return
        try:
            held = list(self._held.items())
            for first in range(0, max(1, len(held)), RENEW_TOGETHER):
                some = islice(held, first, first + RENEW_TOGETHER)
                self.gateways = await shared.renew([(allowance, request_id) for request_id, allowance in some])
        except StoreUnavailable as error:
            self._is_gone(error)
        else:
            self._is_back(shared)
            if self._unsettled:
                self._settle_soon(shared)

    async def _settle_the_rest(self) -> None:
        if self._asking:
            await asyncio.wait(self._asking)
        if self._shared is not None and self._unsettled and not self._is_away:
            self._settle_soon(self._shared)
        if self._settling is not None:
            await asyncio.wait([self._settling])


class Run:
    """One limited request: `Call` to the client side, `Reply` to the node."""

    __slots__ = (
        "_call",
        "_chunks",
        "_is_headed",
        "_is_paused",
        "_limited",
        "_reply",
        "_tokens",
        "_verdict",
        "amounts",
        "bounds",
        "is_over",
        "is_shared",
        "request",
    )

    def __init__(
        self, limited: Limited, request: Request, reply: Reply, bounds: Bounds, tokens: tuple[int, int]
    ) -> None:
        self._limited = limited
        self._reply = reply
        self._tokens = tokens
        self._call: Call | None = None
        self._verdict: Verdict | None = None
        self._chunks = 0
        self._is_headed = False
        self._is_paused = False
        self.request = request
        self.bounds = bounds
        self.amounts = limited.amounts(request, bounds, tokens, 1)
        """What is set aside for it."""
        self.is_shared = False
        """The shared store has set it aside."""
        self.is_over = False

    def judge(self, verdict: Verdict, *, is_shared: bool = False) -> None:
        """The limits have spoken: go on, or tell the client."""
        limited = self._limited
        if not verdict.admitted:
            limited.refused += 1
            self.give_up(refusal(verdict))
            return
        limited.admitted += 1
        self._verdict = verdict
        self.is_shared = is_shared
        if self.is_over:  # the client left while the store was asked
            self._settle((0, 0))
            return
        if is_shared and self.bounds.is_settled:
            limited.hold(self)
        self._begin()

    def _begin(self) -> None:
        call = self._limited.inner.start(self.request, self)
        if self.is_over:
            call.cancel()  # where the client left within `start`, nobody has told the node
            return
        self._call = call
        if self._is_paused:
            call.pause()

    def give_up(self, error: SutazaiError) -> None:
        """It does not go on: nothing was set aside for it."""
        if not self.is_over:
            self.is_over = True
            self._reply.fail(error)

    # Call

    def cancel(self) -> None:
        if self.is_over:
            return
        call = self._call
        self._finish()
        if call is not None:
            call.cancel()
        if self._verdict is not None:
            # a node that did not answer yet may have read the whole prompt
            self._settle(self._so_far())

    def pause(self) -> None:
        self._is_paused = True
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        self._is_paused = False
        if self._call is not None:
            self._call.resume()

    # Reply

    def head(self, head: Head) -> None:
        self._is_headed = True
        self._reply.head(self._marked(head))

    def chunk(self, data: bytes) -> None:
        self._chunks += 1
        self._reply.chunk(data)

    def end(self, usage: Usage | None) -> None:
        if self.is_over:
            return
        self._finish()
        if self.bounds.is_settled:
            self._settle(self._so_far() if usage is None else (usage.input_tokens, usage.output_tokens))
        self._reply.end(usage)

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        if self.is_over:
            return
        self._finish()
        if self.bounds.is_settled:
            self._settle(self._tokens if usage is None else (usage.input_tokens, usage.output_tokens))
        self._reply.whole(self._marked(head), body, usage)

    def fail(self, error: SutazaiError) -> None:
        if self.is_over:
            return
        self._finish()
        self._settle(self._so_far() if self._is_headed else (0, 0))
        self._reply.fail(error)

    # parts

    def _finish(self) -> None:
        self.is_over = True
        self._call = None  # which holds us: without this every request would be left to the garbage collector

    def _marked(self, head: Head) -> Head:
        """The head with our lines; of a shared answer a new one, for others were given the same."""
        assert self._verdict is not None  # noqa: S101 - it was admitted
        if head.cache == b"coalesced":
            head = replace(head)
        lines = header_lines(self._verdict)
        head.extra = head.extra + lines if head.extra else lines
        return head

    def _so_far(self) -> tuple[int, int]:
        """The tokens of an answer that did not tell them: a chunk of a stream is about a token."""
        input_tokens, output_tokens = self._tokens
        return input_tokens, self._chunks if self.request.stream else output_tokens * self._is_headed

    def _settle(self, tokens: tuple[int, int]) -> None:
        if self.bounds.is_settled:
            limited = self._limited
            limited.settle(self, limited.amounts(self.request, self.bounds, tokens, 0))
