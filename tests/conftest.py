"""What all tests share: fake model servers, a time limit, and a check that nothing is left running."""

from __future__ import annotations

import asyncio
import functools
import inspect
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

import pytest

from sutazai.testing.node import FakeNode

DEADLINE_S = 30.0
"""For the body of a test; `@pytest.mark.deadline(seconds)` grants another."""
GRACE_S = 15.0
"""For its fixtures, on top."""

TASK_GRACE_S = 0.5
"""For tasks that are about to end."""

StartNode: TypeAlias = Callable[..., Awaitable[FakeNode]]


def pytest_configure(config: pytest.Config) -> None:
    """Name our marker."""
    config.addinivalue_line("markers", "deadline(seconds): the test may take that long instead of 30 s")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bound each asynchronous test, and let it begin with the check that ends it."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if inspect.iscoroutinefunction(item.obj):
            item.obj = _bounded(item.obj, _deadline_s(item))
        if inspect.iscoroutinefunction(_innermost(item.obj)):
            item.fixturenames.insert(0, "no_task_left_over")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """
    End a test, with its fixtures, that hangs where no event loop could end it.

    Signals reach the main thread alone, so a run in another thread goes without.
    """
    if threading.current_thread() is not threading.main_thread():
        return (yield)
    limit_s = _deadline_s(item) + GRACE_S
    before = signal.signal(signal.SIGALRM, functools.partial(_give_up, limit_s))
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
async def fake_nodes() -> AsyncIterator[StartNode]:
    """A function that starts a `FakeNode` with the arguments it is given; all are closed after the test."""
    async with AsyncExitStack() as stack:

        async def start(*arguments: Any, **keywords: Any) -> FakeNode:
            return await stack.enter_async_context(FakeNode(*arguments, **keywords))

        yield start


@pytest.fixture
async def no_task_left_over() -> AsyncIterator[None]:
    """Fail a test whose tasks outlive it and its fixtures."""
    before = asyncio.all_tasks()
    yield
    left = {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}
    if left:
        # Tasks that were cancelled a moment ago, or close a generator that a library dropped, may end.
        _, left = await asyncio.wait(left, timeout=TASK_GRACE_S)

    assert not left, f"These tasks were still running after the test: {sorted(map(repr, left))}"


def _innermost(test: Any) -> Any:
    """The function that hypothesis wrapped, or the test itself."""
    return test.hypothesis.inner_test if hasattr(test, "hypothesis") else test


def _deadline_s(item: pytest.Item) -> float:
    marker = item.get_closest_marker("deadline")
    return DEADLINE_S if marker is None else float(marker.args[0])


def _bounded(test: Callable[..., Awaitable[None]], limit_s: float) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def bounded(*arguments: Any, **keywords: Any) -> None:
        async with asyncio.timeout(limit_s):
            await test(*arguments, **keywords)

    return bounded


def _give_up(limit_s: float, *_: object) -> None:
    # Event loops, uvloop's above all, log other exceptions and go on; this one they pass through.
    raise SystemExit(f"The test and its fixtures took longer than {limit_s:g} s.")
