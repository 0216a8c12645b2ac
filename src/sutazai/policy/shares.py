"""
What each tenant was given, for a fair order among those who wait: virtual token counters.

Each tenant has one counter of tokens over all models, divided by its weight; whoever waits with the lowest is served
first. A tenant that did not wait for a while has its counter lifted to the lowest of those who wait, so that nobody
saves up for later. While nobody waits at all nothing is counted, for all would be lifted to the same anyway.

Source: "Fairness in Serving Large Language Models", Sheng et al., OSDI 2024, algorithm 2 (VTC).
"""

from __future__ import annotations

from collections.abc import Callable

from sutazai.policy.lowest import Lowest

LEAST_WEIGHT = 1e-3
KEPT_ANYWAY = 1024
"""Tenants that are remembered without a look whether they must be."""


class Share:
    """One tenant. Kept by `Shares` alone."""

    __slots__ = ("counter", "tenant", "unsettled", "waiting", "weight")

    def __init__(self, tenant: str, counter: float, weight: float) -> None:
        self.tenant = tenant
        self.counter = counter
        """Weighted tokens given, divided by `weight`."""
        self.unsettled = 0.0
        """Weighted tokens of it that are estimates yet; not divided."""
        self.weight = weight
        self.waiting = 0
        """Its requests that wait, for any model."""

    @property
    def sure(self) -> float:
        """The counter without what may turn out to have been less."""
        return self.counter - self.unsettled / self.weight


class Shares:
    """Every tenant that waited, or was served while others did."""

    def __init__(self, weight: Callable[[str], float]) -> None:
        """
        Nobody yet.

        Args:
            weight: of a tenant; twice the weight is twice the tokens while all wait.
        """
        self.waiting = 0
        """Requests, of all tenants."""
        self._weight = weight
        self._shares: dict[str, Share] = {}
        self._lowest: Lowest[Share] = Lowest(_counter)
        """Of those who wait."""
        self._level = 0.0
        """The counter of whoever waited last when last nobody waited any more."""
        self._look_at = KEPT_ANYWAY

    def of(self, tenant: str) -> Share:
        """The share of a tenant, new or not, that may be served now."""
        share = self._shares.get(tenant)
        if share is None:
            share = self._shares[tenant] = Share(tenant, self._level, self._weight_of(tenant))
        elif share.counter < self._level:
            share.counter = self._level
        return share

    def admit_at_once(self, tenant: str) -> None:
        """A request of the tenant is served without having waited, while others wait for something else."""
        share = self.of(tenant)
        if not share.waiting:
            share.counter = max(share.counter, self.floor())

    def come(self, tenant: str) -> Share:
        """One more of the tenant's requests waits."""
        share = self.of(tenant)
        is_new = not share.waiting
        if is_new:
            share.counter = max(share.counter, self.floor())
            share.weight = self._weight_of(tenant)
        share.waiting += 1
        self.waiting += 1
        if is_new:
            self._lowest.note(share)
        return share

    def go(self, share: Share) -> None:
        """One fewer of them waits."""
        share.waiting -= 1
        self.waiting -= 1
        if not self.waiting:
            self._level = max(self._level, share.sure)
            self._forget()

    def charge(self, tenant: str, tokens: float) -> None:
        """
        The tenant was given so many weighted tokens; negative: so many fewer than were charged before.

        Free while nobody waits.
        """
        share = self.of(tenant)
        if tokens < 0.0:
            share.counter += tokens / share.weight
            self._lowest.note(share)
        elif self.waiting:
            share.counter += tokens / share.weight

    def floor(self) -> float:
        """
        What a newcomer's counter is lifted to: the lowest of those who wait, or where nobody does, of the last who did.

        Estimates are left out, for they fall when they are settled, and the newcomer would not.
        """
        lowest = self._lowest.first()
        return self._level if lowest is None else lowest.sure

    def _weight_of(self, tenant: str) -> float:
        return max(self._weight(tenant), LEAST_WEIGHT)

    def _forget(self) -> None:
        """Nobody waits: who would be lifted anyway need not be remembered."""
        self._lowest = Lowest(_counter)
        if len(self._shares) > self._look_at:
            level = self._level
            self._shares = {
                tenant: share for tenant, share in self._shares.items() if share.counter > level or share.unsettled
            }
            self._look_at = KEPT_ANYWAY + 2 * len(self._shares)


def _counter(share: Share) -> tuple[float, int] | None:
    """Those who do not wait do not count."""
    return (share.counter, 0) if share.waiting else None
