"""How long others stood still, by one's own clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sutazai.policy.stillness import Stillness

STEP_S = 2.0
pauses = st.floats(0.1, STEP_S)


@given(st.lists(pauses, max_size=30))
def test_whoever_does_not_beat_stood_still_since_it_was_first_seen(steps: list[float]) -> None:
    watched, now = Stillness[str](longest_step_s=STEP_S, now=0.0), 0.0
    still_s = watched.look({"a": 7}, now=now)["a"]
    for step_s in steps:
        now += step_s
        still_s = watched.look({"a": 7}, now=now)["a"]

    assert abs(still_s - now) < 1e-6


@given(st.lists(st.tuples(pauses, st.integers(0, 3)), min_size=1, max_size=30))
def test_a_beat_begins_anew_and_others_are_not_asked(steps: list[tuple[float, int]]) -> None:
    watched, now, beat, since = Stillness[str](longest_step_s=STEP_S, now=0.0), 0.0, 0, 0.0
    watched.look({"a": 0, "b": 0}, now=now)
    for step_s, beats in steps:
        now += step_s
        beat += beats
        since = now if beats else since
        still = watched.look({"a": beat, "b": 0}, now=now)

        assert abs(still["a"] - (now - since)) < 1e-6
        assert abs(still["b"] - now) < 1e-6


def test_nobody_dies_of_an_observer_that_stood_still_itself() -> None:
    watched = Stillness[str](longest_step_s=STEP_S, now=0.0)
    watched.look({"a": 1}, now=0.0)

    assert watched.look({"a": 1}, now=1000.0) == {"a": STEP_S}


def test_whoever_left_and_comes_again_is_new() -> None:
    watched = Stillness[str](longest_step_s=STEP_S, now=0.0)
    watched.look({"a": 1}, now=0.0)
    watched.look({}, now=1.0)

    assert watched.look({"a": 1}, now=2.0) == {"a": 0.0}
