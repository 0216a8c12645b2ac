"""
What is taken out of the database: long files as objects of a bounded size, and objects that its rows spoke of.

The parts of a file are objects below `archive/NAME`; one more, written last, says how many they are. Without it there
is no such file, so one whose writing failed is not there, and writing it again replaces what was left.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from sutazai.core.errors import NotFound
from sutazai.ports.objects import ObjectStore, checked_name

PART_BYTES = 4 * 1024 * 1024
FOLDER = "archive"
"""No tenant's part of the store begins so: see `object_name`."""
COUNT = "parts"
MOVES_AT_ONCE = 8


@asynccontextmanager
async def archiving(objects: ObjectStore, name: str) -> AsyncIterator[Callable[[bytes], Awaitable[None]]]:
    """Write a file; it is there once the context has ended well. Raises what `ObjectStore.put` does."""
    buffer = bytearray()
    count = 0

    async def put_part() -> None:
        nonlocal count
        await objects.put(_part(name, f"{count:06}"), bytes(buffer[:PART_BYTES]))
        del buffer[:PART_BYTES]
        count += 1

    async def write(chunk: bytes) -> None:
        buffer.extend(chunk)
        while len(buffer) >= PART_BYTES:
            await put_part()

    yield write
    if buffer:
        await put_part()
    await objects.put(_part(name, COUNT), str(count).encode())


async def archived(objects: ObjectStore, name: str) -> AsyncIterator[bytes]:
    """The file, part by part. Raises `NotFound` where there is none, and what `ObjectStore.get` does."""
    for number in range(int(await objects.get(_part(name, COUNT)))):
        yield await objects.get(_part(name, f"{number:06}"))


def archive_name(shard: str, name: str) -> str:
    """What a file of a shard is called: shards have parts of the same names. With an empty shard the name alone."""
    return f"{shard}/{name}" if shard else name


async def set_aside(objects: ObjectStore, part: str, names: Sequence[str]) -> None:
    """
    Move objects below `archive/PART.results`; those that were moved before are passed over.

    Raises what `ObjectStore.put` does; what was moved by then stays there, and the others where they were.
    """
    waiting = iter(names)

    async def move() -> None:
        for name in waiting:
            with suppress(NotFound):
                await objects.put(checked_name(f"{FOLDER}/{part}.results/{name}"), await objects.get(name))
            await objects.delete(name)

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(MOVES_AT_ONCE):
                group.create_task(move(), name=f"move objects {number}")
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures


def _part(name: str, part: str) -> str:
    return checked_name(f"{FOLDER}/{name}/{part}")
