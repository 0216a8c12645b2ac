"""Rests of a worker between groups of tasks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.policy.rest import LONGEST_S, rest_s


@given(worked_s=st.floats(0.0, LONGEST_S), slots=st.integers(1, 1000), data=st.data())
def test_a_worker_works_half_of_its_time_where_places_are_free(
    worked_s: float, slots: int, data: st.DataObject
) -> None:
    free = data.draw(st.integers((slots + 1) // 2, slots))

    assert rest_s(worked_s, free=free, slots=slots) == worked_s


@given(worked_s=st.floats(0.0, 100.0), slots=st.integers(1, 1000), data=st.data())
def test_it_does_not_rest_where_places_are_waited_for(worked_s: float, slots: int, data: st.DataObject) -> None:
    free = data.draw(st.integers(-slots, (slots - 1) // 2))

    assert rest_s(worked_s, free=free, slots=slots) == 0.0


@pytest.mark.parametrize("worked_s", [LONGEST_S, 0.5, 30.0])
def test_a_slow_store_does_not_make_it_lazy(worked_s: float) -> None:
    assert rest_s(worked_s, free=8, slots=8) == LONGEST_S


def test_a_clock_that_stands_still_lets_it_go_on() -> None:
    assert rest_s(0.0, free=8, slots=8) == 0.0
    assert rest_s(-1e-9, free=8, slots=8) == 0.0
