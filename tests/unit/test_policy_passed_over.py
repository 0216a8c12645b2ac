"""Classes that were passed over get their share, and no more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sutazai.policy.passed_over import EVERY, PassedOver

sizes = st.integers(1, 50)


@given(st.lists(st.tuples(sizes, sizes, sizes), max_size=60))
def test_no_more_than_the_share_are_taken_of_those_that_were_passed_over(takes: list[tuple[int, int, int]]) -> None:
    """However many are wanted, and however many there are of either kind."""
    owed, count, passed_over, largest = PassedOver(), 0, 0, 0
    for at_most, waiting_too_long, others in takes:
        lower = min(owed.places(at_most), waiting_too_long)
        taken = min(at_most, lower + others)
        owed.took(taken, passed_over=lower)
        count, passed_over, largest = count + taken, passed_over + lower, max(largest, at_most)

        assert EVERY * passed_over < count + largest + EVERY


@given(st.lists(sizes, min_size=1, max_size=60))
def test_while_both_wait_the_share_is_reached(takes: list[int]) -> None:
    owed, passed_over = PassedOver(), 0
    for at_most in takes:
        lower = owed.places(at_most)
        owed.took(at_most, passed_over=lower)
        passed_over += lower

    assert passed_over == sum(takes) // EVERY
