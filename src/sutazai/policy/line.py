"""
Those who wait for one model, in order: by class, then by what their tenants were given, then by their coming.

Everything is amortised constant or logarithmic time: a client that leaves is out at once and leaves nothing behind.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from itertools import islice
from math import ceil, inf
from typing import Generic, TypeVar

from sutazai.core.request import Priority, Request
from sutazai.policy.lowest import Lowest
from sutazai.policy.shares import Share

CLASSES = tuple(Priority)
MOST_LOOKED_AT = 64
"""Tenants, for a place in line: about an eighth off with more of them, and still quick."""


class Ticket:
    """One request that waits, or is about to. Its place in the room is the room's own business."""

    __slots__ = ("joined_at", "order", "rank", "request")

    def __init__(self, request: Request, now: float) -> None:
        self.request = request
        self.joined_at = now
        self.rank = int(request.priority)
        """Its class now."""
        self.order = 0
        """Its turn of coming into a class, among all."""

    @property
    def size_bytes(self) -> int:
        """What it holds in memory, about."""
        return len(self.request.body)


AnyTicket = TypeVar("AnyTicket", bound=Ticket)


class Owner(Generic[AnyTicket]):
    """One tenant in one line."""

    __slots__ = ("count", "lanes", "share", "size_bytes")

    def __init__(self, share: Share) -> None:
        self.share = share
        self.lanes: tuple[OrderedDict[AnyTicket, None], ...] = tuple(OrderedDict() for _ in CLASSES)
        """By class, first come first."""
        self.count = 0
        self.size_bytes = 0

    def key(self, rank: int) -> tuple[float, int] | None:
        """What decides its turn within a class; None where it has nobody there."""
        lane = self.lanes[rank]
        return (self.share.counter, next(iter(lane)).order) if lane else None

    def last(self) -> AnyTicket:
        """The newest request of its lowest class; it has one."""
        lane = next(lane for lane in reversed(self.lanes) if lane)
        return next(reversed(lane))


class Line(Generic[AnyTicket]):
    """Those who wait for one model."""

    __slots__ = ("_classes", "_next", "_passed_at", "count", "owners", "since", "size_bytes")

    def __init__(self, now: float) -> None:
        self.since = now
        """When one of it was served last, or else when the first came."""
        self.count = 0
        self.size_bytes = 0
        self.owners: dict[str, Owner[AnyTicket]] = {}
        """Tenants with a request in it."""
        self._next: tuple[Lowest[Owner[AnyTicket]], ...] = tuple(Lowest(partial(_key, rank)) for rank in CLASSES)
        """By class."""
        self._classes: tuple[dict[AnyTicket, None], ...] = tuple({} for _ in CLASSES)
        self._passed_at = [inf for _ in CLASSES]
        """By class: since when higher ones were served and it was not."""

    def __iter__(self) -> Iterator[AnyTicket]:
        """All who wait, by class."""
        for tickets in self._classes:
            yield from tickets

    def add(self, ticket: AnyTicket, share: Share) -> None:
        """Let it wait."""
        owner = self.owners.get(share.tenant)
        if owner is None:
            owner = self.owners[share.tenant] = Owner(share)
        owner.count += 1
        owner.size_bytes += ticket.size_bytes
        self.count += 1
        self.size_bytes += ticket.size_bytes
        self._enter(ticket, owner)

    def remove(self, ticket: AnyTicket) -> Share:
        """Take it out, from wherever it stands."""
        owner = self.owners[ticket.request.tenant]
        del owner.lanes[ticket.rank][ticket]
        self._leave_class(ticket)
        owner.count -= 1
        owner.size_bytes -= ticket.size_bytes
        self.count -= 1
        self.size_bytes -= ticket.size_bytes
        if not owner.count:
            del self.owners[owner.share.tenant]
        return owner.share

    def fell(self, tenant: str) -> None:
        """The tenant's counter is lower than it was."""
        owner = self.owners.get(tenant)
        if owner is not None:
            for rank in CLASSES:
                self._next[rank].note(owner)

    def first(self) -> AnyTicket | None:
        """Who is next."""
        for rank in CLASSES:
            owner = self._next[rank].first() if self._classes[rank] else None
            if owner is not None:
                return next(iter(owner.lanes[rank]))
        return None

    def pass_over(self, rank: int, now: float) -> None:
        """There was room, and somebody of this class was served, here or in another line."""
        for lower in CLASSES[rank + 1 :]:
            if self._classes[lower] and self._passed_at[lower] == inf:
                self._passed_at[lower] = now

    def have_turn(self, rank: int) -> None:
        """One of this class is served, or goes up a class in place of it."""
        self._passed_at[rank] = inf

    def was_passed_for(self, rank: int, now: float) -> float:
        """Seconds for which a class has been passed over."""
        return now - self._passed_at[rank]

    def promote(self, rank: int, order: int) -> None:
        """Move the first of a class up by one; there is one."""
        owner = self._next[rank].first()
        assert owner is not None  # noqa: S101 - a class that is passed over has somebody
        ticket = next(iter(owner.lanes[rank]))
        del owner.lanes[rank][ticket]
        self._leave_class(ticket)
        ticket.rank, ticket.order = rank - 1, order
        self._enter(ticket, owner)

    def ahead(self, rank: int, turn: int, share: Share, key: tuple[float, float]) -> int:
        """
        How many go before the `turn`-th request (from 1) that a tenant has in a class, if all share fairly from now on.

        An estimate: it takes requests to be alike, and nobody to come or leave; of many tenants it looks at some.

        Args:
            key: the tenant's counter, and the order of its first request in the class.
        """
        step = 1 + len(self.owners) // MOST_LOOKED_AT
        others = 0
        for owner in islice(self.owners.values(), 0, None, step):
            other, lane = owner.share, owner.lanes[rank]
            if lane and other is not share:
                goes_first = (other.counter, next(iter(lane)).order) < key
                others += step * min(len(lane), ceil((turn - (not goes_first)) * other.weight / share.weight))
        same_class = min(others + turn - 1, len(self._classes[rank]))
        return sum(len(self._classes[higher]) for higher in range(rank)) + same_class

    def _leave_class(self, ticket: AnyTicket) -> None:
        tickets = self._classes[ticket.rank]
        del tickets[ticket]
        if not tickets:
            self.have_turn(ticket.rank)

    def _enter(self, ticket: AnyTicket, owner: Owner[AnyTicket]) -> None:
        lane = owner.lanes[ticket.rank]
        lane[ticket] = None
        self._classes[ticket.rank][ticket] = None
        if len(lane) == 1:
            self._next[ticket.rank].note(owner)


def _key(rank: int, owner: Owner[AnyTicket]) -> tuple[float, int] | None:
    return owner.key(rank)
