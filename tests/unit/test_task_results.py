"""Results of tasks, small and large, and what is left of attempts that died."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.errors import StoreUnavailable, TooLarge
from sutazai.core.task import Completed, Started, Submitted, Task, TaskDraft, after, task_id
from sutazai.tasks.results import MAX_RESULT_BYTES, Results
from sutazai.testing.objects import MemoryObjects

LARGE = {"text": "ü" * 1000}
AT: Any = None


def begun(*, tenant: str = "acme", fence: int = 1) -> Task:
    """A task whose attempt of that number is under way."""
    id_ = task_id(1_767_225_600.0, 1)
    task = after(None, Submitted(TaskDraft(tenant=tenant, agent="echo")), id=id_, at=AT)
    for number in range(1, fence + 1):
        task = after(task, Started("w", number), id=id_, at=AT)
    return task


def ended(task: Task, event: Completed) -> Task:
    return after(task, event, id=task.id, at=AT)


@pytest.fixture
def objects() -> MemoryObjects:
    return MemoryObjects(max_object_bytes=2 * MAX_RESULT_BYTES)


@pytest.fixture
def results(objects: MemoryObjects) -> Results:
    return Results(objects, max_inline_bytes=1024)


async def test_a_small_result_is_in_the_event(results: Results, objects: MemoryObjects) -> None:
    event = await results.completed(begun(), {"text": "hi"}, tokens=3)

    assert event == Completed(1, '{"text":"hi"}', tokens=3)
    assert not objects.objects
    task = ended(begun(), event)
    assert await results.whole(task) is task


async def test_a_large_result_is_an_object_of_its_tenant(results: Results, objects: MemoryObjects) -> None:
    event = await results.completed(begun(tenant="Über"), LARGE, tokens=3)

    ((name, content),) = objects.objects.items()
    assert (event.result, event.result_object, event.result_bytes, event.tokens) == ("", name, len(content), 3)
    assert name.startswith("h-")
    task = ended(begun(tenant="Über"), event)
    assert task.result == ""
    assert msgspec.json.decode((await results.whole(task)).result) == LARGE


@given(st.integers(1000, 1050))
async def test_the_limit_is_in_bytes(length: int) -> None:
    objects = MemoryObjects()
    results = Results(objects, max_inline_bytes=1024)

    event = await results.completed(begun(), "x" * length, tokens=0)

    assert bool(event.result_object) == (length + len('""') > 1024)
    assert bool(objects.objects) == bool(event.result_object)
    assert msgspec.json.decode((await results.whole(ended(begun(), event))).result) == "x" * length


async def test_the_same_attempt_writes_over_what_it_wrote(results: Results, objects: MemoryObjects) -> None:
    first = await results.completed(begun(), LARGE, tokens=0)

    assert await results.completed(begun(), LARGE, tokens=0) == first
    assert len(objects.objects) == 1


async def test_what_an_attempt_left_is_deleted_by_the_one_that_completes(
    results: Results, objects: MemoryObjects
) -> None:
    await results.completed(begun(), LARGE, tokens=0)
    late = await results.completed(begun(fence=11), "late", tokens=0)
    assert not objects.objects

    event = await results.completed(begun(fence=11), LARGE, tokens=0)
    await results.completed(begun(fence=2), LARGE, tokens=0)  # taken for dead, and still at work

    assert late.result == '"late"'
    task = ended(begun(fence=11), event)
    assert msgspec.json.decode((await results.whole(task)).result) == LARGE


async def test_a_store_that_is_away_keeps_nothing_and_is_told(results: Results, objects: MemoryObjects) -> None:
    objects.is_away = True

    with pytest.raises(StoreUnavailable):
        await results.completed(begun(fence=2), LARGE, tokens=0)
    assert (await results.completed(begun(fence=2), "small", tokens=0)).result == '"small"'
    assert not objects.objects


async def test_a_result_that_is_lost_or_spoilt_is_told(results: Results, objects: MemoryObjects) -> None:
    task = ended(begun(), await results.completed(begun(), LARGE, tokens=0))

    objects.objects[task.result_object] += b" "
    with pytest.raises(StoreUnavailable, match="digest differs"):
        await results.whole(task)
    await objects.delete(task.result_object)
    with pytest.raises(StoreUnavailable, match=r"same `objects.url`"):
        await results.several([task])


async def test_a_result_past_every_limit_is_refused(results: Results, objects: MemoryObjects) -> None:
    with pytest.raises(ValueError, match="at most 16,777,216"):
        await results.completed(begun(), "x" * MAX_RESULT_BYTES, tokens=0)
    narrow = Results(MemoryObjects(max_object_bytes=2000), max_inline_bytes=1024)
    with pytest.raises(TooLarge):
        await narrow.completed(replace(begun()), LARGE, tokens=0)
    assert not objects.objects
