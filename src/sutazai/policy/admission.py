"""
Who waits, who is next, and who is sent away: the waiting room of the gateway, without time or I/O of its own.

Requests wait by model, each model in a `Line` that is bounded by count and by bytes. Within a line the priority class
goes first, then the tenant that was given the fewest tokens (`policy/shares.py`), then the order of arrival. Between
lines a model that is in some node's memory goes before one that would have to be loaded, but only so long.

A class goes up by one request when it was passed over for long. Requests do not grow in rank by their age: those of a
greedy tenant are the oldest of all, and would go before those of tenants that were given less.

It works on anything with the fields of a `Ticket`, in a gateway as in a simulator.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Generic

from sutazai.policy.line import CLASSES, AnyTicket, Line, Owner
from sutazai.policy.routing import Room
from sutazai.policy.shares import Shares

BYTES_PER_TOKEN = 4
"""Of a request's body: the estimate of its input until the node tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRules:
    """What the settings say about waiting."""

    max_waiting: int
    """Requests in one line."""
    max_waiting_bytes: int
    """Their bodies together."""
    max_wait_s: float
    output_weight: float
    """What a token of the answer counts where one of the prompt counts 1."""
    promote_after_s: float
    """A class that is passed over for so long sends its first one up."""
    swap_patience_s: float
    """How long a line that needs a load lets others pass."""


@dataclass(frozen=True, slots=True)
class Shed(Generic[AnyTicket]):
    """A request that gets no place."""

    ticket: AnyTicket
    is_greedy: bool
    """Its tenant has more waiting than others have; else all have equally much."""


class WaitingRoom(Generic[AnyTicket]):
    """Every line, and the order among them."""

    def __init__(self, rules: AdmissionRules, *, weight: Callable[[str], float]) -> None:
        """
        An empty room.

        Args:
            weight: of a tenant.
        """
        self.rules = rules
        self.shares = Shares(weight)
        self.lines: dict[str, Line[AnyTicket]] = {}
        """By model; only such as somebody waits for."""
        self._orders = 0

    def tokens(self, input_tokens: float, output_tokens: float) -> float:
        """Weighted, as they are charged."""
        return input_tokens + self.rules.output_weight * output_tokens

    def charge(self, tenant: str, tokens: float) -> None:
        """
        The tenant was given so many weighted tokens; negative: so many fewer than were charged before.

        Free while nobody waits.
        """
        self.shares.charge(tenant, tokens)
        if tokens < 0.0:
            for line in self.lines.values():
                line.fell(tenant)

    def settle(self, tenant: str, charged: float) -> None:
        """The request for which `take` charged so much has ended, and was charged what it truly took."""
        self.shares.of(tenant).unsettled -= charged

    def join(self, ticket: AnyTicket) -> list[Shed[AnyTicket]]:
        """
        Let it wait.

        Returns:
            Those who get no place for it; their tickets are out already. It may be the newcomer itself, and then it
            is the only one.
        """
        request = ticket.request
        line = self.lines.get(request.model) or Line(ticket.joined_at)
        shed = self._make_room(line, ticket)
        if shed and shed[0].ticket is ticket:
            return shed
        self.lines[request.model] = line
        self._orders += 1
        ticket.order = self._orders
        line.add(ticket, self.shares.come(request.tenant))
        return shed

    def leave(self, ticket: AnyTicket) -> None:
        """It waits no more, and was not served."""
        model = ticket.request.model
        line = self.lines[model]
        self.shares.go(line.remove(ticket))
        if not line.count:
            del self.lines[model]

    def take(self, ticket: AnyTicket, now: float) -> float:
        """
        It is served now.

        Returns:
            The weighted tokens that its tenant was charged, an estimate of its input; to be settled when it ends.
        """
        request = ticket.request
        charged = self.tokens(len(request.body) / BYTES_PER_TOKEN, 0)
        self.charge(request.tenant, charged)
        self.shares.of(request.tenant).unsettled += charged
        line = self.lines[request.model]
        line.since = now
        line.have_turn(ticket.rank)
        self.leave(ticket)
        return charged

    def empty(self, model: str) -> list[AnyTicket]:
        """Send all away who wait for a model."""
        tickets: list[AnyTicket] = list(self.lines.get(model, ()))
        for ticket in tickets:
            self.leave(ticket)
        return tickets

    def pick(self, now: float, room: Callable[[str], Room]) -> AnyTicket | None:
        """
        Who is next for one slot that is free; still waits afterwards.

        Args:
            room: what the pool could do for a model now.

        Returns:
            None when there is room for nobody who waits.
        """
        best: AnyTicket | None = None
        best_key: tuple[bool, int, int, float, int] | None = None
        with_room: list[Line[AnyTicket]] = []
        for model, line in self.lines.items():
            space = room(model)
            if space is Room.NONE:
                continue
            with_room.append(line)
            self._promote(line, now)
            ticket = line.first()
            if ticket is None:
                continue
            in_time = space is Room.WARM or now - line.since < self.rules.swap_patience_s
            key = (in_time, -space, ticket.rank, self.shares.of(ticket.request.tenant).counter, ticket.order)
            if best_key is None or key < best_key:
                best, best_key = ticket, key
        if best is not None:
            for line in with_room:
                line.pass_over(best.rank, now)
        return best

    def position(self, ticket: AnyTicket) -> int:
        """
        Its place in line, from 1, as if all went on sharing fairly; of a newcomer, the place it would get.

        Takes time in proportion to the tenants in the line, and to the tenant's own requests.
        """
        line = self.lines.get(ticket.request.model)
        if line is None:
            return 1
        share = self.shares.of(ticket.request.tenant)
        owner = line.owners.get(share.tenant)
        lane = None if owner is None else owner.lanes[ticket.rank]
        turn = _turn(ticket, lane) if lane else 1
        first: float = next(iter(lane)).order if lane else inf
        counter = share.counter if share.waiting else max(share.counter, self.shares.floor())
        return line.ahead(ticket.rank, turn, share, (counter, first)) + 1

    def _promote(self, line: Line[AnyTicket], now: float) -> None:
        for rank in CLASSES[1:]:
            if line.was_passed_for(rank, now) >= self.rules.promote_after_s:
                self._orders += 1
                line.have_turn(rank)
                line.promote(rank, self._orders)

    def _make_room(self, line: Line[AnyTicket], ticket: AnyTicket) -> list[Shed[AnyTicket]]:
        """
        Whom to send away so that the newcomer fits.

        A tenant that would hold more than its equal part of the line gets no place. Where one holds less, another must
        hold more, so sending away the newest of the largest always makes room in the end.
        """
        rules, size = self.rules, ticket.size_bytes
        is_long = line.count >= rules.max_waiting
        is_large = line.size_bytes + size > rules.max_waiting_bytes
        if not is_long and not is_large:
            return []
        owner = line.owners.get(ticket.request.tenant)
        count, held = (owner.count, owner.size_bytes) if owner is not None else (0, 0)
        tenants = len(line.owners) + (not count)
        has_its_part = (is_long and (count + 1) * tenants > rules.max_waiting) or (
            is_large and (held + size) * tenants > rules.max_waiting_bytes
        )
        if has_its_part:
            is_greedy = count * tenants > line.count or (is_large and held * tenants > line.size_bytes)
            return [self._own_last(line, ticket, is_greedy=is_greedy)]
        shed: list[Shed[AnyTicket]] = []
        while line.count >= rules.max_waiting or line.size_bytes + size > rules.max_waiting_bytes:
            shed.append(self._largest_last(line, by_count=line.count >= rules.max_waiting))
        return shed

    def _own_last(self, line: Line[AnyTicket], ticket: AnyTicket, *, is_greedy: bool) -> Shed[AnyTicket]:
        """The newcomer, or of the same tenant one of a lower class in whose place it fits."""
        owner = line.owners.get(ticket.request.tenant)
        if owner is not None:
            last = owner.last()
            fits = line.size_bytes + ticket.size_bytes - last.size_bytes <= self.rules.max_waiting_bytes
            if last.rank > ticket.rank and fits and line.count <= self.rules.max_waiting:
                self.shares.go(line.remove(last))
                return Shed(last, is_greedy)
        return Shed(ticket, is_greedy)

    def _largest_last(self, line: Line[AnyTicket], *, by_count: bool) -> Shed[AnyTicket]:
        owners = line.owners.values()
        most = max(owners, key=_count) if by_count else max(owners, key=_size)
        last = most.last()
        self.shares.go(line.remove(last))
        return Shed(last, is_greedy=True)


def _turn(ticket: AnyTicket, lane: OrderedDict[AnyTicket, None]) -> int:
    """The place of a request in its lane, from 1; one that is not in it would come last."""
    if ticket not in lane:
        return len(lane) + 1
    return next(turn for turn, other in enumerate(lane, 1) if other is ticket)


def _count(owner: Owner[AnyTicket]) -> int:
    return owner.count


def _size(owner: Owner[AnyTicket]) -> int:
    return owner.size_bytes
