"""A `LimitStore` in memory that can be away, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from sutazai.core.errors import StoreUnavailable
from sutazai.core.identity import Allowance
from sutazai.gateway.counts import Counts
from sutazai.policy.rate_limit import Amounts, Bounds, Verdict
from sutazai.ports.limits import Settlement, Spent

NOTHING: Amounts = (0, 0, 0, 0, 0, 0.0)


class MemoryLimits:
    """One count for all who are given it. `is_away` and `loses_answers` are its faults, to be set."""

    def __init__(
        self, *, clock: Callable[[], float], wall_s: Callable[[], float], lease_s: float = 30.0, gateways: int = 1
    ) -> None:
        self._counts = Counts(clock=clock, wall_s=wall_s)
        self._clock = clock
        self._lease_s = lease_s
        self.places: dict[str, tuple[Bounds, Amounts, float]] = {}
        """What runs, by request id: its limits, what was set aside for it, and until when."""
        self.gateways = gateways
        self.is_away = False
        self.loses_answers = False
        """It does what it is asked, and nobody hears of it."""

    async def take(self, bounds: Bounds, request_id: str, amounts: Amounts) -> Verdict:
        await self._arrive()
        self._expire()
        verdict = self._counts.take(bounds, amounts)
        if verdict.admitted and bounds.is_settled:
            self.places[request_id] = (bounds, amounts, self._clock() + self._lease_s)
        self._leave()
        return verdict

    async def settle(self, settlement: Settlement) -> None:
        await self._arrive()
        self._expire()
        if self.places.pop(settlement.request_id, None) is not None:
            self._counts.settle(settlement.bounds, settlement.estimated, settlement.true)
        elif not settlement.was_taken:
            self._counts.settle(settlement.bounds, NOTHING, settlement.true)
        self._leave()

    async def renew(self, held: Sequence[tuple[Allowance, str]]) -> int:
        await self._arrive()
        self._expire()
        for _, request_id in held:
            if request_id in self.places:
                bounds, amounts, _ = self.places[request_id]
                self.places[request_id] = (bounds, amounts, self._clock() + self._lease_s)
        self._leave()
        return self.gateways

    async def seed(self, spent: Sequence[Spent], *, month: int) -> None:
        await self._arrive()
        self._counts.seed(spent, month=month)
        self._leave()

    async def _arrive(self) -> None:
        await asyncio.sleep(0)
        if self.is_away:
            raise StoreUnavailable("The store is away.")

    def _leave(self) -> None:
        if self.loses_answers:
            raise StoreUnavailable("The store did not answer in time.")

    def _expire(self) -> None:
        for request_id, (bounds, amounts, until) in list(self.places.items()):
            if until <= self._clock():
                del self.places[request_id]
                self._counts.settle(bounds, amounts, _without_place(amounts))


def _without_place(amounts: Amounts) -> Amounts:
    requests, tokens, size_bytes, _, month_tokens, money = amounts
    return requests, tokens, size_bytes, 0, month_tokens, money
