"""How many messages a worker may hold, by how long attempts have taken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sutazai.policy.prefetch import CALM_S, FAST_S, NONE_WAITS, Pace, PrefetchRules

RULES = PrefetchRules(slow=1, fast=10)
SECONDS = st.floats(0, 1e6)


@given(start=SECONDS, passed_s=st.floats(0, CALM_S, exclude_max=True))
def test_a_worker_that_knows_nothing_yet_holds_only_what_runs(start: float, passed_s: float) -> None:
    pace = Pace(start)

    assert pace.prefetch(RULES, slots=32, now=start) == 32
    assert pace.prefetch(RULES, slots=32, now=start + passed_s / 2) == 32


@given(st.lists(st.floats(0, FAST_S, exclude_max=True), max_size=50), st.integers(1, 100))
def test_messages_may_wait_once_all_attempts_were_quick_for_a_while(took_s: list[float], slots: int) -> None:
    pace = Pace(0.0)
    for number, each in enumerate(took_s):
        pace = pace.after(each, now=number)

    assert pace.prefetch(RULES, slots=slots, now=CALM_S) == 10 * slots


@given(st.floats(FAST_S, 1e5), st.floats(0, 0.99 * CALM_S))
def test_one_slow_attempt_ends_that_at_once(took_s: float, later_s: float) -> None:
    pace = Pace(0.0).after(took_s, now=1000.0)

    assert pace.prefetch(RULES, slots=4, now=1000.0 + later_s) == 4


def test_usually_none_waits_however_quick_all_are() -> None:
    assert Pace(0.0).prefetch(NONE_WAITS, slots=32, now=1e6) == 32
