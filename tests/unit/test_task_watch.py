"""Bells of those who watch tasks: who is woken, by what, and at what cost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any, cast

import pytest

from sutazai.core.errors import Overloaded, StoreUnavailable
from sutazai.tasks.watch import AT_ONCE, Bell, Watch


class Radio:
    """A store of which only the news are there."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[frozenset[str]] = asyncio.Queue()
        self.known: dict[str, int] = {}
        self.asked: list[Sequence[str]] = []
        self.is_away = False

    async def changed(self) -> AsyncIterator[frozenset[str]]:
        while True:
            yield await self.news.get()
            self.news.task_done()

    async def versions(self, task_ids: Sequence[str]) -> Mapping[str, int]:
        self.asked.append(task_ids)
        if self.is_away:
            raise StoreUnavailable("The database was told to be away.")
        return {task: self.known[task] for task in task_ids if task in self.known}

    async def tell(self, *tasks: str) -> None:
        """Tell, and wait until it was dealt with."""
        self.news.put_nowait(frozenset(tasks))
        await self.news.join()


@asynccontextmanager
async def watching(radio: Radio, **options: Any) -> AsyncIterator[Watch]:
    watch = Watch(cast("Any", radio), **options)
    task = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def has_rung(bell: Bell) -> bool:
    return bell._rung.is_set()


async def test_only_those_who_watch_a_task_are_woken() -> None:
    radio = Radio()
    async with watching(radio) as watch:
        with watch.bell("a", seen=1) as first, watch.bell("a", seen=1) as second, watch.bell("b", seen=1) as other:
            await radio.tell("a", "nobody's")

            assert (has_rung(first), has_rung(second), has_rung(other)) == (True, True, False)
            await first.wait()
            assert not has_rung(first)
        assert watch.watchers == 0


async def test_where_nobody_can_tell_one_query_finds_those_that_changed() -> None:
    radio = Radio()
    radio.known = {"a": 3, "b": 1}
    async with watching(radio) as watch, asyncio.timeout(5):
        with (
            watch.bell("a", seen=1) as old,
            watch.bell("a", seen=3) as seen,
            watch.bell("b", seen=1) as same,
            watch.bell("gone", seen=1) as gone,
        ):
            await radio.tell()

            assert [has_rung(bell) for bell in (old, seen, same, gone)] == [True, False, False, False]
            assert list(map(sorted, radio.asked)) == [["a", "b", "gone"]]


async def test_many_are_looked_at_in_bounded_queries_and_nobody_in_none() -> None:
    radio = Radio()
    async with watching(radio) as watch:
        await radio.tell()
        assert radio.asked == []
        with ExitStack() as stack:
            for number in range(AT_ONCE + 1):
                stack.enter_context(watch.bell(str(number), seen=0))
            await radio.tell()

    assert [len(asked) for asked in radio.asked] == [AT_ONCE, 1]


async def test_a_database_that_is_away_ends_no_watch() -> None:
    radio = Radio()
    radio.is_away = True
    async with watching(radio) as watch:
        with watch.bell("a", seen=0) as bell:
            await radio.tell()
            radio.is_away = False
            radio.known = {"a": 1}
            await radio.tell()

            assert has_rung(bell)


async def test_there_are_never_too_many_watchers() -> None:
    watch = Watch(cast("Any", Radio()), max_watchers=2)
    with watch.bell("a", seen=0), watch.bell("b", seen=0), pytest.raises(Overloaded), watch.bell("c", seen=0):
        pass
    with watch.bell("c", seen=0):
        assert watch.watchers == 1
