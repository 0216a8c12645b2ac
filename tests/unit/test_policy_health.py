"""What outcomes say of a node, and when it is down."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core import errors
from sutazai.core.node import Health
from sutazai.policy.health import Outcome, health_after, outcome_of

LIMIT = 3


def rejected(status: int) -> errors.NodeRejected:
    return errors.NodeRejected("It said no.", node="a", status=status)


@given(st.sampled_from(Health), st.integers(1, 10), st.integers(1, 10))
def test_a_success_brings_any_node_up_and_enough_failures_take_any_down(health: Health, limit: int, more: int) -> None:
    assert health_after(health, 0, limit) is Health.UP
    assert health_after(health, limit - 1 + more, limit) is Health.DOWN


@given(st.integers(2, 10))
def test_a_node_stays_up_until_the_last_failure_that_is_allowed(limit: int) -> None:
    healths = [health_after(Health.UP, failures, limit) for failures in range(1, limit + 1)]

    assert healths == [Health.UP] * (limit - 1) + [Health.DOWN]


def test_a_node_that_is_down_comes_back_by_a_success_alone() -> None:
    assert health_after(Health.DOWN, 1, LIMIT) is Health.DOWN


def test_a_node_that_fails_its_first_probe_is_down_at_once() -> None:
    assert health_after(Health.UNKNOWN, 1, LIMIT) is Health.DOWN


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (errors.NodeUnreachable("It was reset.", node="a"), Outcome.GONE),
        (errors.NodeTimeout("It was silent.", node="a"), Outcome.GONE),
        (errors.NodeTimeout("It did not accept.", node="a", connecting=True), Outcome.GONE),
        (rejected(429), Outcome.BUSY),
        (rejected(503), Outcome.BUSY),
        (rejected(500), Outcome.SICK),
        (rejected(502), Outcome.SICK),
        (rejected(504), Outcome.SICK),
        (rejected(501), Outcome.GOOD),
        (rejected(400), Outcome.GOOD),
        (rejected(404), Outcome.GOOD),
        (rejected(422), Outcome.GOOD),
    ],
)
def test_an_error_of_a_node_says_this(error: errors.SutazaiError, outcome: Outcome) -> None:
    assert outcome_of(error) is outcome


def test_an_error_that_is_not_the_nodes_says_nothing_of_it() -> None:
    kinds = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.SutazaiError) and not issubclass(kind, errors.NodeFault)
    ]
    assert len(kinds) > 10
    assert {outcome_of(kind.__new__(kind)) for kind in kinds} == {Outcome.NEITHER}
