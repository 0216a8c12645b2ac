"""A task as the fold of its events: what may follow what, for every event at every moment."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.task import (
    CancelAsked,
    Cancelled,
    Checkpointed,
    Completed,
    Event,
    Failed,
    FailureReason,
    HandedBack,
    IllegalChange,
    Lost,
    Progressed,
    Released,
    Requeued,
    Retried,
    Started,
    Submitted,
    Suspended,
    Task,
    TaskDraft,
    TaskStatus,
    after,
    created_at_of,
    id_of,
    is_task_id,
    slot_in,
    task_id,
    uuid_of,
)

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
ID = task_id(NOW.timestamp(), 1)
DRAFT = TaskDraft(tenant="acme", agent="echo")
BITS = st.integers(0, 2**62 - 1)
SLOTS = st.integers(0, 4095)
MILLISECONDS = st.integers(0, 4_102_444_800_000)

fences = st.integers(0, 4)
tokens = st.integers(0, 1000)
times = st.integers(-1000, 1000).map(lambda seconds: NOW + timedelta(seconds=seconds))
reasons = st.sampled_from(FailureReason)
later_events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Released, by=st.just(ID)),
    st.builds(Started, worker=st.sampled_from(["anna", "bert"]), fence=fences),
    st.builds(Progressed, fence=fences, progress=st.just("{}")),
    st.builds(Checkpointed, fence=fences, checkpoint=st.just("{}")),
    st.builds(Suspended, fence=fences, waits_for=st.integers(0, 3), tokens=tokens),
    st.builds(HandedBack, fence=fences, run_at=times, tokens=tokens),
    st.builds(Lost, fence=fences),
    st.builds(Retried, fence=fences, reason=reasons, error=st.text(), run_at=times, tokens=tokens),
    st.builds(Completed, fence=fences, result=st.just("1"), tokens=tokens),
    st.builds(Failed, fence=fences, reason=reasons, error=st.text(), tokens=tokens),
    st.just(CancelAsked()),
    st.builds(Cancelled, fence=fences, tokens=tokens),
    st.builds(Requeued, run_at=times),
)
submissions = st.builds(Submitted, draft=st.just(DRAFT), waits_for=st.integers(0, 3))

HOLD = (Progressed, Checkpointed, Suspended, HandedBack, Lost, Retried, Completed)
"""Events that only the attempt under way may tell."""
NEXT = {
    TaskStatus.WAITING: {TaskStatus.WAITING, TaskStatus.PENDING, TaskStatus.FAILED, TaskStatus.CANCELLED},
    TaskStatus.PENDING: {TaskStatus.PROCESSING, TaskStatus.FAILED, TaskStatus.CANCELLED},
    TaskStatus.PROCESSING: set(TaskStatus),
    TaskStatus.COMPLETED: set(),
    TaskStatus.FAILED: {TaskStatus.PENDING},
    TaskStatus.CANCELLED: {TaskStatus.PENDING},
}


def story(first: Submitted, events: list[Event]) -> list[tuple[Task, Event, Task | None]]:
    """Each event with the task before it, and the one after it where it could happen."""
    task = after(None, first, id=ID, at=NOW)
    told: list[tuple[Task, Event, Task | None]] = []
    for number, event in enumerate(events):
        try:
            following = after(task, event, id=ID, at=NOW + timedelta(seconds=number))
        except IllegalChange:
            told.append((task, event, None))
        else:
            told.append((task, event, following))
            task = following
    return told


stories = st.builds(story, submissions, st.lists(later_events, max_size=60))


def processing(**fields: int | bool | str) -> Task:
    task = after(after(None, Submitted(DRAFT), id=ID, at=NOW), Started("anna", 1), id=ID, at=NOW)
    return replace(task, **fields)  # type: ignore[arg-type]


@given(MILLISECONDS, BITS)
def test_an_id_keeps_the_time_it_was_made_to_the_millisecond(milliseconds: int, bits: int) -> None:
    made = task_id(milliseconds / 1000, bits)

    assert abs((created_at_of(made).timestamp() * 1000) - milliseconds) < 1.001
    assert is_task_id(made)
    assert id_of(uuid_of(made)) == made
    assert (uuid_of(made).version, uuid_of(made).variant) == (7, "specified in RFC 4122")


@given(st.lists(st.tuples(MILLISECONDS, BITS), min_size=2, max_size=20))
def test_ids_sort_by_the_time_they_were_made(moments: list[tuple[int, int]]) -> None:
    ids = sorted(task_id(milliseconds / 1000, bits) for milliseconds, bits in moments)

    assert all(created_at_of(one) <= created_at_of(other) for one, other in pairwise(ids))


@given(BITS, BITS)
def test_all_random_bits_are_kept(one: int, other: int) -> None:
    assert (task_id(1.0, one) == task_id(1.0, other)) == (one == other)


@given(MILLISECONDS, BITS, SLOTS)
def test_an_id_keeps_the_slot_of_its_tenant_and_sorts_by_time_all_the_same(
    milliseconds: int, bits: int, slot: int
) -> None:
    made = task_id(milliseconds / 1000, bits, slot=slot)

    assert slot_in(made) == slot
    assert made < task_id(milliseconds / 1000 + 1, 0)
    assert uuid_of(made).version == 7
    assert slot_in("no id") == 0


@given(st.text(max_size=60))
def test_a_text_that_is_no_id_is_told_from_one(text: str) -> None:
    if is_task_id(text):
        assert id_of(uuid_of(text)).removeprefix("task_").isalnum()
    else:
        with pytest.raises((ValueError, OverflowError)):
            created_at_of(text)


@given(stories)
def test_an_event_gives_a_legal_next_state_or_is_refused(told: list[tuple[Task, Event, Task | None]]) -> None:
    for before, event, following in told:
        if following is not None:
            assert following.status in NEXT[before.status], event
            assert following.version == before.version + 1
            assert (following.id, following.draft, following.created_at) == (ID, DRAFT, before.created_at)


@given(stories)
def test_what_holds_of_every_task_holds_after_every_event(told: list[tuple[Task, Event, Task | None]]) -> None:
    for task in (following for _, _, following in told if following is not None):
        assert (task.ended_at is not None) == task.status.is_end
        assert (task.waits_for > 0) == (task.status is TaskStatus.WAITING)
        assert not (task.status.is_end and task.is_cancelling)
        assert (task.reason is None) or task.status is not TaskStatus.COMPLETED
        assert task.losses <= task.deliveries
        assert task.started_at is not None or task.deliveries == 0


@given(stories)
def test_the_fence_of_an_old_attempt_is_refused(told: list[tuple[Task, Event, Task | None]]) -> None:
    for before, event, following in told:
        if isinstance(event, HOLD) and (
            before.status is not TaskStatus.PROCESSING or getattr(event, "fence") != before.deliveries  # noqa: B009
        ):
            assert following is None


@given(stories)
def test_a_fence_is_given_once(told: list[tuple[Task, Event, Task | None]]) -> None:
    given_out = [event.fence for _, event, following in told if isinstance(event, Started) and following is not None]

    assert given_out == list(range(1, len(given_out) + 1))


@given(stories)
def test_tokens_of_all_attempts_add_up(told: list[tuple[Task, Event, Task | None]]) -> None:
    happened = [(event, following) for _, event, following in told if following is not None]

    if happened:
        assert happened[-1][1].tokens == sum(getattr(event, "tokens", 0) for event, _ in happened)


@given(stories)
def test_only_a_requeue_follows_an_end(told: list[tuple[Task, Event, Task | None]]) -> None:
    for before, event, following in told:
        if before.status.is_end and following is not None:
            assert isinstance(event, Requeued)
            assert (following.attempts, following.losses, following.reason) == (0, 0, None)


@given(later_events)
def test_nothing_happens_to_a_task_that_was_never_submitted(event: Event) -> None:
    with pytest.raises(IllegalChange, match="does not exist"):
        after(None, event, id=ID, at=NOW)


def test_a_task_is_submitted_once() -> None:
    task = after(None, Submitted(DRAFT), id=ID, at=NOW)

    with pytest.raises(IllegalChange, match="Submitted cannot happen"):
        after(task, Submitted(DRAFT), id=ID, at=NOW)


def test_a_task_that_is_to_run_later_is_pending_until_then() -> None:
    later = NOW + timedelta(hours=1)

    task = after(None, Submitted(replace(DRAFT, run_at=later)), id=ID, at=NOW)

    assert (task.status, task.run_at) == (TaskStatus.PENDING, later)


def test_a_task_goes_on_when_the_last_it_waited_for_has_ended() -> None:
    task = after(None, Submitted(DRAFT, waits_for=2), id=ID, at=NOW)

    once = after(task, Released("x"), id=ID, at=NOW)
    twice = after(once, Released("y"), id=ID, at=NOW + timedelta(seconds=9))

    assert (once.status, once.waits_for) == (TaskStatus.WAITING, 1)
    assert (twice.status, twice.run_at) == (TaskStatus.PENDING, NOW + timedelta(seconds=9))


def test_a_worker_that_is_gone_is_counted_and_its_successor_has_the_next_fence() -> None:
    task = after(processing(), Started("bert", 2), id=ID, at=NOW)

    assert (task.worker, task.deliveries, task.losses, task.attempts) == ("bert", 2, 1, 0)


def test_an_attempt_that_was_handed_back_or_suspended_is_no_loss() -> None:
    handed_back = after(processing(), HandedBack(1, NOW), id=ID, at=NOW)
    suspended = after(processing(), Suspended(1, 0), id=ID, at=NOW)

    for task in (handed_back, suspended):
        assert after(task, Started("bert", 2), id=ID, at=NOW).losses == 0


def test_an_attempt_whose_worker_is_gone_is_a_loss_and_no_failure() -> None:
    later = NOW + timedelta(seconds=9)
    task = after(processing(), Lost(1), id=ID, at=later)

    assert (task.status, task.run_at, task.losses, task.attempts) == (TaskStatus.PENDING, later, 1, 0)
    assert after(task, Started("bert", 2), id=ID, at=later).losses == 1


def test_a_task_asked_to_end_is_not_asked_again() -> None:
    asked = after(processing(), CancelAsked(), id=ID, at=NOW)

    assert asked.is_cancelling
    with pytest.raises(IllegalChange):
        after(asked, CancelAsked(), id=ID, at=NOW)


def test_the_refusal_says_how_the_task_stands() -> None:
    with pytest.raises(IllegalChange, match=f"Completed cannot happen to {ID}, which is processing in its delivery 1"):
        after(processing(), Completed(7, "1"), id=ID, at=NOW)
