"""What every store of tasks does: in memory and in PostgreSQL."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from tests.shards import addresses, two_shards

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import open_database
from sutazai.adapters.postgres.sharded.tasks import ShardedTaskStore
from sutazai.adapters.postgres.tasks import PostgresTaskStore
from sutazai.core.errors import BadRequest, Conflict, Overloaded
from sutazai.core.request import Priority
from sutazai.core.task import (
    Cancelled,
    Checkpointed,
    Completed,
    Event,
    Failed,
    FailureReason,
    HandedBack,
    Lost,
    Progressed,
    Requeued,
    Retried,
    Started,
    Suspended,
    Task,
    TaskDraft,
    TaskStatus,
    after,
    task_id,
)
from sutazai.ports.queue import Consumer, Message
from sutazai.ports.tasks import Change, Refused, Start, TaskFilter, TaskStore
from sutazai.settings.secret import Secret
from sutazai.testing.tasks import MemoryTaskStore

START = datetime(2126, 11, 1, 12, tzinfo=UTC)
"""Far from the time on any other clock, so that whoever looks at one would be noticed."""
MANY = 1000
LIMIT = 50
"""Of the queue, in tests that fill it."""
MISSING = task_id(START.timestamp(), 7)


class ListQueue:
    """Messages in a list."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def put(self, messages: Sequence[Message]) -> Sequence[Message]:
        self.messages += messages
        return ()

    def consume(self, queue: str, *, prefetch: int) -> AbstractAsyncContextManager[Consumer]:
        raise NotImplementedError

    async def depth(self, queue: str) -> int:
        return sum(message.queue == queue for message in self.messages)


class Wall:
    """A wall clock that stands still."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A store and what a test sees of its surroundings."""

    store: TaskStore
    wall: Wall
    words: Callable[[], Awaitable[Sequence[str]]]
    """Tasks that the queue holds word of, those for later too, in the order they came."""


@pytest.fixture(params=["memory", "postgres", "pgbouncer", "two shards"])
def urls(request: pytest.FixtureRequest) -> Sequence[str]:
    return addresses(request)


@pytest.fixture
async def place(urls: Sequence[str]) -> AsyncIterator[Place]:
    """An empty store with a queue of so many."""
    wall = Wall()
    if len(urls) > 1:
        async with two_shards(urls) as shards:
            sharded = ShardedTaskStore(shards, max_length=LIMIT, wall=wall)

            async def all_written() -> Sequence[str]:
                rows = [row for url in urls for row in await _query(url, "SELECT task FROM dispatch ORDER BY id")]
                return [f"task_{row['task'].hex}" for row in rows]

            yield Place(store=sharded, wall=wall, words=all_written)
        return
    if not urls:
        queue = ListQueue()
        memory = MemoryTaskStore(queue, max_length=LIMIT, wall=wall)

        async def told() -> Sequence[str]:
            return [message.task for message in queue.messages] + [word.task for _, word in memory.later]

        yield Place(store=memory, wall=wall, words=told)
        return
    (url,) = urls
    async with _opened(url, wall) as store:

        async def written() -> Sequence[str]:
            rows = await _query(url, "SELECT task FROM dispatch ORDER BY id")
            return [f"task_{row['task'].hex}" for row in rows]

        yield Place(store=store, wall=wall, words=written)


@pytest.fixture
def store(place: Place) -> TaskStore:
    return place.store


@pytest.fixture
async def postgres(server: str) -> AsyncIterator[PostgresTaskStore]:
    """The store in PostgreSQL, empty."""
    async with _opened(server, lambda: datetime.now(UTC)) as store:
        yield store


@asynccontextmanager
async def _opened(url: str, wall: Callable[[], datetime]) -> AsyncIterator[PostgresTaskStore]:
    await _query(url, "DROP SCHEMA public CASCADE")
    await _query(url, "CREATE SCHEMA public")
    async with open_database(Secret(url), timeout_s=20) as database:
        await migrate.migrate(database, migrate.read())
        yield PostgresTaskStore(database, max_length=LIMIT, wall=wall)


async def _query(url: str, statement: str, *arguments: object) -> Sequence[Any]:
    connection: Any = await asyncpg.connect(url)
    try:
        return list(await connection.fetch(statement, *arguments))
    finally:
        await connection.close()


def draft(tenant: str = "acme", **fields: Any) -> TaskDraft:
    return TaskDraft(**{"tenant": tenant, "agent": "echo"} | fields)


async def submitted(store: TaskStore, tenant: str = "acme", **fields: Any) -> Task:
    (task,) = await store.submit([draft(tenant, **fields)])
    return task


async def begun(store: TaskStore, *tasks: Task, worker: str = "anna", may_take_over: bool = False) -> Sequence[Task]:
    starts = [Start(task=task.id, may_take_over=may_take_over) for task in tasks]
    answers = await store.begin(starts, worker=worker, delivery_limit=3)
    for answer in answers:
        assert isinstance(answer, Task), answer
    return [answer for answer in answers if isinstance(answer, Task)]


async def refused(store: TaskStore, task: Task, *, may_take_over: bool = False, delivery_limit: int = 3) -> str:
    start = Start(task=task.id, may_take_over=may_take_over)
    (answer,) = await store.begin([start], worker="bert", delivery_limit=delivery_limit)
    assert isinstance(answer, Refused), answer
    return answer.why


async def changed(store: TaskStore, task: Task, event: Event) -> Task | None:
    (after_it,) = await store.change([Change(task=task.id, event=event)])
    return after_it


async def completed(store: TaskStore, task: Task, result: str = "1") -> Task:
    (started,) = await begun(store, task)
    done = await changed(store, started, Completed(started.deliveries, result))
    assert done is not None
    return done


async def gone_wrong(store: TaskStore, task: Task) -> Task:
    (started,) = await begun(store, task)
    failed = await changed(store, started, Failed(started.deliveries, FailureReason.ERROR, "It broke."))
    assert failed is not None
    return failed


async def now(store: TaskStore, task: Task) -> Task:
    found = await store.get(task.draft.tenant, task.id)
    assert found is not None
    return found


# Submitting


async def test_a_task_is_kept_as_it_was_asked_for(place: Place) -> None:
    asked = draft(
        user="key_1",
        input='{"text": "Grüße"}',
        queue="slow",
        priority=Priority.HIGH,
        run_at=START + timedelta(hours=1),
        deadline=START + timedelta(hours=2),
        max_attempts=7,
        time_limit_s=1.5,
        webhook="https://example.org/told",
        budget_tokens=10,
    )

    (task,) = await place.store.submit([asked])

    assert task.draft == asked
    assert (task.status, task.version, task.run_at) == (TaskStatus.PENDING, 1, asked.run_at)
    assert await now(place.store, task) == task
    assert await place.words() == [task.id]


async def test_tasks_come_back_in_the_order_of_their_drafts(place: Place) -> None:
    tasks = await place.store.submit([draft(agent=f"a{number}") for number in range(20)])

    assert [task.draft.agent for task in tasks] == [f"a{number}" for number in range(20)]
    assert await place.words() == [task.id for task in tasks]
    assert await place.store.submit([]) == []


async def test_an_idempotency_key_makes_one_task_of_a_tenant(place: Place) -> None:
    first = await submitted(place.store, idempotency_key="k", agent="one")
    again = await submitted(place.store, idempotency_key="k", agent="two")
    foreign = await submitted(place.store, "other", idempotency_key="k")

    assert again == first
    assert foreign.id != first.id
    assert await place.words() == [first.id, foreign.id]


async def test_a_used_key_gives_the_task_as_it_stands_now(store: TaskStore) -> None:
    done = await completed(store, await submitted(store, idempotency_key="k"))

    assert await submitted(store, idempotency_key="k") == done
    assert await store.of_key("acme", "k") == done


async def test_a_key_is_known_to_its_tenant_alone(store: TaskStore) -> None:
    await submitted(store, idempotency_key="k")

    assert await store.of_key("acme", "other") is None
    assert await store.of_key("other", "k") is None


async def test_a_key_twice_in_a_batch_makes_one_task(place: Place) -> None:
    one, other, third = await place.store.submit(
        [draft(idempotency_key="k"), draft(idempotency_key="k", agent="two"), draft()]
    )

    assert one == other
    assert await place.words() == [one.id, third.id]


async def test_a_key_used_by_many_at_once_makes_one_task(place: Place) -> None:
    answers = await asyncio.gather(
        *(place.store.submit([draft(idempotency_key="k"), draft(idempotency_key="l")]) for _ in range(20))
    )

    assert len({tuple(task.id for task in answer) for answer in answers}) == 1
    assert len(await place.words()) == 2


async def test_tasks_that_wait_are_counted_by_tenant(store: TaskStore) -> None:
    first, second = await store.submit([draft(), draft(run_at=START + timedelta(hours=1))])
    await submitted(store, after=(first.id,))
    await submitted(store, tenant="other")
    await begun(store, await submitted(store))
    await completed(store, await submitted(store))
    await store.cancel("acme", second.id)

    assert await store.waiting("acme", at_most=MANY) == 2
    assert await store.waiting("acme", at_most=1) == 1
    assert await store.waiting("nobody", at_most=MANY) == 0


async def test_a_full_queue_takes_no_more_and_keeps_nothing_of_it(store: TaskStore) -> None:
    await store.submit([draft() for _ in range(LIMIT)])

    with pytest.raises(Overloaded):
        await store.submit([draft(queue="other"), draft()])

    assert len(await store.page(None, TaskFilter(), limit=MANY)) == LIMIT
    assert (await submitted(store, queue="other")).status is TaskStatus.PENDING


@pytest.mark.parametrize("where", ["agent", "queue", "idempotency_key", "tenant", "user", "webhook", "input"])
@pytest.mark.parametrize("text", ["a\0b", "half a pair \ud83d"])
async def test_what_no_store_could_keep_is_refused_and_named(store: TaskStore, where: str, text: str) -> None:
    with pytest.raises(BadRequest, match=where):
        await store.submit([draft(), draft(**{where: text})])

    assert await store.page(None, TaskFilter(), limit=MANY) == []


async def test_names_have_a_bound(store: TaskStore) -> None:
    with pytest.raises(BadRequest, match="idempotency_key"):
        await submitted(store, idempotency_key="k" * 513)
    await submitted(store, idempotency_key="ü" * 512)


async def test_a_parent_that_is_no_task_is_refused(store: TaskStore) -> None:
    with pytest.raises(BadRequest, match="parent"):
        await submitted(store, parent="nobody")


@pytest.mark.parametrize("text", ['"\\u0000"', '"🦜\u2028\ufffe\U0010ffff"', '"\\ud800"', '"' + "x" * 100_000 + '"'])
async def test_any_json_goes_in_and_comes_out(store: TaskStore, text: str) -> None:
    task = await submitted(store, input=text)
    done = await completed(store, task, result=text)

    assert (done.draft.input, done.result) == (text, text)
    assert await now(store, done) == done


async def test_what_an_error_says_never_keeps_a_task_from_ending(store: TaskStore) -> None:
    (task,) = await begun(store, await submitted(store), worker="an\0na")

    failed = await changed(store, task, Failed(1, FailureReason.ERROR, "It said \0 and \udcff."))

    assert failed is not None
    assert (failed.worker, failed.error) == ("an?na", "It said ? and ?.")
    assert await now(store, task) == failed
    assert await refolded(store, failed) == failed


# Reading


async def test_a_foreign_tenant_sees_nothing_and_changes_nothing(store: TaskStore) -> None:
    task = await submitted(store)

    assert await store.get("other", task.id) is None
    assert await store.several("other", [task.id]) == []
    assert await store.page("other", TaskFilter(), limit=MANY) == []
    assert list(await store.events("other", task.id, limit=MANY)) == []
    assert await store.cancel("other", task.id) is None
    assert await store.requeue("other", task.id) is None
    with pytest.raises(BadRequest, match="after"):
        await submitted(store, "other", after=(task.id,))
    assert await now(store, task) == task


@pytest.mark.parametrize("no_task", ["", "task_", "x", MISSING, "task_" + "z" * 32, "task_" + "f" * 32, "\0"])
async def test_what_is_no_task_is_not_there(store: TaskStore, no_task: str) -> None:
    assert await store.get("acme", no_task) is None
    assert list(await store.events(None, no_task, limit=MANY)) == []
    assert await store.cancel(None, no_task) is None
    assert await store.requeue(None, no_task) is None
    assert await store.change([Change(task=no_task, event=Completed(1, "1"))]) == [None]
    assert await store.suspend(Change(task=no_task, event=Suspended(1, 0)), []) is None
    assert await store.called_off([(no_task, 1)]) == []
    (answer,) = await store.begin([Start(task=no_task, may_take_over=True)], worker="anna", delivery_limit=3)
    assert answer == Refused(task=no_task, why="it is not there")


async def test_several_gives_those_that_are_there(store: TaskStore) -> None:
    tasks = await store.submit([draft() for _ in range(3)])

    found = await store.several("acme", [MISSING, tasks[2].id, "x", tasks[0].id])

    assert {task.id for task in found} == {tasks[0].id, tasks[2].id}


async def test_pages_go_from_the_newest_to_the_oldest_without_a_double_or_a_gap(store: TaskStore) -> None:
    made = [task.id for task in await store.submit([draft() for _ in range(23)])]

    seen: list[str] = []
    while page := await store.page("acme", TaskFilter(), before=seen[-1] if seen else "", limit=5):
        seen += [task.id for task in page]

    assert seen == sorted(made, reverse=True)


async def test_a_page_holds_what_was_asked_for(store: TaskStore) -> None:
    parent = await submitted(store, user="key_1")
    child = await submitted(store, agent="deep", parent=parent.id)
    done = await completed(store, await submitted(store, user="key_2"))
    foreign = await submitted(store, "other")

    async def page(tenant: str | None = "acme", **fields: Any) -> set[str]:
        return {task.id for task in await store.page(tenant, TaskFilter(**fields), limit=MANY)}

    assert await page() == {parent.id, child.id, done.id}
    assert await page(None) == {parent.id, child.id, done.id, foreign.id}
    assert await page(status=TaskStatus.COMPLETED) == {done.id}
    assert await page(agent="deep") == {child.id}
    assert await page(parent=parent.id) == {child.id}
    assert await page(parent="nobody") == set()
    assert await page(user="key_1") == {parent.id}
    assert await page(user="key_1", agent="deep") == set()


# Waiting for others


async def test_a_chain_goes_on_link_by_link(place: Place) -> None:
    first = await submitted(place.store)
    second = await submitted(place.store, after=(first.id,))
    third = await submitted(place.store, after=(second.id,))

    assert (second.status, third.status) == (TaskStatus.WAITING, TaskStatus.WAITING)
    assert await refused(place.store, second) == "it waits for other tasks"
    await completed(place.store, first)
    assert (await now(place.store, second)).status is TaskStatus.PENDING
    assert (await now(place.store, third)).status is TaskStatus.WAITING
    await completed(place.store, second)
    assert (await now(place.store, third)).status is TaskStatus.PENDING
    assert await place.words() == [first.id, second.id, third.id]


async def test_a_task_waits_for_all_that_it_names(place: Place) -> None:
    before = await place.store.submit([draft() for _ in range(3)])
    join = await submitted(place.store, after=(*(task.id for task in before), before[0].id))
    assert join.waits_for == 3

    for left, task in zip((2, 1, 0), before, strict=True):
        await completed(place.store, task)
        assert (await now(place.store, join)).waits_for == left
    assert (await place.words()).count(join.id) == 1


async def test_a_task_does_not_wait_for_one_that_has_completed(store: TaskStore) -> None:
    done = await completed(store, await submitted(store))

    assert (await submitted(store, after=(done.id,))).status is TaskStatus.PENDING


async def test_those_that_waited_for_a_failed_task_fail_with_it(store: TaskStore) -> None:
    first = await submitted(store)
    second = await submitted(store, after=(first.id,))
    third = await submitted(store, after=(second.id,))

    await gone_wrong(store, first)

    for task in (second, third):
        failed = await now(store, task)
        assert (failed.status, failed.reason) == (TaskStatus.FAILED, FailureReason.DEPENDENCY)
        assert "It broke." in failed.error


async def test_a_task_that_waits_for_a_failed_one_fails_at_once(place: Place) -> None:
    lost = await gone_wrong(place.store, await submitted(place.store))

    late = await submitted(place.store, after=(lost.id,))

    assert (late.status, late.reason, late.version) == (TaskStatus.FAILED, FailureReason.DEPENDENCY, 2)
    assert late.id not in await place.words()
    assert await refolded(place.store, late) == await now(place.store, late)


async def test_a_diamond_whose_one_side_fails_fails_once(store: TaskStore) -> None:
    top = await submitted(store)
    left, right = await store.submit([draft(after=(top.id,)), draft(after=(top.id,))])
    bottom = await submitted(store, after=(left.id, right.id))

    await gone_wrong(store, top)

    failed = await now(store, bottom)
    assert (failed.status, failed.version) == (TaskStatus.FAILED, 2)


async def test_a_task_that_names_none_to_wait_for_is_refused_with_its_batch(store: TaskStore) -> None:
    with pytest.raises(BadRequest, match="after"):
        await store.submit([draft(idempotency_key="k"), draft(after=(MISSING,))])

    assert await store.page(None, TaskFilter(), limit=MANY) == []
    assert (await submitted(store, idempotency_key="k")).version == 1


async def test_a_suspended_task_goes_on_when_its_children_have_ended_either_way(place: Place) -> None:
    store = place.store
    (parent,) = await begun(store, await submitted(store))
    good, bad = await store.submit([draft(parent=parent.id), draft(parent=parent.id)])

    waiting = await store.suspend(Change(task=parent.id, event=Suspended(1, 99, tokens=5)), [good.id, bad.id, good.id])

    assert waiting is not None
    assert (waiting.status, waiting.waits_for, waiting.tokens) == (TaskStatus.WAITING, 2, 5)
    await gone_wrong(store, bad)
    assert (await now(store, parent)).status is TaskStatus.WAITING
    await completed(store, good)
    assert (await now(store, parent)).status is TaskStatus.PENDING
    assert (await begun(store, parent))[0].deliveries == 2
    assert (await place.words()).count(parent.id) == 2


async def test_a_task_does_not_suspend_for_what_has_ended_is_foreign_or_is_itself(place: Place) -> None:
    store = place.store
    (parent,) = await begun(store, await submitted(store))
    done = await completed(store, await submitted(store))
    foreign = await submitted(store, "other")

    others = [done.id, foreign.id, parent.id, MISSING, "x"]
    ready = await store.suspend(Change(task=parent.id, event=Suspended(1, 3)), others)

    assert ready is not None
    assert (ready.status, ready.waits_for) == (TaskStatus.PENDING, 0)
    assert (await place.words()).count(parent.id) == 2


async def test_only_the_attempt_under_way_suspends(store: TaskStore) -> None:
    (task,) = await begun(store, await submitted(store))
    other = await submitted(store)

    assert await store.suspend(Change(task=task.id, event=Suspended(2, 1)), [other.id]) is None
    await completed(store, other)
    assert (await now(store, task)).status is TaskStatus.PROCESSING


async def test_waits_end_with_the_task_that_waited(store: TaskStore) -> None:
    old, new = await store.submit([draft(), draft()])
    task = await submitted(store, after=(old.id,))
    await store.cancel("acme", task.id)
    await store.requeue("acme", task.id)
    await begun(store, task)
    await store.suspend(Change(task=task.id, event=Suspended(1, 1)), [new.id])

    await gone_wrong(store, old)

    assert (await now(store, task)).status is TaskStatus.WAITING
    await completed(store, new)
    assert (await now(store, task)).status is TaskStatus.PENDING


# Attempts


async def test_a_started_task_is_refused_to_others_until_its_worker_is_gone(store: TaskStore) -> None:
    (task,) = await begun(store, await submitted(store))
    assert (task.status, task.worker, task.deliveries) == (TaskStatus.PROCESSING, "anna", 1)

    assert await refused(store, task) == "anna works on it"
    (taken,) = await begun(store, task, worker="bert", may_take_over=True)
    assert (taken.worker, taken.deliveries, taken.losses) == ("bert", 2, 1)


async def test_each_start_is_answered_in_its_place(store: TaskStore) -> None:
    first, second = await store.submit([draft(), draft()])
    done = await completed(store, await submitted(store))

    starts = [Start(task=one, may_take_over=False) for one in (first.id, done.id, MISSING, second.id, first.id)]
    answers = await store.begin(starts, worker="anna", delivery_limit=3)

    assert [type(answer) for answer in answers] == [Task, Refused, Refused, Task, Refused]
    assert [getattr(answer, "id", None) or getattr(answer, "task") for answer in answers] == [  # noqa: B009
        start.task for start in starts
    ]


async def test_a_task_that_outlives_its_workers_too_often_is_given_up(store: TaskStore) -> None:
    task = await submitted(store)
    await begun(store, task)
    for _ in range(2):
        await begun(store, task, may_take_over=True)

    assert "did not live to its end" in await refused(store, task, may_take_over=True)
    assert (await now(store, task)).reason is FailureReason.DELIVERY_LIMIT
    await store.requeue("acme", task.id)
    assert (await begun(store, task))[0].losses == 0


async def test_a_task_that_was_suspended_often_is_not_given_up(store: TaskStore) -> None:
    task = await submitted(store)
    for fence in range(1, 6):
        await begun(store, task)
        await store.suspend(Change(task=task.id, event=Suspended(fence, 0)), [])

    assert (await begun(store, task))[0].deliveries == 6


async def test_a_task_past_its_deadline_is_not_started(place: Place) -> None:
    task = await submitted(place.store, deadline=START + timedelta(minutes=1))
    place.wall.now = START + timedelta(minutes=1)

    assert "deadline" in await refused(place.store, task)
    assert (await now(place.store, task)).reason is FailureReason.DEADLINE


async def test_a_task_that_is_to_be_cancelled_is_not_taken_over(store: TaskStore) -> None:
    (task,) = await begun(store, await submitted(store))
    await store.cancel("acme", task.id)

    await refused(store, task, may_take_over=True)
    assert (await now(store, task)).status is TaskStatus.CANCELLED


async def test_an_attempt_that_was_taken_over_changes_nothing(store: TaskStore) -> None:
    (old,) = await begun(store, await submitted(store))
    (new,) = await begun(store, old, worker="bert", may_take_over=True)

    for event in (
        Completed(1, "1"),
        Failed(1, FailureReason.ERROR, ""),
        Retried(1, FailureReason.ERROR, "", START),
        HandedBack(1, START),
        Lost(1),
        Progressed(1, "1"),
        Checkpointed(1, "1"),
        Cancelled(1),
    ):
        assert await changed(store, old, event) is None, event
    assert await now(store, old) == new


async def test_each_change_is_answered_by_itself(store: TaskStore) -> None:
    first, second = await store.submit([draft(), draft()])
    await begun(store, first)

    answers = await store.change(
        [
            Change(task=first.id, event=Progressed(1, '"half"')),
            Change(task=second.id, event=Completed(1, "1")),
            Change(task=MISSING, event=Completed(1, "1")),
            Change(task=first.id, event=Checkpointed(1, '"here"')),
            Change(task=first.id, event=Completed(1, "2", tokens=3)),
            Change(task=first.id, event=Completed(1, "3", tokens=4)),
        ]
    )

    assert [answer and answer.version for answer in answers] == [3, None, None, 4, 5, None]
    task = await now(store, first)
    assert (task.progress, task.checkpoint, task.result, task.tokens) == ('"half"', '"here"', "2", 3)
    assert await refolded(store, first) == task


async def test_changes_of_one_turn_leave_to_each_task_what_they_do_not_touch(store: TaskStore) -> None:
    ended, again, told = await store.submit([draft() for _ in range(3)])
    await begun(store, ended, told, worker="anna")
    await begun(store, again, worker="bert")
    for task in (ended, again, told):
        await changed(store, task, Checkpointed(1, f'"{task.id}"'))

    await store.change(
        [
            Change(task=ended.id, event=Completed(1, "1")),
            Change(task=again.id, event=Retried(1, FailureReason.ERROR, "Once more.", START, tokens=4)),
            Change(task=told.id, event=Progressed(1, '"half"')),
        ]
    )

    found = [await now(store, task) for task in (ended, again, told)]
    assert [await refolded(store, task) for task in (ended, again, told)] == found
    assert [task.worker for task in found] == ["anna", "bert", "anna"]
    assert [task.reason for task in found] == [None, FailureReason.ERROR, None]


async def test_a_retried_task_is_put_into_the_queue_for_later(place: Place) -> None:
    (task,) = await begun(place.store, await submitted(place.store))
    later = START + timedelta(seconds=30)

    retried = await changed(place.store, task, Retried(1, FailureReason.TIMED_OUT, "Too slow.", later, tokens=9))

    assert retried is not None
    assert (retried.status, retried.attempts, retried.run_at) == (TaskStatus.PENDING, 1, later)
    assert await place.words() == [task.id, task.id]


async def test_workers_hear_which_attempts_are_called_off(store: TaskStore) -> None:
    good, asked, taken, done = await store.submit([draft() for _ in range(4)])
    await begun(store, good, asked, taken, done)
    await store.cancel("acme", asked.id)
    await begun(store, taken, worker="bert", may_take_over=True)
    await changed(store, done, Completed(1, "1"))

    held = [(MISSING, 1), ("x", 1), *((task.id, 1) for task in (good, asked, taken, done))]

    assert set(await store.called_off(held)) == {asked.id, taken.id, done.id}
    assert list(await store.called_off([])) == []


# Ending


async def test_a_task_that_was_not_started_is_cancelled_at_once(store: TaskStore) -> None:
    first = await submitted(store)
    second = await submitted(store, after=(first.id,))

    for task in (second, first):
        cancelled = await store.cancel("acme", task.id)
        assert cancelled is not None
        assert (cancelled.status, cancelled.waits_for) == (TaskStatus.CANCELLED, 0)


async def test_a_task_under_way_is_asked_to_end(store: TaskStore) -> None:
    (task,) = await begun(store, await submitted(store))

    asked = await store.cancel(None, task.id)
    again = await store.cancel("acme", task.id)

    assert asked is not None
    assert (asked.status, asked.is_cancelling) == (TaskStatus.PROCESSING, True)
    assert again == asked
    ended = await changed(store, task, Cancelled(1, tokens=2))
    assert ended is not None
    assert (ended.status, ended.is_cancelling, ended.tokens) == (TaskStatus.CANCELLED, False, 2)


async def test_a_task_that_has_ended_stays_as_it_is_when_cancelled(store: TaskStore) -> None:
    done = await completed(store, await submitted(store))

    assert await store.cancel("acme", done.id) == done


async def test_unfinished_children_are_cancelled_with_their_parent(store: TaskStore) -> None:
    parent = await submitted(store)
    child, done, running = await store.submit([draft(parent=parent.id) for _ in range(3)])
    grandchild = await submitted(store, parent=child.id)
    done = await completed(store, done)
    await begun(store, running)

    await store.cancel("acme", parent.id)

    assert (await now(store, child)).status is TaskStatus.CANCELLED
    assert (await now(store, grandchild)).status is TaskStatus.CANCELLED
    assert await now(store, done) == done
    assert (await now(store, running)).is_cancelling


async def test_a_failed_or_cancelled_task_gets_its_attempts_again(place: Place) -> None:
    store = place.store
    failed = await gone_wrong(store, await submitted(store))
    cancelled = await submitted(store)
    await store.cancel("acme", cancelled.id)

    for task in (failed, cancelled):
        again = await store.requeue("acme", task.id)
        assert again is not None
        assert (again.status, again.attempts, again.ended_at, again.error) == (TaskStatus.PENDING, 0, None, "")
        assert (await place.words()).count(task.id) == 2


async def test_other_tasks_are_not_requeued(store: TaskStore) -> None:
    pending = await submitted(store)
    done = await completed(store, await submitted(store))

    for task in (pending, done):
        with pytest.raises(Conflict, match=task.id):
            await store.requeue("acme", task.id)


async def test_tasks_that_were_not_started_by_their_deadline_end_in_turn(store: TaskStore) -> None:
    deadlines = [START + timedelta(minutes=minutes) for minutes in (3, 1, 2, 60)]
    tasks = await store.submit([draft(deadline=deadline) for deadline in deadlines])
    (running,) = await begun(store, await submitted(store, deadline=START + timedelta(minutes=1)))
    waiter = await submitted(store, after=(tasks[1].id,))
    now_is = START + timedelta(minutes=3)

    assert await store.expire(now_is, limit=2) == 2
    assert [(await now(store, task)).status.is_end for task in tasks] == [False, True, True, False]
    assert await store.expire(now_is, limit=MANY) == 1
    assert await store.expire(now_is, limit=MANY) == 0
    assert (await now(store, tasks[0])).reason is FailureReason.DEADLINE
    assert (await now(store, waiter)).reason is FailureReason.DEPENDENCY
    assert (await now(store, running)).status is TaskStatus.PROCESSING


# Events


async def refolded(store: TaskStore, task: Task) -> Task | None:
    """The task as its events tell it."""
    told: Task | None = None
    for kept in await store.events(None, task.id, limit=MANY):
        told = after(told, kept.event, id=kept.task, at=kept.at)
        assert told.version == kept.version
    return told


async def test_a_task_is_the_fold_of_its_events(place: Place) -> None:
    store = place.store
    task = await submitted(store)
    await begun(store, task)
    await changed(store, task, Progressed(1, '{"done": 1}'))
    await changed(store, task, Checkpointed(1, '{"at": 7}'))
    place.wall.now += timedelta(seconds=1, microseconds=1)
    await changed(store, task, Retried(1, FailureReason.ERROR, "Once more.", START, tokens=4))
    await begun(store, task)
    await begun(store, task, worker="bert", may_take_over=True)
    await store.cancel("acme", task.id)
    await changed(store, task, Cancelled(3, tokens=1))
    await store.requeue("acme", task.id)
    done = await completed(store, task, '{"answer": 42}')

    assert await refolded(store, task) == done == await now(store, task)
    assert done.version == 12


async def test_events_come_page_by_page(store: TaskStore) -> None:
    done = await completed(store, await submitted(store))
    await completed(store, await submitted(store))

    first = await store.events("acme", done.id, limit=2)
    rest = await store.events(None, done.id, after=2, limit=MANY)

    assert [kept.kind for kept in first] == ["task.submitted", "task.started"]
    assert [(kept.kind, kept.version, kept.tenant) for kept in rest] == [("task.completed", 3, "acme")]
    assert list(await store.events(None, done.id, after=3, limit=MANY)) == []


async def test_the_tail_gives_all_events_in_order(store: TaskStore) -> None:
    tasks = await store.submit([draft() for _ in range(5)])
    for task in tasks:
        await completed(store, task)

    seen = list(await store.tail(after=0, limit=4))
    while page := await store.tail(after=seen[-1].position, limit=4):
        seen += page

    assert len(seen) == 15
    assert [kept.position for kept in seen] == sorted({kept.position for kept in seen})
    for task in tasks:
        assert [kept.version for kept in seen if kept.task == task.id] == [1, 2, 3]


async def told(news: AsyncIterator[frozenset[str]], task: Task) -> None:
    """Wait until something is said of the task, or that it cannot be told and one is to look."""
    while (heard := await anext(news)) and task.id not in heard:
        pass


async def test_whoever_listens_hears_of_changes(store: TaskStore) -> None:
    async with asyncio.timeout(20), aclosing(store.changed()) as news:  # type: ignore[type-var]
        assert await anext(news) == frozenset()
        task = await submitted(store)
        (started,) = await begun(store, task)
        await told(news, task)
        await changed(store, started, Completed(started.deliveries, "1"))
        await told(news, task)


async def test_a_change_of_many_is_heard_as_a_call_to_look(postgres: PostgresTaskStore) -> None:
    async with asyncio.timeout(20), aclosing(postgres.changed()) as news:  # type: ignore[type-var]
        assert await anext(news) == frozenset()
        tasks = await postgres.submit([draft() for _ in range(300)])
        await postgres.begin([Start(task=task.id, may_take_over=False) for task in tasks], worker="w", delivery_limit=3)
        assert await anext(news) == frozenset()


# PostgreSQL: transactions beside each other

APPEND = """INSERT INTO events (task, version, tenant, kind, schema, at, data, created_at)
VALUES ($1, 1, 'acme', 'task.cancel_asked', 1, now(), '{}', now())"""


async def positions(store: TaskStore, past: int = 0) -> list[int]:
    return [kept.position for kept in await store.tail(after=past, limit=MANY)]


async def test_the_tail_does_not_pass_a_transaction_still_open(postgres: PostgresTaskStore, server: str) -> None:
    slow: Any = await asyncpg.connect(server)
    try:
        transaction = slow.transaction()
        await transaction.start()
        await slow.execute(APPEND, uuid.uuid4())
        task = await submitted(postgres)
        assert await positions(postgres) == []
        await submitted(postgres)
        assert await positions(postgres) == []
        await transaction.commit()
    finally:
        slow.terminate()

    seen = await postgres.tail(after=0, limit=MANY)
    assert [kept.kind for kept in seen] == ["task.cancel_asked", "task.submitted", "task.submitted"]
    assert seen[1].task == task.id


async def test_the_tail_waits_also_where_transactions_began_in_another_order(
    postgres: PostgresTaskStore, server: str
) -> None:
    first: Any = await asyncpg.connect(server)
    second: Any = await asyncpg.connect(server)
    try:
        early, late = first.transaction(), second.transaction()
        await early.start()
        await first.execute("SELECT pg_current_xact_id()")  # an older number, and the higher position
        await late.start()
        await second.execute(APPEND, uuid.uuid4())
        await first.execute(APPEND, uuid.uuid4())
        await early.commit()
        assert await positions(postgres) == []
        await late.rollback()
    finally:
        first.terminate()
        second.terminate()

    assert len(await positions(postgres)) == 1


async def test_the_tail_gives_what_is_settled_while_others_write_on(postgres: PostgresTaskStore, server: str) -> None:
    task = await submitted(postgres)
    assert len(await positions(postgres)) == 1
    slow: Any = await asyncpg.connect(server)
    try:
        await slow.execute("BEGIN")
        await slow.execute(APPEND, uuid.uuid4())
        await submitted(postgres)
        (kept,) = await postgres.tail(after=0, limit=MANY)
        await slow.execute("COMMIT")
    finally:
        slow.terminate()

    assert kept.task == task.id
    assert len(await positions(postgres)) == 3


async def test_a_long_transaction_that_writes_no_events_holds_nobody_up(
    postgres: PostgresTaskStore, server: str
) -> None:
    slow: Any = await asyncpg.connect(server)
    try:
        await slow.execute("BEGIN")
        await slow.execute("CREATE TABLE report AS SELECT * FROM events")
        await submitted(postgres)
        assert len(await positions(postgres)) == 1
    finally:
        slow.terminate()


async def test_the_tail_of_a_busy_store_misses_nothing(postgres: PostgresTaskStore) -> None:
    seen: list[int] = []

    async def follow() -> None:
        while len(seen) < 300:
            page = await positions(postgres, seen[-1] if seen else 0)
            seen.extend(page)

    async def write() -> None:
        for number in range(10):
            await postgres.submit([draft(queue=f"q{number}") for _ in range(3)])

    async with asyncio.timeout(30):
        await asyncio.gather(follow(), *(write() for _ in range(10)))

    assert seen == sorted(set(seen))
    assert len(seen) == 300


async def test_many_random_changes_at_once_end_without_a_circle(store: TaskStore) -> None:
    dice = random.Random(7)
    tasks = list(await store.submit([draft() for _ in range(10)]))
    tasks += await store.submit([draft(after=(dice.choice(tasks).id, dice.choice(tasks).id)) for _ in range(10)])
    tasks += await store.submit([draft(after=(dice.choice(tasks).id,), parent=tasks[0].id) for _ in range(10)])

    async def one(number: int) -> None:
        some = dice.sample(tasks, 4)
        match number % 6:
            case 0:
                starts = [Start(task=task.id, may_take_over=True) for task in some]
                await store.begin(starts, worker="anna", delivery_limit=MANY)
            case 1:
                fence = dice.randint(1, 3)
                await store.change([Change(task=task.id, event=Completed(fence, "1")) for task in some])
            case 2:
                event = Failed(dice.randint(0, 3), FailureReason.ERROR, "It broke.")
                await store.change([Change(task=task.id, event=event) for task in some])
            case 3:
                others = [task.id for task in some[1:]]
                await store.suspend(Change(task=some[0].id, event=Suspended(dice.randint(1, 3), 0)), others)
            case 4:
                await store.cancel("acme", some[0].id)
            case _:
                await store.change([Change(task=task.id, event=Requeued(START)) for task in some])

    async with asyncio.timeout(60):
        await asyncio.gather(*(one(number) for number in range(200)))

    for task in tasks:
        assert await refolded(store, task) == await now(store, task)


async def test_one_of_many_workers_gets_a_task(store: TaskStore) -> None:
    task = await submitted(store)
    start = Start(task=task.id, may_take_over=False)

    answers = await asyncio.gather(
        *(store.begin([start], worker=f"w{number}", delivery_limit=3) for number in range(20))
    )

    assert sum(isinstance(answer, Task) for (answer,) in answers) == 1
    assert [kept.kind for kept in await store.events(None, task.id, limit=MANY)] == ["task.submitted", "task.started"]
    assert isinstance((await store.events(None, task.id, after=1, limit=1))[0].event, Started)
