"""What becomes of a delivery, and of an attempt that failed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.task import (
    Cancelled,
    Event,
    Failed,
    FailureReason,
    HandedBack,
    Retried,
    Started,
    Submitted,
    Task,
    TaskDraft,
    TaskStatus,
    after,
    task_id,
)
from sutazai.policy.tasks import (
    FASTEST_PER_S,
    FINAL,
    FULL_HOLDS_S,
    LONGEST_PAUSE_S,
    holds_count,
    on_delivery,
    on_failure,
    on_leaving,
)

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
ID = task_id(NOW.timestamp(), 1)
DRAFT = TaskDraft(tenant="acme", agent="echo", max_attempts=3)
PENDING = after(None, Submitted(DRAFT), id=ID, at=NOW)
PROCESSING = after(PENDING, Started("anna", 1), id=ID, at=NOW)


def delivered(task: Task, *, may_take_over: bool = False, delivery_limit: int = 20) -> Event | str:
    return on_delivery(task, worker="bert", may_take_over=may_take_over, delivery_limit=delivery_limit, now=NOW)


def failed(task: Task, reason: FailureReason = FailureReason.ERROR, *, random: float = 1.0) -> Event:
    return on_failure(task, reason, "It broke.", tokens=5, now=NOW, random=random)


def due(task: Task, deadline: datetime) -> Task:
    return replace(task, draft=replace(task.draft, deadline=deadline))


def test_a_pending_task_is_started() -> None:
    assert delivered(PENDING) == Started("bert", 1)


@pytest.mark.parametrize("status", [status for status in TaskStatus if status.is_end])
def test_word_of_a_task_that_has_ended_means_nothing(status: TaskStatus) -> None:
    assert delivered(replace(PENDING, status=status), may_take_over=True) == f"it is {status.value}"


def test_word_of_a_waiting_task_means_nothing() -> None:
    assert delivered(replace(PENDING, status=TaskStatus.WAITING)) == "it waits for other tasks"


def test_a_task_that_somebody_works_on_is_left_to_them() -> None:
    assert delivered(PROCESSING) == "anna works on it"


def test_a_task_whose_worker_is_gone_is_taken_over_with_the_next_fence() -> None:
    assert delivered(PROCESSING, may_take_over=True) == Started("bert", 2)


def test_a_task_past_its_deadline_is_not_started() -> None:
    late = delivered(due(PENDING, NOW))

    assert isinstance(late, Failed)
    assert (late.fence, late.reason) == (0, FailureReason.DEADLINE)
    assert isinstance(delivered(due(PENDING, NOW + timedelta(milliseconds=1))), Started)


def test_a_task_that_is_to_be_cancelled_ends_when_its_worker_is_gone() -> None:
    assert delivered(replace(PROCESSING, is_cancelling=True), may_take_over=True) == Cancelled(1)


def test_a_task_that_outlived_too_many_workers_is_given_up() -> None:
    last = delivered(replace(PROCESSING, losses=2), may_take_over=True, delivery_limit=3)

    assert isinstance(last, Failed)
    assert (last.fence, last.reason) == (1, FailureReason.DELIVERY_LIMIT)
    assert isinstance(delivered(replace(PROCESSING, losses=1), may_take_over=True, delivery_limit=3), Started)


def test_a_task_that_was_started_often_by_workers_that_lived_goes_on() -> None:
    assert delivered(replace(PENDING, deliveries=500), delivery_limit=3) == Started("bert", 501)


@given(
    status=st.sampled_from(TaskStatus),
    deliveries=st.integers(0, 30),
    losses=st.integers(0, 30),
    is_cancelling=st.booleans(),
    late=st.booleans(),
    may_take_over=st.booleans(),
)
def test_whatever_is_decided_can_happen(
    status: TaskStatus, deliveries: int, losses: int, is_cancelling: bool, late: bool, may_take_over: bool
) -> None:
    deadline = NOW - timedelta(seconds=1) if late else None
    task = replace(
        PENDING,
        status=status,
        deliveries=deliveries,
        losses=losses,
        is_cancelling=is_cancelling,
        draft=replace(DRAFT, deadline=deadline),
    )

    decision = delivered(task, may_take_over=may_take_over)

    if isinstance(decision, Event):
        assert after(task, decision, id=ID, at=NOW).version == task.version + 1


def test_a_failed_attempt_is_followed_by_another() -> None:
    assert failed(PROCESSING) == Retried(1, FailureReason.ERROR, "It broke.", NOW + timedelta(seconds=1), 5)


def test_the_last_attempt_that_fails_makes_a_dead_letter() -> None:
    assert failed(replace(PROCESSING, attempts=2)) == Failed(1, FailureReason.ERROR, "It broke.", 5)


@pytest.mark.parametrize("reason", [reason for reason in FailureReason if reason in FINAL])
def test_what_would_end_the_same_way_is_not_tried_again(reason: FailureReason) -> None:
    assert isinstance(failed(PROCESSING, reason), Failed)


def test_an_attempt_that_could_only_begin_after_the_deadline_is_not_made() -> None:
    assert isinstance(failed(due(PROCESSING, NOW + timedelta(seconds=1))), Failed)
    assert isinstance(failed(due(PROCESSING, NOW + timedelta(seconds=2))), Retried)


@given(st.integers(0, 98), st.floats(0, 1))
def test_the_pause_doubles_up_to_a_bound_and_is_a_random_part_of_it(attempts: int, random: float) -> None:
    task = replace(PROCESSING, attempts=attempts, draft=replace(DRAFT, max_attempts=100))

    event = failed(task, random=random)

    assert isinstance(event, Retried)
    pause_s = (event.run_at - NOW).total_seconds()
    assert pause_s == pytest.approx(min(LONGEST_PAUSE_S, 2.0**attempts) * random, abs=1e-5)


def test_a_worker_that_leaves_costs_no_attempt() -> None:
    event = on_leaving(PROCESSING, tokens=3, now=NOW)

    assert event == HandedBack(1, NOW, 3)
    assert after(PROCESSING, event, id=ID, at=NOW).attempts == 0


@given(st.integers(0, 1000), st.integers(0, 1000), st.floats(0, 10), st.integers(1, 1000))
def test_a_queue_is_counted_again_before_it_can_have_become_full(
    counted: int, added: int, age_s: float, limit: int
) -> None:
    by_others = age_s * FASTEST_PER_S

    if holds_count(counted, added, age_s, limit):
        assert counted >= limit or counted + added + by_others <= limit


def test_the_more_room_was_found_the_longer_a_count_holds() -> None:
    assert [holds_count(counted, 1000, 1.0, 100_000) for counted in (0, 50_000, 90_000)] == [True, True, False]


def test_a_full_queue_is_not_counted_for_each_who_is_refused() -> None:
    assert holds_count(10, 1, 0.0, 10)
    assert not holds_count(10, 1, FULL_HOLDS_S, 10)


@given(st.integers(1, 200), st.lists(st.integers(1, 30), min_size=1, max_size=100))
def test_one_who_submits_alone_passes_a_queue_s_length_by_no_more_than_one_batch(
    limit: int, batches: list[int]
) -> None:
    """The time between stands still, so that a count is made only where the rule wants one."""
    depth = counted = added = 0
    for batch in batches:
        if not holds_count(counted, added + batch, 0.0, limit):
            counted, added = depth, 0
        if counted < limit:
            depth, added = depth + batch, added + batch

    assert depth < limit + max(batches)
