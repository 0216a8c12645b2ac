"""When a model on a node is left alone, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sutazai.policy.breaker import (
    Breaker,
    BreakerRules,
    Breakers,
    Counts,
    Position,
    fails_far_more,
    is_far_slower,
    left_alone,
)

NOW = 1000.0
RULES = BreakerRules()
ratios = st.floats(0, 1)


def broken(now: float = NOW, *, failed: int = 5, good: int = 0, rules: BreakerRules = RULES) -> Breaker:
    """A breaker after so many requests, the failed ones last."""
    breaker = Breaker()
    for is_failed in [False] * good + [True] * failed:
        breaker.note(now, rules, failed=is_failed, slow=False)
    return breaker


def slowed(now: float = NOW, rules: BreakerRules = RULES) -> Breaker:
    breaker = Breaker()
    for _ in range(5):
        breaker.note(now, rules, failed=False, slow=True)
    return breaker


def test_it_opens_when_enough_requests_failed_and_half_of_them() -> None:
    assert broken(failed=4).position(NOW) is Position.CLOSED, "four tell nothing"
    assert broken(failed=5).position(NOW) is Position.OPEN
    assert broken(failed=5, good=5).position(NOW) is Position.OPEN
    assert broken(failed=5, good=6).position(NOW) is Position.CLOSED


def test_it_opens_when_four_in_five_were_slow() -> None:
    breaker = Breaker()
    opened = [breaker.note(NOW, RULES, failed=False, slow=slow) for slow in [False, True, True, True, True]]

    assert opened == [False, False, False, False, True]
    assert breaker.opened_with == Counts(5, 0, 4)


def test_what_ended_before_the_window_does_not_count() -> None:
    breaker = broken(failed=4)

    assert not breaker.note(NOW + RULES.window_s, RULES, failed=True, slow=False)
    assert breaker.counts(NOW + RULES.window_s, RULES) == Counts(1, 1, 0)


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans(), st.booleans()), max_size=60), ratios, ratios)
def test_it_opens_exactly_when_a_ratio_of_the_window_is_reached(
    ended: Sequence[tuple[float, bool, bool]], error_ratio: float, slow_ratio: float
) -> None:
    """The window moves on by a tenth: what is looked at are the last 9 to 10 seconds."""
    rules = replace(RULES, error_ratio=error_ratio, slow_ratio=slow_ratio)
    breaker, now = Breaker(), NOW
    history: list[tuple[float, bool, bool]] = []
    for pause_s, failed, slow in ended:
        now += pause_s
        opened = breaker.note(now, rules, failed=failed, slow=slow)
        history.append((now, failed, slow))
        inner = [entry for entry in history if entry[0] > now - 9.0]
        outer = [entry for entry in history if entry[0] > now - 10.0]
        counts = breaker.opened_with if opened else breaker.counts(now, rules)

        assert len(inner) <= counts.all <= len(outer)
        reached = (failed or slow) and counts.all >= 5
        reached = reached and (
            (counts.failed > 0 and counts.error_ratio >= error_ratio)
            or (counts.slow > 0 and counts.slow_ratio >= slow_ratio)
        )
        assert opened == reached
        if opened:
            return


def test_a_good_request_opens_nothing_whatever_the_ratios_say() -> None:
    rules = replace(RULES, error_ratio=0.0, slow_ratio=0.0)

    assert broken(failed=0, good=50, rules=rules).position(NOW) is Position.CLOSED


def test_it_is_half_open_after_its_time_and_lets_one_pass() -> None:
    breaker = broken()
    before, after = breaker.passes(NOW + 4.9), breaker.passes(NOW + 5.0)
    breaker.on_trial = True

    assert (before, after) == (False, True)
    assert breaker.position(NOW + 5.0) is Position.HALF_OPEN
    assert not breaker.passes(NOW + 5.0)


def test_each_failed_trial_doubles_the_time_up_to_sixteen_times() -> None:
    breaker, now = broken(), NOW
    waits_s: list[float] = []
    for _ in range(8):
        waits_s.append(breaker.opens_until - now)
        now = breaker.opens_until
        breaker.on_trial = True
        breaker.open(now, RULES)

    assert waits_s == [5, 10, 20, 40, 80, 80, 80, 80]


def test_a_good_trial_begins_anew() -> None:
    breaker = broken()
    breaker.open(NOW + 5.0, RULES)
    breaker.close()
    for _ in range(4):
        breaker.note(NOW + 6.0, RULES, failed=True, slow=False)
    still = breaker.position(NOW + 6.0)
    breaker.note(NOW + 6.0, RULES, failed=True, slow=False)

    assert still is Position.CLOSED
    assert breaker.opens_until == NOW + 11.0


def test_what_was_sent_before_it_opened_decides_nothing() -> None:
    breaker = broken()
    before = breaker.opens_until
    for failed in (True, False):
        assert not breaker.note(NOW + 6.0, RULES, failed=failed, slow=False)

    assert breaker.opens_until == before
    assert breaker.position(NOW + 6.0) is Position.HALF_OPEN


@st.composite
def crowds(draw: st.DrawFn) -> tuple[dict[str, Breaker], list[str]]:
    """Nodes, and breakers of some of them in any position."""
    names = [f"n{number}" for number in range(draw(st.integers(0, 9)))]
    breakers: dict[str, Breaker] = {}
    for name in names:
        made = draw(st.sampled_from([None, "closed", "failing", "slow", "late", "trial"]))
        if made == "closed":
            breakers[name] = broken(failed=1)
        elif made == "failing":
            breakers[name] = broken(good=draw(st.integers(0, 4)))
        elif made == "slow":
            breakers[name] = slowed()
        elif made is not None:
            breakers[name] = broken(NOW - 20.0)
            breakers[name].on_trial = made == "trial"
    return breakers, names


@given(crowds(), ratios)
def test_never_all_are_left_alone_nor_more_than_may_be_nor_any_that_is_well(
    crowd: tuple[dict[str, Breaker], list[str]], most: float
) -> None:
    breakers, names = crowd
    rules = replace(RULES, max_ejected_ratio=most)
    alone = left_alone(breakers, names, NOW, rules)

    assert len(set(alone)) == len(alone)
    assert not names or len(alone) < len(names)
    assert len(alone) <= most * len(names) + 1e-6
    assert all(not breakers[name].passes(NOW) for name in alone)


@given(crowds())
def test_all_that_are_shut_are_left_alone_where_they_are_few(crowd: tuple[dict[str, Breaker], list[str]]) -> None:
    breakers, names = crowd
    shut = {name for name in names if name in breakers and not breakers[name].passes(NOW)}

    if len(shut) <= len(names) // 2 and len(shut) < len(names):
        assert set(left_alone(breakers, names, NOW, RULES)) == shut


def test_where_too_many_fail_the_worst_are_left_alone() -> None:
    breakers = {"worst": broken(), "bad": broken(good=3), "better": broken(good=5), "trying": broken(good=4)}

    assert left_alone(breakers, list(breakers), NOW, RULES) == ["worst", "bad"]


def test_where_too_many_are_slow_the_slow_are_let_go_and_the_failing_are_not() -> None:
    breakers = {"slow-1": slowed(), "slow-2": slowed(), "failing": broken()}

    assert left_alone(breakers, ["slow-1", "slow-2"], NOW, RULES) == []
    assert left_alone(breakers, [*breakers, "well"], NOW, RULES) == ["failing"]


@given(st.lists(st.integers(0, 20), max_size=5), st.integers(0, 40), st.integers(0, 40))
def test_an_outlier_by_errors_fails_at_least_four_times_as_often_as_the_others(
    others_failed: list[int], failed: int, good: int
) -> None:
    others = [Counts(20, count, 0) for count in others_failed]
    own = Counts(failed + good, failed, 0)

    if fails_far_more(own, others, RULES):
        assert own.all >= 10
        assert own.error_ratio >= 0.25
        assert 4 * sum(others_failed) <= own.error_ratio * 20 * len(others) + 1e-9


def test_a_node_is_an_outlier_only_beside_others() -> None:
    own = Counts(20, 8, 0)

    assert fails_far_more(own, [Counts(20, 1, 0)], RULES)
    assert fails_far_more(own, [Counts(0, 0, 0)], RULES)
    assert not fails_far_more(own, [], RULES)
    assert not fails_far_more(own, [Counts(20, 4, 0)], RULES), "the others fail too"


@pytest.mark.parametrize(
    ("recent_s", "usual_s", "others_s", "is_outlier"),
    [
        (10.0, 1.0, [1.0, 1.2, 0.8], True),
        (10.0, 1.0, [1.0, 9.0, 8.0], False),
        (10.0, 9.0, [1.0, 1.2, 0.8], False),
        (0.9, 0.01, [0.01], False),
        (10.0, 1.0, [], False),
    ],
    ids=["outlier", "others are slow too", "always was slow", "nobody minds", "no others"],
)
def test_a_node_is_far_slower_when_it_is_so_beside_others_and_beside_itself(
    recent_s: float, usual_s: float, others_s: Sequence[float], is_outlier: bool
) -> None:
    assert is_far_slower(recent_s, usual_s, others_s) == is_outlier


class ManyBreakers(RuleBasedStateMachine):
    """Requests end, trials begin and end, time passes: what holds of all breakers in any order of events."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.breakers = Breakers()
        self.trials: list[tuple[str, Breaker]] = []

    @rule(model=st.sampled_from("mn"), node=st.sampled_from("abc"), failed=st.booleans(), slow=st.booleans())
    def end(self, model: str, node: str, failed: bool, slow: bool) -> None:
        self.breakers.note(model, node, self.now, RULES, failed=failed, slow=slow)

    @rule(model=st.sampled_from("mn"), node=st.sampled_from("abc"))
    def begin_trial(self, model: str, node: str) -> None:
        breaker = self.breakers.begin_trial(model, node, self.now)
        if breaker is not None:
            assert breaker not in [trial for _, trial in self.trials], "one trial at a time"
            self.trials.append((f"{model}{node}", breaker))

    @precondition(lambda self: self.trials)
    @rule(is_good=st.booleans())
    def end_trial(self, is_good: bool) -> None:
        name, breaker = self.trials.pop()
        if is_good:
            self.breakers.close(breaker, *name)
            assert self.breakers.get(*name) is not breaker
        else:
            self.breakers.open(breaker, self.now, RULES)
            assert breaker.position(self.now) is Position.OPEN

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(node=st.sampled_from("abc"), models=st.sampled_from(["", "m", "mn"]))
    def tidy(self, node: str, models: str) -> None:
        self.breakers.tidy(self.now, RULES, node=node, models=models)
        left = [model for model, by_node in self.breakers.by_model.items() if node in by_node]
        assert set(left) <= set(models)
        assert not any(self.breakers.by_model[model][node].is_clean(self.now, RULES) for model in left)

    @invariant()
    def no_model_is_kept_without_a_breaker(self) -> None:
        assert all(self.breakers.by_model.values())

    @invariant()
    def what_is_open_closes_again_within_the_longest_time(self) -> None:
        for by_node in self.breakers.by_model.values():
            for breaker in by_node.values():
                assert breaker.opens_until <= self.now + 16 * RULES.open_s
                if not breaker.on_trial:
                    assert breaker.passes(max(self.now, breaker.opens_until))


TestManyBreakers = ManyBreakers.TestCase


def test_the_healthy_have_no_breakers() -> None:
    breakers = Breakers()
    for _ in range(100):
        breakers.note("m", "a", NOW, RULES, failed=False, slow=False)

    assert breakers.by_model == {}
