"""Submissions: what is refused before it is kept, and how those that come together share a transaction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import msgspec
import pytest

from sutazai.core.errors import BadRequest, Overloaded, ShuttingDown, StoreUnavailable, UnknownAgent
from sutazai.core.request import Priority
from sutazai.core.task import Submitted, Task, TaskDraft, after, task_id
from sutazai.tasks.gather import AT_ONCE, MAX_GATHERED, MAX_GATHERED_BYTES, Gathered
from sutazai.tasks.submit import MAX_INPUT_BYTES, Submission, Submitter, Wanted
from sutazai.testing.plain_agents import plain_agents

NOW = datetime(2026, 5, 1, tzinfo=UTC)
ACME = Submitter(tenant="acme", user="k1")
MISSING = task_id(1.0, 7)


class Desk:
    """A store of which only `submit` is there; it works while its door is open."""

    def __init__(self) -> None:
        self.batches: list[Sequence[TaskDraft]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.full: frozenset[str] = frozenset()
        self.is_away = False
        self.asked = 0

    async def submit(self, drafts: Sequence[TaskDraft]) -> Sequence[Task]:
        self.asked += 1
        await self.open.wait()
        if self.is_away:
            raise StoreUnavailable("The database was told to be away.")
        if any(draft.queue in self.full for draft in drafts):
            raise Overloaded("The queue was full.", retry_after_s=1)
        if any(draft.after for draft in drafts):
            raise BadRequest("`after` named no task.", where="after")
        self.batches.append(drafts)
        return [after(None, Submitted(draft), id=task_id(1.0, number), at=NOW) for number, draft in enumerate(drafts)]

    async def get(self, tenant: str, task_id: str) -> Task | None:
        return None


@asynccontextmanager
async def running(desk: Desk) -> AsyncIterator[Gathered]:
    gathered = Gathered(cast("Any", desk))
    task = asyncio.create_task(gathered.run())
    try:
        yield gathered
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def draft(number: int = 0, **fields: Any) -> TaskDraft:
    return TaskDraft(tenant="acme", agent="echo", user=str(number), **fields)


async def outcomes(gathered: Gathered, desk: Desk, drafts: Sequence[TaskDraft]) -> list[Task | BaseException]:
    """What becomes of drafts that all came while an earlier one was written."""
    desk.open.clear()
    first = asyncio.create_task(gathered.submit(draft()))
    while not desk.asked:
        await asyncio.sleep(0)
    rest = [asyncio.create_task(gathered.submit(one)) for one in drafts]
    await asyncio.sleep(0)
    desk.open.set()
    await first
    return list(await asyncio.gather(*rest, return_exceptions=True))


async def test_those_that_come_while_one_is_written_share_the_next_transaction_and_keep_their_order() -> None:
    desk = Desk()
    async with running(desk) as gathered:
        made = await outcomes(gathered, desk, [draft(number) for number in range(AT_ONCE + 3)])

    assert [len(batch) for batch in desk.batches] == [1, AT_ONCE, 3]
    assert [task.draft.user for task in made if isinstance(task, Task)] == list(map(str, range(AT_ONCE + 3)))


async def test_a_bad_one_fails_alone() -> None:
    desk = Desk()
    async with running(desk) as gathered:
        drafts = [draft(0), draft(1, after=(MISSING,)), draft(2)]
        made = await outcomes(gathered, desk, drafts)

    assert [type(one) for one in made] == [Task, BadRequest, Task]
    assert [len(batch) for batch in desk.batches] == [1, 2]


async def test_a_full_queue_refuses_its_own_tasks_alone_and_is_not_asked_for_each() -> None:
    desk = Desk()
    desk.full = frozenset({"busy"})
    async with running(desk) as gathered:
        drafts = [draft(number, queue="busy" if number % 2 else "free") for number in range(100)]
        made = await outcomes(gathered, desk, drafts)

    assert [isinstance(one, Overloaded) for one in made] == [bool(number % 2) for number in range(100)]
    assert desk.asked == 4


async def test_a_database_that_is_away_is_asked_once_for_all() -> None:
    desk = Desk()
    async with running(desk) as gathered:
        await gathered.submit(draft())
        desk.is_away = True
        made = await asyncio.gather(*(gathered.submit(draft(one)) for one in range(50)), return_exceptions=True)

        assert {type(one) for one in made} == {StoreUnavailable}
        assert desk.asked == 2
        desk.is_away = False
        assert isinstance(await gathered.submit(draft()), Task)


async def test_large_inputs_do_not_all_go_into_one_transaction() -> None:
    desk = Desk()
    large = draft(input="x" * MAX_INPUT_BYTES)
    async with running(desk) as gathered:
        await outcomes(gathered, desk, [large] * 20)

    assert [len(batch) for batch in desk.batches] == [1, 16, 4]


async def test_whoever_gave_up_before_the_transaction_leaves_nothing() -> None:
    desk = Desk()
    desk.open.clear()
    async with running(desk) as gathered:
        first = asyncio.create_task(gathered.submit(draft(1)))
        while not desk.asked:
            await asyncio.sleep(0)
        second = asyncio.create_task(gathered.submit(draft(2)))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        third = asyncio.create_task(gathered.submit(draft(3)))
        desk.open.set()
        await asyncio.gather(first, third)

    assert [[one.user for one in batch] for batch in desk.batches] == [["1"], ["3"]]


async def test_too_many_are_refused_and_a_stopped_one_refuses_all() -> None:
    desk = Desk()
    desk.open.clear()
    async with running(desk) as gathered:
        waiting = [asyncio.create_task(gathered.submit(draft(one))) for one in range(MAX_GATHERED + 1)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await gathered.submit(draft())
    made = await asyncio.gather(*waiting, return_exceptions=True)

    assert {type(one) for one in made} <= {ShuttingDown, Overloaded}
    with pytest.raises(ShuttingDown):
        await gathered.submit(draft())


async def test_few_large_ones_are_too_many_as_well_and_make_room_when_they_are_written() -> None:
    desk = Desk()
    large = draft(input="x" * MAX_INPUT_BYTES)
    async with running(desk) as gathered:
        made = await outcomes(gathered, desk, [large] * 70)

        assert sum(isinstance(one, Overloaded) for one in made) == 70 - MAX_GATHERED_BYTES // MAX_INPUT_BYTES
        assert isinstance(await gathered.submit(large), Task)


# what is wanted


@pytest.fixture
def submission() -> Submission:
    return Submission(cast("Any", Desk()), plain_agents(), wall=lambda: NOW)


def test_a_draft_has_the_queue_and_the_limits_of_its_agent(submission: Submission) -> None:
    made = submission.draft(Wanted(agent="echo", input=b'{"text": "hi"}'), ACME)

    agent = submission.agents["echo"]
    assert (made.queue, made.max_attempts, made.time_limit_s) == (agent.queue, agent.max_attempts, agent.time_limit_s)
    assert (made.tenant, made.user, made.input) == ("acme", "k1", '{"text": "hi"}')


def test_an_unknown_agent_is_told_with_the_nearest(submission: Submission) -> None:
    with pytest.raises(UnknownAgent, match="Did you mean echo"):
        submission.draft(Wanted(agent="ecko"), ACME)


@pytest.mark.parametrize(
    ("wish", "where"),
    [
        (Wanted(agent="echo", input=b'{"text": 3}'), "input.text"),
        (Wanted(agent="echo", input=b"[]"), "input"),
        (Wanted(agent="echo", input=b'{"other": tru}'), "input"),
        (Wanted(agent="anything", input=b'"' + b"x" * MAX_INPUT_BYTES + b'"'), "input"),
        (Wanted(agent="echo", input=b'{"other": "\xff"}'), "input"),
        (Wanted(agent="echo", run_at=NOW + timedelta(days=400)), "run_at"),
        (Wanted(agent="echo", run_at=datetime(2026, 6, 1)), "run_at"),  # noqa: DTZ001 - that is the mistake
        (Wanted(agent="echo", deadline=NOW), "deadline"),
        (Wanted(agent="echo", run_at=NOW + timedelta(1), deadline=NOW + timedelta(hours=1)), "deadline"),
        (Wanted(agent="echo", idempotency_key="k" * 256), "idempotency_key"),
        (Wanted(agent="echo", idempotency_key="a\nb"), "idempotency_key"),
        (Wanted(agent="echo", parent="task_1"), "parent"),
        (Wanted(agent="echo", after=("x",)), "after"),
        (Wanted(agent="echo", after=tuple(task_id(1.0, one) for one in range(101))), "after"),
        (Wanted(agent="echo", webhook="ftp://example.org"), "webhook"),
        (Wanted(agent="echo", webhook="http://"), "webhook"),
        (Wanted(agent="echo", webhook="http://a:99999/"), "webhook"),
        (Wanted(agent="echo", webhook="http://a/ b"), "webhook"),
        (Wanted(agent="echo", max_attempts=0), "max_attempts"),
        (Wanted(agent="echo", time_limit_s=float("nan")), "time_limit_s"),
        (Wanted(agent="echo", budget_tokens=0), "budget_tokens"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_wish_out_of_bounds_is_refused_with_its_field(submission: Submission, wish: Wanted, where: str) -> None:
    with pytest.raises(BadRequest) as refused:
        submission.draft(wish, ACME)

    assert refused.value.where == where


async def test_a_parent_that_is_not_there_is_refused(submission: Submission) -> None:
    with pytest.raises(BadRequest) as refused:
        await submission.submit(Wanted(agent="echo", parent=MISSING), ACME)

    assert refused.value.where == "parent"


def test_a_time_that_is_over_means_at_once(submission: Submission) -> None:
    assert submission.draft(Wanted(agent="echo", run_at=NOW - timedelta(1)), ACME).run_at is None


@pytest.mark.parametrize(
    ("asked", "may_rise", "given"),
    [
        (None, False, Priority.NORMAL),
        (Priority.LOW, False, Priority.LOW),
        (Priority.HIGH, False, Priority.NORMAL),
        (Priority.HIGH, True, Priority.HIGH),
    ],
)
def test_only_admins_rise(submission: Submission, asked: Priority | None, may_rise: bool, given: Priority) -> None:
    made = submission.draft(Wanted(agent="echo", priority=asked), msgspec.structs.replace(ACME, may_rise=may_rise))

    assert made.priority is given
