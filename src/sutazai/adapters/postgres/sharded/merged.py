"""Several streams of word as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def merged(sources: Sequence[AsyncIterator[T]]) -> AsyncGenerator[T]:
    """What any of them gives, as it comes. They never end; leaving this one closes them."""
    asked: dict[asyncio.Task[T], AsyncIterator[T]] = {}
    try:
        for source in sources:
            asked[_ask(source)] = source
        while True:
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                source = asked.pop(one)
                news = one.result()
                asked[_ask(source)] = source
                yield news
    finally:
        for one in asked:
            one.cancel()
            with suppress(asyncio.CancelledError):
                await one


def _ask(source: AsyncIterator[T]) -> asyncio.Task[T]:
    async def next_() -> T:
        return await anext(source)

    return asyncio.create_task(next_(), name="hear of a shard")
