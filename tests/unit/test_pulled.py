"""A pushed answer, read by a task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from sutazai.core.errors import NodeTimeout
from sutazai.core.request import Endpoint, Head, Request, Usage
from sutazai.gateway.pulled import MOST_BUFFERED_BYTES, Pulled
from sutazai.ports.inference import Reply

HEAD = Head(200, b"text/plain", None, "a", "")
SLOW = NodeTimeout("It was silent.", node="a")


class Source:
    """An `Inference` and its one `Call`, which remembers what was asked of it."""

    def __init__(self, at_once: Callable[[Reply], None] = lambda _: None) -> None:
        self.said: list[str] = []
        self._at_once = at_once

    def start(self, request: Request, reply: Reply) -> Source:
        self._at_once(reply)
        return self

    def cancel(self) -> None:
        self.said.append("cancel")

    def pause(self) -> None:
        self.said.append("pause")

    def resume(self) -> None:
        self.said.append("resume")


def begun(source: Source) -> Pulled:
    pulled = Pulled()
    pulled.begin(source, Request("r", Endpoint.OPENAI_CHAT, "m", True, b"", "t", "", 0.0))
    return pulled


async def soon(act: Callable[[], None]) -> None:
    """Let it happen while somebody else waits."""
    await asyncio.sleep(0)
    act()


async def test_parts_come_in_order_and_then_the_end() -> None:
    pulled = begun(Source())
    pulled.head(HEAD)
    pulled.chunk(b"a")
    pulled.chunk(b"b")
    pulled.end(Usage(1, 2))

    assert await pulled.until_head() is HEAD
    assert [await pulled.part() for _ in range(4)] == [b"a", b"b", b"", b""]
    assert pulled.usage == Usage(1, 2)


async def test_an_answer_that_is_there_before_start_returns_is_read_all_the_same() -> None:
    source = Source(lambda reply: reply.whole(HEAD, b"all", None))
    pulled = begun(source)

    assert await pulled.until_head() is HEAD
    assert [await pulled.part(), await pulled.part()] == [b"all", b""]
    pulled.cancel()
    assert source.said == []


async def test_a_reader_is_woken_by_whatever_comes() -> None:
    pulled = begun(Source())

    assert (await asyncio.gather(pulled.until_head(), soon(lambda: pulled.head(HEAD))))[0] is HEAD
    assert (await asyncio.gather(pulled.part(), soon(lambda: pulled.chunk(b"a"))))[0] == b"a"
    assert (await asyncio.gather(pulled.part(), soon(lambda: pulled.end(None))))[0] == b""


async def test_a_failure_before_the_head_is_raised() -> None:
    pulled = begun(Source(lambda reply: reply.fail(SLOW)))

    await pulled.until_part()
    with pytest.raises(NodeTimeout):
        await pulled.until_head()
    with pytest.raises(NodeTimeout):
        await pulled.part()


async def test_a_failure_in_the_middle_comes_after_what_was_said() -> None:
    pulled = begun(Source())
    pulled.head(HEAD)
    pulled.chunk(b"a")
    pulled.fail(SLOW)

    assert await pulled.part() == b"a"
    with pytest.raises(NodeTimeout):
        await pulled.part()


@pytest.mark.parametrize("before_start_returns", [True, False])
async def test_a_node_that_is_faster_than_the_reader_is_paused_and_goes_on(before_start_returns: bool) -> None:
    part = b"x" * (MOST_BUFFERED_BYTES // 8)

    def flood(reply: Reply) -> None:
        for _ in range(12):
            reply.chunk(part)

    source = Source(flood if before_start_returns else lambda _: None)
    pulled = begun(source)
    if not before_start_returns:
        flood(pulled)

    assert source.said == ["pause"]
    for _ in range(12):
        await pulled.part()
    assert source.said == ["pause", "resume"]


async def test_who_stops_reading_ends_the_request_once() -> None:
    source = Source()
    pulled = begun(source)
    pulled.chunk(b"a")
    pulled.cancel()
    pulled.cancel()

    assert source.said == ["cancel"]


async def test_a_wait_that_was_given_up_loses_nothing() -> None:
    pulled = begun(Source())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await pulled.until_part()
    pulled.chunk(b"a")

    await pulled.until_part()
    assert await pulled.part() == b"a"
