"""PostgreSQL below Patroni: whoever writes is killed, stalled or told to stop, and no acknowledged task is lost."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from tests.patroni_servers import Trio, patroni_trio
from tests.redis_servers import eventually

from sutazai.adapters.postgres.stores import Stores, open_stores
from sutazai.core.errors import StoreUnavailable
from sutazai.core.task import Completed, Task, TaskDraft, TaskStatus
from sutazai.ports.tasks import Change, Start, TaskFilter
from sutazai.settings.model import Database

T = TypeVar("T")

LIMIT_S = 5.0
SLACK_S = 2.5
"""What a loaded machine may take beyond a time limit to say that it was over."""
CLIENTS = 4
ENOUGH = 20
"""Acknowledged tasks before something happens, and after it."""
PAUSE_S = 0.01

pytestmark = [pytest.mark.alone, pytest.mark.deadline(120)]


@pytest.fixture(scope="module")
def trio() -> Iterator[Trio]:
    """Three hosts; each test leaves them well."""
    with patroni_trio() as servers:
        yield servers


class Traffic:
    """Clients that submit tasks and complete them, and say again what they do not know to be kept."""

    def __init__(self, stores: Stores) -> None:
        self.tenant = uuid.uuid4().hex
        self.acknowledged: list[str] = []
        self.completed: set[str] = set()
        self.refused = 0
        self.longest_call_s = 0.0
        self.longest_gap_s = 0.0
        """Between two acknowledgements."""
        self._stores = stores
        self._enough = asyncio.Event()
        self._last_at = time.monotonic()

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        """As long as the context lasts; the end waits until everything that was begun has ended."""
        clients = [asyncio.create_task(self._client(number), name="client") for number in range(CLIENTS)]
        try:
            yield
        finally:
            self._enough.set()
            await asyncio.gather(*clients)

    async def goes_on(self) -> None:
        """Return when some more were completed."""
        before = len(self.completed)
        await eventually(lambda: len(self.completed) >= before + ENOUGH, 90)

    async def _client(self, number: int) -> None:
        count = 0
        while not self._enough.is_set():
            count += 1
            draft = TaskDraft(tenant=self.tenant, agent="none", input="{}", idempotency_key=f"{number}-{count}")
            (task,) = await self._until_kept(partial(self._stores.tasks.submit, [draft]))
            self.acknowledged.append(task.id)
            self._note()
            await self._complete(task.id)
            await asyncio.sleep(PAUSE_S)

    async def _complete(self, task_id: str) -> None:
        start = Start(task=task_id, may_take_over=True)
        (begun,) = await self._until_kept(lambda: self._stores.tasks.begin([start], worker="w", delivery_limit=100))
        assert isinstance(begun, Task)
        change = Change(task=task_id, event=Completed(begun.deliveries, "{}"))
        await self._until_kept(lambda: self._stores.tasks.change([change]))
        self.completed.add(task_id)

    async def _until_kept(self, call: Callable[[], Awaitable[T]]) -> T:
        while True:
            began = time.monotonic()
            try:
                return await call()
            except StoreUnavailable:
                self.refused += 1
            finally:
                self.longest_call_s = max(self.longest_call_s, time.monotonic() - began)

    def _note(self) -> None:
        now = time.monotonic()
        self.longest_gap_s = max(self.longest_gap_s, now - self._last_at)
        self._last_at = now

    async def check(self, what: str) -> None:
        """What was acknowledged is there, done, and there once."""
        kept: dict[str, Task] = {}
        before = ""
        while page := await self._stores.tasks.page(self.tenant, TaskFilter(), before=before, limit=500):
            kept |= {task.id: task for task in page}
            before = page[-1].id
        lost = set(self.acknowledged) - kept.keys()
        print(  # noqa: T201
            f"\n{what}: longest gap {self.longest_gap_s:.2f} s, longest call {self.longest_call_s:.2f} s, "
            f"{self.refused} calls refused, {len(lost)} of {len(self.acknowledged)} acknowledged tasks lost"
        )

        assert not lost
        assert len(kept) == len({task.draft.idempotency_key for task in kept.values()}) == len(self.acknowledged)
        assert all(kept[done].status is TaskStatus.COMPLETED for done in self.completed)
        assert self.longest_call_s < LIMIT_S + SLACK_S


@pytest.fixture
async def traffic(trio: Trio, tmp_path: Path) -> AsyncIterator[Traffic]:
    """Clients that know all three addresses."""
    async with open_stores(Database(url=trio.url, timeout_s=LIMIT_S), tmp_path) as stores:
        yield Traffic(stores)


async def test_a_primary_whose_process_is_killed_is_followed_by_another(trio: Trio, traffic: Traffic) -> None:
    async with traffic.flowing():
        await traffic.goes_on()
        trio.leader().kill_postgres()
        await traffic.goes_on()

    await asyncio.to_thread(trio.wait_until_well)
    await traffic.check("primary's process killed")


async def test_a_host_that_is_killed_with_its_patroni_is_followed_by_another(trio: Trio, traffic: Traffic) -> None:
    async with traffic.flowing():
        await traffic.goes_on()
        before = trio.leader()
        before.kill()
        await traffic.goes_on()

    before.start(trio.hosts)
    await asyncio.to_thread(trio.wait_until_well)
    await traffic.check("primary's host killed")


async def test_a_host_that_stands_still_holds_nobody_up_and_does_not_write_when_it_wakes(
    trio: Trio, traffic: Traffic
) -> None:
    async with traffic.flowing():
        await traffic.goes_on()
        before = trio.leader()
        before.stall()
        await traffic.goes_on()
        before.resume()
        await traffic.goes_on()

    await asyncio.to_thread(trio.wait_until_well)
    assert trio.leader() is not before
    await traffic.check("primary's host stopped and woken")


async def test_a_switch_to_another_primary_loses_nothing(trio: Trio, traffic: Traffic) -> None:
    async with traffic.flowing():
        await traffic.goes_on()
        before = trio.leader()
        await asyncio.to_thread(trio.switch_over)
        await traffic.goes_on()

    await asyncio.to_thread(trio.wait_until_well)
    assert trio.leader() is not before
    await traffic.check("switchover")
