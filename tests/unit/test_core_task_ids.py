"""Ids of tasks sort as they were made."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.task import created_at_of, slot_in
from sutazai.core.task_ids import TaskIds

START = datetime(2026, 11, 1, 12, tzinfo=UTC)


@given(st.lists(st.integers(0, 3000), max_size=50))
def test_ids_sort_as_they_were_made_and_hold_their_millisecond(steps_us: list[int]) -> None:
    ids, now = TaskIds(random.Random(7).getrandbits), START
    made = []
    for step_us in steps_us:
        now += timedelta(microseconds=step_us)
        made.append(ids.next(now, 0xABC))
        assert slot_in(made[-1]) == 0xABC
        assert created_at_of(made[-1]) <= now < created_at_of(made[-1]) + timedelta(milliseconds=1)

    assert made == sorted(set(made))


def test_a_clock_that_was_set_back_is_followed() -> None:
    ids = TaskIds(random.Random(7).getrandbits)
    ids.next(START, 1)

    assert created_at_of(ids.next(START - timedelta(minutes=10), 1)) == START - timedelta(minutes=10)
