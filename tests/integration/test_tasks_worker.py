"""A worker on a real PostgreSQL: attempts, retries, children, cancelling, draining, and what dies on the way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import msgspec
import pytest
from tests.redis_servers import eventually

from sutazai.adapters.postgres.stores import Stores
from sutazai.core.errors import StoreUnavailable
from sutazai.core.task import FailureReason, Progressed, Task, TaskDraft, TaskStatus
from sutazai.ports.agent import EMBEDDING, TASK_PROCESSING, Agent, AgentContext, Answer, Said
from sutazai.ports.tasks import Change, TaskStore
from sutazai.tasks.context import Surroundings
from sutazai.tasks.results import Results
from sutazai.tasks.worker import PROGRESS_S, Worker, WorkerRules
from sutazai.testing.objects import MemoryObjects

TENANT = "acme"

Start = Callable[..., Awaitable[Worker]]


class ParrotModels:
    """Answers with the last message and takes ten tokens."""

    async def chat(self, body: Any, **_: Any) -> Said:
        return Said(text=body["messages"][-1]["content"], model=body["model"], input_tokens=6, output_tokens=4)

    async def ask(self, endpoint: str, body: Any, **_: Any) -> Answer:
        told = {"endpoint": endpoint, "model": body["model"]}
        return Answer(body=msgspec.json.encode(told), input_tokens=6, output_tokens=4)

    async def usual(self) -> str:
        return "m"


def made(name: str, run: Any, **options: Any) -> Agent:
    usual = {"input_type": Any, "output_type": Any, "describes": "A test.", "queue": TASK_PROCESSING}
    return Agent(name=name, run=run, **{**usual, **options})


async def echo(context: AgentContext, value: Any) -> Any:
    return value


def drafted(agent: str, **fields: Any) -> TaskDraft:
    return TaskDraft(tenant=TENANT, agent=agent, **fields)


async def submitted(stores: Stores, agent: str, **fields: Any) -> Task:
    return (await stores.tasks.submit([drafted(agent, **fields)]))[0]


async def ended(stores: Stores, task: Task, within_s: float = 20.0) -> Task:
    """The task once it has ended."""
    found: list[Task] = []

    async def has_ended() -> bool:
        found[:] = await stores.tasks.several(TENANT, [task.id])
        return found[0].status.is_end

    await eventually(has_ended, within_s)
    return found[0]


@pytest.fixture
async def stores(data_dir: Any) -> AsyncIterator[Stores]:
    """Stores over tables of this test's own."""
    from tests.postgres_databases import fresh_stores  # noqa: PLC0415 - after the skip of `data_dir`

    async with fresh_stores(data_dir) as opened:
        yield opened


@asynccontextmanager
async def working(
    stores: Stores,
    *agents: Agent,
    mine: frozenset[str] | None = None,
    objects: MemoryObjects | None = None,
    **rules: Any,
) -> AsyncIterator[Worker]:
    """A worker of these agents, stopped at the end."""
    known = {agent.name: agent for agent in agents}
    around = Surroundings(
        store=stores.tasks,
        models=ParrotModels(),
        messages=stores.messages,
        agents=known,
        results=Results(objects or MemoryObjects(), max_inline_bytes=2**18),
        default_model="m",
        wall=lambda: datetime.now(UTC),
    )
    usual: dict[str, Any] = {"name": "w", "slots": {TASK_PROCESSING: 8}, "drain_s": 5.0}
    worker = Worker(
        stores.queue,
        around,
        WorkerRules(**{**usual, **rules}),
        mine=frozenset(known) if mine is None else mine,
        random=random.random,
    )
    async with AsyncExitStack() as stack:
        for name, run in (("queue", stores.queue.run), ("worker", worker.run)):
            task = asyncio.create_task(run(), name=name)
            stack.push_async_callback(_ended, task)
        try:
            yield worker
        finally:
            worker.stop()
            if left := [one for one in asyncio.all_tasks() if one.get_name() == "worker"]:
                await asyncio.wait(left, timeout=15)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def test_a_task_is_run_and_its_result_kept(stores: Stores) -> None:
    async with working(stores, made("echo", echo)):
        task = await ended(stores, await submitted(stores, "echo", input='{"a":[1,2]}'))

    assert task.status is TaskStatus.COMPLETED
    assert task.result == '{"a":[1,2]}'
    assert (task.deliveries, task.attempts, task.worker) == (1, 0, "w")


async def test_an_agent_that_fails_is_tried_again_and_then_given_up(stores: Stores) -> None:
    async def fails(context: AgentContext, _: Any) -> None:
        raise ValueError(f"attempt {context.fence}")

    async with working(stores, made("fails", fails)):
        task = await ended(stores, await submitted(stores, "fails", max_attempts=2))

    assert (task.status, task.reason, task.attempts) == (TaskStatus.FAILED, FailureReason.ERROR, 2)
    assert task.error == "ValueError: attempt 2"


async def test_an_attempt_that_takes_too_long_is_ended(stores: Stores) -> None:
    async def hangs(context: AgentContext, _: Any) -> None:
        await asyncio.Event().wait()

    async with working(stores, made("hangs", hangs)):
        task = await ended(stores, await submitted(stores, "hangs", max_attempts=1, time_limit_s=0.05))

    assert (task.status, task.reason) == (TaskStatus.FAILED, FailureReason.TIMED_OUT)


async def test_a_running_task_is_cancelled_within_a_second(stores: Stores) -> None:
    began = asyncio.Event()
    left = asyncio.Event()

    async def hangs(context: AgentContext, _: Any) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    async with working(stores, made("hangs", hangs)):
        task = await submitted(stores, "hangs")
        await began.wait()
        asked = await stores.tasks.cancel(TENANT, task.id)
        task = await ended(stores, task)

    assert asked is not None
    assert asked.is_cancelling
    assert left.is_set()
    assert task.status is TaskStatus.CANCELLED


async def test_a_parent_waits_for_its_children_without_a_place(stores: Stores) -> None:
    """With one place only, a parent that kept it would wait for ever."""

    async def parent(context: AgentContext, count: int) -> Any:
        children = [await context.spawn("echo", number, key=str(number)) for number in range(count)]
        return [task.result for task in await context.join(children)]

    async with working(stores, made("parent", parent), made("echo", echo), slots={TASK_PROCESSING: 1}):
        task = await ended(stores, await submitted(stores, "parent", input="3"))

    assert task.result == '["0","1","2"]'
    assert (task.attempts, task.deliveries) == (0, 2)


async def test_a_checkpoint_is_there_for_the_next_attempt(stores: Stores) -> None:
    async def counts(context: AgentContext, _: Any) -> Any:
        reached = context.last_checkpoint or 0
        await context.checkpoint(reached + 1)
        await context.progress({"reached": reached + 1})
        if reached < 1:
            raise RuntimeError("not yet")
        return reached

    async with working(stores, made("counts", counts)):
        task = await ended(stores, await submitted(stores, "counts"))

    assert (task.status, task.result, task.progress) == (TaskStatus.COMPLETED, "1", '{"reached":2}')


async def test_tokens_are_counted_and_a_budget_ends_the_task(stores: Stores) -> None:
    async def talks(context: AgentContext, _: Any) -> Any:
        for _ in range(5):
            await context.chat([{"role": "user", "content": "hello"}])
        return None

    async with working(stores, made("talks", talks)):
        task = await ended(stores, await submitted(stores, "talks", budget_tokens=25))

    assert (task.status, task.reason, task.tokens) == (TaskStatus.FAILED, FailureReason.BUDGET, 30)


async def test_a_model_is_named_for_agents_that_ask_elsewhere_and_the_budget_counts(stores: Stores) -> None:
    async def embeds(context: AgentContext, model: str) -> Any:
        told = [msgspec.json.decode((await context.ask(EMBEDDING, {"input": "a", "model": model})).body)]
        await context.ask(EMBEDDING, {})
        await context.checkpoint(told)
        return await context.ask(EMBEDDING, {})

    async with working(stores, made("embeds", embeds)):
        named = await ended(stores, await submitted(stores, "embeds", input='"x"', budget_tokens=20))
        unnamed = await ended(stores, await submitted(stores, "embeds", input='""', budget_tokens=20))

    assert (named.reason, unnamed.reason, unnamed.tokens) == (FailureReason.BUDGET, FailureReason.BUDGET, 20)
    assert [msgspec.json.decode(task.checkpoint)[0]["model"] for task in (named, unnamed)] == ["x", "m"]


class AwayOnce(MemoryObjects):
    """Writes nothing the first time, or loses the answer to it."""

    def __init__(self, *, is_kept: bool) -> None:
        super().__init__(max_object_bytes=2**24)
        self._is_kept = is_kept
        self._puts = 0

    async def put(self, name: str, content: bytes, *, is_new: bool = False) -> bool:
        self._puts += 1
        if self._puts > 1 or self._is_kept:
            await super().put(name, content, is_new=is_new)
        if self._puts == 1:
            raise StoreUnavailable("The bucket was away.")
        return True


@pytest.mark.parametrize("is_kept", [False, True])
async def test_a_large_result_whose_store_was_away_is_written_by_the_next_attempt(
    stores: Stores, is_kept: bool
) -> None:
    async def large(context: AgentContext, size: int) -> Any:
        return "x" * size

    objects = AwayOnce(is_kept=is_kept)
    async with working(stores, made("large", large), objects=objects):
        task = await ended(stores, await submitted(stores, "large", input="1000000"))

    assert (task.status, task.attempts, task.result) == (TaskStatus.COMPLETED, 1, "")
    assert list(objects.objects) == [task.result_object]
    assert len((await Results(objects, max_inline_bytes=1).whole(task)).result) == 1_000_002
    kinds = [kept.kind for kept in await stores.tasks.events(TENANT, task.id, limit=10)]
    assert kinds == ["task.submitted", "task.started", "task.retried", "task.started", "task.completed"]


async def test_a_parent_gets_the_large_results_of_its_children(stores: Stores) -> None:
    async def large(context: AgentContext, size: int) -> Any:
        return "x" * size

    async def parent(context: AgentContext, _: Any) -> Any:
        ids = [await context.spawn("large", size) for size in (3, 1_000_000)]
        return [len(task.result) for task in await context.join(ids)]

    objects = MemoryObjects(max_object_bytes=2**24)
    async with working(stores, made("large", large), made("parent", parent), objects=objects):
        task = await ended(stores, await submitted(stores, "parent"))

    assert task.result == "[5,1000002]"


async def test_an_agent_that_nobody_knows_makes_a_dead_letter(stores: Stores) -> None:
    async with working(stores, made("echo", echo)):
        task = await ended(stores, await submitted(stores, "nobody"))

    assert (task.status, task.reason) == (TaskStatus.FAILED, FailureReason.UNKNOWN_AGENT)


async def test_a_worker_that_stops_hands_back_what_it_cannot_end(stores: Stores) -> None:
    async def slow(context: AgentContext, _: Any) -> Any:
        if context.fence == 1:
            await asyncio.Event().wait()
        return context.fence

    slow_agent = made("slow", slow)
    async with working(stores, slow_agent, drain_s=0.1) as first:
        task = await submitted(stores, "slow")
        await eventually(lambda: first.running == 1)
    async with working(stores, slow_agent):
        task = await ended(stores, task)

    assert (task.status, task.result, task.attempts) == (TaskStatus.COMPLETED, "2", 0)


async def test_a_worker_whose_places_are_all_taken_stops_all_the_same(stores: Stores) -> None:
    async def hangs(context: AgentContext, _: Any) -> None:
        await asyncio.Event().wait()

    async with working(stores, made("hangs", hangs), slots={TASK_PROCESSING: 1}, drain_s=0.1) as worker:
        task = await submitted(stores, "hangs")

        async def is_under_way() -> bool:
            return worker.running == 1

        await eventually(is_under_way)
        worker.stop()
        async with asyncio.timeout(10):
            await worker.ended.wait()
        (left,) = await stores.tasks.several(TENANT, [task.id])

    assert left.status is TaskStatus.PENDING


async def test_agents_leave_word_for_each_other(stores: Stores) -> None:
    async def sends(context: AgentContext, to: str) -> None:
        await context.send(to, {"hello": "you"})

    async def receives(context: AgentContext, name: str) -> Any:
        return [body for _, body in await context.received(name)]

    async with working(stores, made("sends", sends), made("receives", receives)):
        first = await submitted(stores, "sends", input='"room"')
        second = await ended(stores, await submitted(stores, "receives", input='"room"', after=(first.id,)))

    assert second.result == '[{"hello":"you"}]'


async def test_a_task_for_later_waits_for_its_time(stores: Stores) -> None:
    at = datetime.now(UTC) + timedelta(seconds=0.7)
    async with working(stores, made("echo", echo)):
        task = await ended(stores, await submitted(stores, "echo", run_at=at))

    assert task.started_at is not None
    assert task.started_at >= at


async def test_a_task_that_waits_for_a_place_of_its_agent_can_be_cancelled(stores: Stores) -> None:
    """Its place in the worker is free again: with two places a third task would never start otherwise."""
    going = asyncio.Event()
    ran: list[str] = []

    async def one_at_a_time(context: AgentContext, value: Any) -> Any:
        ran.append(context.task.id)
        await going.wait()
        return value

    agent = made("one", one_at_a_time, concurrency=1)
    async with working(stores, agent, made("echo", echo), slots={TASK_PROCESSING: 2}) as worker:
        both = [await submitted(stores, "one", input="1"), await submitted(stores, "one", input="1")]
        await eventually(lambda: worker.running == 2)
        (waiting,) = [task for task in both if task.id not in ran]
        await stores.tasks.cancel(TENANT, waiting.id)
        cancelled = await ended(stores, waiting)
        third = await ended(stores, await submitted(stores, "echo", input="3"))
        going.set()

    assert len(ran) == 1
    assert cancelled.status is TaskStatus.CANCELLED
    assert third.result == "3"


async def test_an_agent_that_is_cancelled_from_within_fails_and_leaves_its_place(stores: Stores) -> None:
    async def waits_for_what_is_cancelled(context: AgentContext, _: Any) -> None:
        inner = asyncio.create_task(asyncio.Event().wait())
        inner.cancel()
        await inner

    async with working(
        stores, made("odd", waits_for_what_is_cancelled), made("echo", echo), slots={TASK_PROCESSING: 1}
    ):
        odd = await ended(stores, await submitted(stores, "odd", max_attempts=1))
        following = await ended(stores, await submitted(stores, "echo", input="3"))

    assert (odd.status, odd.reason) == (TaskStatus.FAILED, FailureReason.ERROR)
    assert following.status is TaskStatus.COMPLETED


class SlowToTell:
    """A store in which progress takes a while to be written."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def change(self, changes: Sequence[Change]) -> Sequence[Task | None]:
        if all(isinstance(change.event, Progressed) for change in changes):
            await asyncio.sleep(2 * PROGRESS_S)
        return await self._store.change(changes)


async def test_what_an_agent_told_last_is_not_overtaken_by_its_end(stores: Stores) -> None:
    async def tells(context: AgentContext, _: Any) -> None:
        await context.progress("nearly done")
        await asyncio.sleep(1.5 * PROGRESS_S)  # it is being written by now

    slow = replace(stores, tasks=cast("TaskStore", SlowToTell(stores.tasks)))
    async with working(slow, made("tells", tells)):
        task = await ended(stores, await submitted(stores, "tells"))

    assert (task.status, task.progress) == (TaskStatus.COMPLETED, '"nearly done"')
