"""How fake servers share their slots: whatever comes and goes, nobody is lost and no slot is given twice."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from sutazai.testing.capacity import PENDING_LIMIT, Line, Scheduler, Tally, Ticket
from sutazai.testing.steps import LoadOptions, TakeSlot

OPTIONS = (LoadOptions(4096), LoadOptions(8192))
MODELS = ("a", "b", "c")

arrivals = st.tuples(st.sampled_from(MODELS), st.sampled_from(OPTIONS), st.booleans())
moves = st.lists(st.one_of(arrivals, st.integers(0, 20)), max_size=60)
"""A request that comes, or which of those present leaves next."""


def take(capacity: Line | Scheduler, wish: TakeSlot, granted: list[TakeSlot]) -> Ticket:
    """Claim a slot; the wish is noted when it comes true."""
    ticket = capacity.take(wish, lambda: granted.append(wish))
    assert ticket is not None
    return ticket


@given(moves=moves, slots=st.integers(1, 3), max_loaded=st.integers(1, 3))
def test_an_ollama_never_overfills_and_never_forgets(
    moves: list[tuple[str, LoadOptions, bool] | int], slots: int, max_loaded: int
) -> None:
    tally = Tally()
    scheduler = Scheduler(slots, max_loaded, 0.0, tally)
    present: list[Ticket] = []
    for move in moves:
        if isinstance(move, tuple):
            present.append(take(scheduler, TakeSlot(*move), []))
        elif present:
            scheduler.leave(present.pop(move % len(present)))
        working = defaultdict[str, list[TakeSlot]](list)
        for ticket in present:
            if ticket.holds_slot:
                working[ticket.wish.model].append(ticket.wish)

        assert tally.active == sum(map(len, working.values()))
        assert tally.active + tally.waiting == len(present)
        assert tally.active > 0 or not present
        assert len(scheduler.loaded()) <= max_loaded
        for model, wishes in working.items():
            assert len(wishes) <= slots
            assert {wish.options.context_tokens for wish in wishes} == {scheduler.loaded()[model]}
    for ticket in present:
        scheduler.leave(ticket)

    assert (tally.active, tally.waiting) == (0, 0)


@given(moves=moves, slots=st.integers(1, 4))
def test_a_line_serves_in_order_of_arrival(moves: list[tuple[str, LoadOptions, bool] | int], slots: int) -> None:
    tally = Tally()
    line = Line(slots, tally)
    granted: list[TakeSlot] = []
    present: list[Ticket] = []
    for move in moves:
        if isinstance(move, tuple):
            present.append(take(line, TakeSlot(*move), granted))
        elif present:
            line.leave(present.pop(move % len(present)))

        assert [ticket.holds_slot for ticket in present] == [index < slots for index in range(len(present))]
        assert tally.active == min(slots, len(present))


def test_too_many_that_wait_for_a_load_are_turned_away() -> None:
    scheduler = Scheduler(1, 1, 0.0, Tally())
    take(scheduler, TakeSlot("a", OPTIONS[0]), [])
    for _ in range(PENDING_LIMIT):
        take(scheduler, TakeSlot("b", OPTIONS[0]), [])

    assert scheduler.take(TakeSlot("b", OPTIONS[0]), lambda: None) is None


def test_a_request_for_a_loaded_model_overtakes_those_that_wait_for_a_load() -> None:
    scheduler = Scheduler(2, 1, 0.0, Tally())
    take(scheduler, TakeSlot("a", OPTIONS[0]), [])
    waiting = take(scheduler, TakeSlot("b", OPTIONS[0]), [])
    overtaking = take(scheduler, TakeSlot("a", OPTIONS[0]), [])

    assert overtaking.holds_slot
    assert not waiting.holds_slot
