"""Retries: which failures, how soon, and how many at most."""

from __future__ import annotations

import inspect
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core import errors
from sutazai.policy.retry import WINDOW_S, RetryBudget, RetryRules, is_retryable, pause_s

RULES = RetryRules(attempts=3, budget_ratio=0.2, budget_minimum_per_s=3.0, backoff_s=0.025, backoff_max_s=1.0)

rules_of_any_kind = st.builds(
    RetryRules,
    attempts=st.integers(1, 5),
    budget_ratio=st.floats(0, 2),
    budget_minimum_per_s=st.floats(0, 10),
    backoff_s=st.floats(0, 2),
    backoff_max_s=st.floats(0, 5),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("requests"), st.integers(0, 200)),
        st.tuples(st.just("wait"), st.floats(0, 30)),
        st.tuples(st.just("back"), st.floats(0, 30)),
        st.tuples(st.just("retries"), st.integers(1, 100)),
    ),
    max_size=60,
)


def rejected(status: int) -> errors.NodeRejected:
    return errors.NodeRejected("It said no.", node="a", status=status)


@given(rules_of_any_kind, steps)
def test_no_sequence_of_requests_and_times_gets_more_retries_than_the_budget(
    rules: RetryRules, sequence: list[tuple[str, float]]
) -> None:
    """All retries <= ratio x all requests + what is always allowed; the clock may even go backwards."""
    budget = RetryBudget(rules)
    now = 50.0
    seen = [now]
    requests = retries = 0
    budget.note_requests(0, now)
    for what, amount in sequence:
        if what == "requests":
            requests += int(amount)
            budget.note_requests(int(amount), now)
        elif what == "retries":
            retries += sum(budget.take(now) for _ in range(int(amount)))
        else:
            now += amount if what == "wait" else -amount
            seen.append(now)

    always = rules.budget_minimum_per_s * (WINDOW_S + math.log(2) * (max(seen) - seen[0]))
    assert retries <= rules.budget_ratio * requests + always + 1e-6


@given(st.integers(0, 500))
def test_a_whole_budget_can_be_used(requests: int) -> None:
    budget = RetryBudget(RULES)
    budget.note_requests(requests, 0.0)
    taken = sum(budget.take(0.0) for _ in range(1000))

    assert taken == math.floor(0.2 * requests + 30 + 1e-9)


def test_a_budget_that_was_used_up_comes_back_with_time() -> None:
    budget = RetryBudget(RULES)
    while budget.take(0.0):
        pass

    assert not budget.take(0.1)
    assert budget.take(1.0)


def test_nothing_is_retried_where_the_settings_allow_none() -> None:
    budget = RetryBudget(replace(RULES, budget_ratio=0.0, budget_minimum_per_s=0.0))
    budget.note_requests(1000, 0.0)

    assert not budget.take(0.0)


def test_old_requests_give_no_new_retries() -> None:
    budget = RetryBudget(replace(RULES, budget_minimum_per_s=0.0))
    budget.note_requests(1000, 0.0)

    assert not budget.take(100.0 + WINDOW_S)


@given(st.integers(1, 10_000), rules_of_any_kind, st.integers(0, 2**32).map(random.Random))
def test_a_pause_stays_within_its_bounds(attempt: int, rules: RetryRules, seed: random.Random) -> None:
    pause = pause_s(attempt, rules, seed.random)

    assert 0.0 <= pause <= rules.backoff_max_s
    assert pause <= rules.backoff_s * 2.0 ** min(attempt - 1, 60)


def test_pauses_double_up_to_their_bound() -> None:
    longest = [pause_s(attempt, RULES, lambda: 1.0) for attempt in range(1, 9)]

    assert longest == [0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


@pytest.mark.parametrize("status", range(300, 600))
def test_only_refusals_that_another_node_may_not_share_are_retried(status: int) -> None:
    assert is_retryable(rejected(status)) == (status in {429, 502, 503})


def test_a_node_that_kept_silent_is_not_replaced_but_one_that_did_not_accept_is() -> None:
    assert not is_retryable(errors.NodeTimeout("It was silent.", node="a"))
    assert is_retryable(errors.NodeTimeout("It did not accept.", node="a", connecting=True))
    assert is_retryable(errors.NodeUnreachable("It was reset.", node="a"))


def test_no_error_without_a_node_is_retried() -> None:
    kinds = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.SutazaiError) and not issubclass(kind, errors.NodeFault)
    ]
    assert len(kinds) > 10
    assert not any(is_retryable(kind.__new__(kind)) for kind in kinds)
