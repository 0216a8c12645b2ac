"""The ledger writes exactly what was noted, whatever the store does."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sutazai.core.errors import StoreUnavailable
from sutazai.gateway.ledger import BATCH_ROWS, MAX_ROWS, OTHER, Ledger
from sutazai.ports.keys import UsageRow
from sutazai.testing.keys import MemoryStore

NOON_S = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Note = tuple[str, str, bool, int, int]
"""Key, model, failed, input and output tokens."""


class Clock:
    """A wall clock that stands still until told."""

    def __init__(self) -> None:
        self.now_s = NOON_S

    def __call__(self) -> float:
        return self.now_s


class Moody(MemoryStore):
    """A store that asks before each write whether it is away."""

    def __init__(self, is_away: Callable[[], bool]) -> None:
        super().__init__()
        self._is_away = is_away

    async def add(self, rows: Sequence[UsageRow]) -> None:
        if self._is_away():
            raise StoreUnavailable("The store was away. Wait.")
        await super().add(rows)


class Slow(MemoryStore):
    """A store whose writes last until `finish` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = asyncio.Event()
        self.finish = asyncio.Event()

    async def add(self, rows: Sequence[UsageRow]) -> None:
        self.begun.set()
        await self.finish.wait()
        await super().add(rows)


def note(ledger: Ledger, key: str = "k", model: str = "m", *, times: int = 1) -> None:
    for _ in range(times):
        ledger.note(key, "acme", model, error=False, input_tokens=2, output_tokens=3)


async def totals(store: MemoryStore) -> dict[tuple[str, str], tuple[int, int, int, int]]:
    rows = await store.total(since=EPOCH)
    return {(row.key_id, row.model): (row.requests, row.errors, row.input_tokens, row.output_tokens) for row in rows}


def expected(notes: Iterable[Note]) -> dict[tuple[str, str], tuple[int, int, int, int]]:
    sums: dict[tuple[str, str], tuple[int, int, int, int]] = {}
    for key, model, failed, taken, given_ in notes:
        requests, errors, input_tokens, output_tokens = sums.get((key, model), (0, 0, 0, 0))
        sums[key, model] = requests + 1, errors + failed, input_tokens + taken, output_tokens + given_
    return sums


async def flush_until_empty(ledger: Ledger) -> None:
    while ledger.waiting:
        try:
            await ledger.flush()
        except StoreUnavailable:
            continue


async def test_notes_are_added_up_by_key_and_model() -> None:
    store = MemoryStore()
    ledger = Ledger(store, wall_s=Clock())
    note(ledger, "k1", "a", times=2)
    ledger.note("k1", "acme", "a", error=True, input_tokens=0, output_tokens=0)
    note(ledger, "k2", "a")

    await ledger.flush()

    assert await totals(store) == {("k1", "a"): (3, 1, 4, 6), ("k2", "a"): (1, 0, 2, 3)}
    assert ledger.waiting == 0


async def test_a_note_belongs_to_the_hour_in_which_it_was_made() -> None:
    store, clock = MemoryStore(), Clock()
    ledger = Ledger(store, wall_s=clock)
    for now_s in (NOON_S, NOON_S + 3599.9, NOON_S + 3600, NOON_S + 7 * 3600, NOON_S + 1, NOON_S - 1):
        clock.now_s = now_s
        note(ledger)

    await ledger.flush()

    hours = [datetime(2026, 3, 1, hour, tzinfo=UTC) for hour in (11, 12, 13, 19)]
    later = [sum(row.requests for row in await store.total(since=hour)) for hour in hours]
    assert later == [6, 5, 2, 1]


async def test_ten_thousand_notes_are_exact_over_a_store_that_fails_at_random() -> None:
    chance = random.Random(1)
    store = Moody(lambda: chance.random() < 0.5)
    ledger = Ledger(store, wall_s=Clock())
    notes: list[Note] = [
        (f"k{chance.randrange(50)}", f"m{chance.randrange(40)}", chance.random() < 0.1, n % 97, n % 89)
        for n in range(10_000)
    ]

    for number, (key, model, failed, taken, given_) in enumerate(notes):
        ledger.note(key, "acme", model, error=failed, input_tokens=taken, output_tokens=given_)
        if number % 100 == 0:
            try:
                await ledger.flush()
            except StoreUnavailable:
                continue
    await flush_until_empty(ledger)

    assert await totals(store) == expected(notes)


NOTES = st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.booleans(), st.integers(0, 9), st.integers(0, 9))


@settings(max_examples=100, deadline=None)
@given(rounds=st.lists(st.tuples(st.lists(NOTES, max_size=5), st.booleans()), max_size=8))
async def test_whatever_was_noted_is_written_once(rounds: list[tuple[list[Note], bool]]) -> None:
    """No order of notes, writes and failures loses a note or counts one twice."""
    away = False
    store = Moody(lambda: away)
    ledger = Ledger(store, wall_s=Clock())

    for notes, fails in rounds:
        away = fails
        for key, model, failed, taken, given_ in notes:
            ledger.note(key, "acme", model, error=failed, input_tokens=taken, output_tokens=given_)
        try:
            await ledger.flush()
        except StoreUnavailable:
            continue
    away = False
    await ledger.flush()

    assert await totals(store) == expected(item for notes, _ in rounds for item in notes)


async def test_a_failure_half_way_keeps_only_what_was_not_written() -> None:
    answers = iter([False, True, False, False])
    store = Moody(lambda: next(answers))
    ledger = Ledger(store, wall_s=Clock())
    for number in range(2 * BATCH_ROWS + 1):
        note(ledger, f"k{number}")

    with pytest.raises(StoreUnavailable):
        await ledger.flush()

    assert len(await totals(store)) == BATCH_ROWS
    assert ledger.waiting == BATCH_ROWS + 1
    await ledger.flush()
    assert set((await totals(store)).values()) == {(1, 0, 2, 3)}
    assert len(await totals(store)) == 2 * BATCH_ROWS + 1


async def test_notes_made_during_a_write_are_kept_for_the_next() -> None:
    store = Slow()
    ledger = Ledger(store, wall_s=Clock())
    note(ledger)
    writing = asyncio.create_task(ledger.flush(), name="flush")
    await store.begun.wait()

    note(ledger, times=4)
    store.finish.set()
    await writing

    assert await totals(store) == {("k", "m"): (1, 0, 2, 3)}
    await ledger.flush()
    assert await totals(store) == {("k", "m"): (5, 0, 10, 15)}


async def test_two_writes_at_once_count_nothing_twice() -> None:
    store = Slow()
    ledger = Ledger(store, wall_s=Clock())
    note(ledger)
    store.finish.set()

    await asyncio.gather(ledger.flush(), ledger.flush())

    assert await totals(store) == {("k", "m"): (1, 0, 2, 3)}


async def test_a_cancelled_write_is_finished_first_and_counted_once() -> None:
    store = Slow()
    ledger = Ledger(store, wall_s=Clock())
    note(ledger)
    writing = asyncio.create_task(ledger.flush(), name="flush")
    await store.begun.wait()

    for _ in range(3):
        writing.cancel()
        await asyncio.sleep(0)
    assert not writing.done()
    store.finish.set()
    with pytest.raises(asyncio.CancelledError):
        await writing

    assert ledger.waiting == 0
    await ledger.flush()
    assert await totals(store) == {("k", "m"): (1, 0, 2, 3)}


async def test_the_ledger_writes_now_and_then_and_once_more_at_the_end() -> None:
    store = Slow()
    store.finish.set()
    ledger = Ledger(store, wall_s=Clock(), flush_s=0.001)
    note(ledger)
    running = asyncio.create_task(ledger.run(), name="ledger")
    await store.begun.wait()

    note(ledger)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert await totals(store) == {("k", "m"): (2, 0, 4, 6)}


async def test_the_ledger_outlives_a_store_that_is_away() -> None:
    tried = asyncio.Event()
    back = asyncio.Event()

    def is_away() -> bool:
        tried.set()
        return not back.is_set()

    store = Moody(is_away)
    ledger = Ledger(store, wall_s=Clock(), flush_s=0.001)
    note(ledger)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(ledger.run(), name="ledger")
        await tried.wait()
        back.set()
        tried.clear()
        await tried.wait()
        running.cancel()

    assert ledger.last_error == ""
    assert await totals(store) == {("k", "m"): (1, 0, 2, 3)}


async def test_the_ledger_says_why_it_could_not_write() -> None:
    tried = asyncio.Event()

    def is_away() -> bool:
        tried.set()
        return True

    ledger = Ledger(Moody(is_away), wall_s=Clock(), flush_s=0.001)
    note(ledger)
    running = asyncio.create_task(ledger.run(), name="ledger")
    await tried.wait()

    running.cancel()
    await asyncio.wait([running])

    assert ledger.last_error == "The store was away. Wait."
    assert ledger.waiting == 1


async def test_past_the_bound_new_models_of_a_key_are_counted_together() -> None:
    store = MemoryStore()
    ledger = Ledger(store, wall_s=Clock())
    for number in range(MAX_ROWS + 500):
        note(ledger, f"k{number % 10}", f"m{number}")

    assert ledger.waiting == MAX_ROWS + 10
    note(ledger, "k0", "m0")
    await ledger.flush()

    sums = await totals(store)
    assert sum(requests for requests, *_ in sums.values()) == MAX_ROWS + 501
    assert sums["k0", "m0"] == (2, 0, 4, 6)
    assert sums["k0", OTHER] == (50, 0, 100, 150)


async def test_a_long_outage_takes_no_more_memory_than_the_bound() -> None:
    clock = Clock()
    away = True
    store = Moody(lambda: away)
    ledger = Ledger(store, wall_s=clock)
    noted: Counter[str] = Counter()
    for hour in range(60):
        clock.now_s = NOON_S + 3600 * hour
        for number in range(300):
            noted[f"k{number % 10}"] += 1
            note(ledger, f"k{number % 10}", f"m{number}")
        with pytest.raises(StoreUnavailable):
            await ledger.flush()

    assert ledger.waiting <= MAX_ROWS + 10
    away = False
    await ledger.flush()
    written: Counter[str] = Counter()
    for (key, _), (requests, *_) in (await totals(store)).items():
        written[key] += requests
    assert written == noted


async def test_after_an_outage_models_are_told_apart_again() -> None:
    store = MemoryStore()
    ledger = Ledger(store, wall_s=Clock())
    for number in range(MAX_ROWS + 1):
        note(ledger, "k", f"m{number}")
    await ledger.flush()

    note(ledger, "k", "new")
    await ledger.flush()

    assert (await totals(store))["k", "new"] == (1, 0, 2, 3)


async def test_odd_names_and_absurd_counts_do_not_block_the_store() -> None:
    store = MemoryStore()
    ledger = Ledger(store, wall_s=Clock())
    ledger.note("k", "acme", "a\x00\ud800", error=False, input_tokens=10**40, output_tokens=1)

    await ledger.flush()

    assert await totals(store) == {("k", "a??"): (1, 0, 2**53, 1)}
