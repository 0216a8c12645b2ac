"""Where it is counted what tenants and keys took, when several gateways share the count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sutazai.core.identity import Allowance
from sutazai.policy.rate_limit import Amounts, Bounds, Verdict


@dataclass(slots=True)
class Settlement:
    """The end of a request that had asked."""

    bounds: Bounds
    request_id: str
    estimated: Amounts
    """What it asked for."""
    true: Amounts
    """What it took. Tokens and money are corrected; a request and its bytes are known beforehand."""
    was_taken: bool
    """The store said yes to it. False: the store did not answer, and what it knows of the request is to be found."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What was taken in a calendar month, as the usage ledger has it."""

    tenant: str
    key_id: str
    """Empty: all of the tenant."""
    tokens: int
    money: float


class LimitStore(Protocol):
    """
    Counts that all gateways see.

    Each method raises `StoreUnavailable` within the store's own time limit and never anything else; the caller then
    counts by itself.
    """

    async def take(self, bounds: Bounds, request_id: str, amounts: Amounts) -> Verdict:
        """
        Take from all limits at once, or from none.

        Where `bounds.is_settled`, the request then has a place: it counts among the concurrent ones until `settle`,
        or until nobody renewed it for a while. A cancellation leaves open whether anything was taken.
        """

    async def settle(self, settlement: Settlement) -> None:
        """
        Give back or take the difference, and end the request's place. May be repeated for what `was_taken`.

        A request that has no place any more stays with its estimate; one that never had one is charged in full.
        """

    async def renew(self, held: Sequence[tuple[Allowance, str]]) -> int:
        """Keep these places, by request id, and say that this gateway is alive; how many gateways are, at least 1."""

    async def seed(self, spent: Sequence[Spent], *, month: int) -> None:
        """Raise the sums of a month (`policy.rate_limit.month_of`) to at least these; another month changes nothing."""
