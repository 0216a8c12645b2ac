"""Long files as objects: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from sutazai.adapters.objects.archive import PART_BYTES, archived, archiving, set_aside
from sutazai.adapters.objects.store import StoredObjects, open_objects
from sutazai.core.errors import NotFound, StoreUnavailable
from sutazai.settings.model import Objects
from sutazai.testing.objects import MemoryObjects

NAME = "tasks_2026_01.csv.zst"


@pytest.fixture
def objects(tmp_path: Path) -> StoredObjects:
    return open_objects(Objects(), tmp_path)


async def read(objects: StoredObjects) -> list[bytes]:
    return [part async for part in archived(objects, NAME)]


async def fail_to_write(objects: StoredObjects) -> None:
    async with archiving(objects, NAME) as write:
        await write(bytes(PART_BYTES))
        raise OSError("no more")


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, 2 * PART_BYTES + 1])
async def test_what_was_written_is_read_back_in_parts(objects: StoredObjects, size: int) -> None:
    content = bytes(number % 251 for number in range(1000)) * (size // 1000 + 1)
    async with archiving(objects, NAME) as write:
        for start in range(0, size, 3_000_000):
            await write(content[start : min(start + 3_000_000, size)])

    parts = await read(objects)
    assert b"".join(parts) == content[:size]
    assert max(map(len, parts), default=0) <= PART_BYTES


async def test_a_file_whose_writing_failed_is_not_there_and_can_be_written_again(objects: StoredObjects) -> None:
    with pytest.raises(OSError, match="no more"):
        await fail_to_write(objects)
    with pytest.raises(NotFound):
        await read(objects)

    async with archiving(objects, NAME) as write:
        await write(b"short")
    assert await read(objects) == [b"short"]


async def test_objects_are_set_aside_once(objects: StoredObjects) -> None:
    names = [f"t-acme/results/{number}/1-abc" for number in range(20)]
    for name in names[1:]:  # the first was moved by an attempt before
        await objects.put(name, name.encode())
    moved = "archive/tasks_2026_01.results"
    await objects.put(f"{moved}/{names[0]}", names[0].encode())

    for _ in range(2):
        await set_aside(objects, "tasks_2026_01", names)

    assert await objects.list("t-acme", limit=1) == []
    assert sorted(await objects.list("archive", limit=99)) == sorted(f"{moved}/{name}" for name in names)
    assert await objects.get(f"{moved}/{names[7]}") == names[7].encode()


async def test_a_store_that_is_away_leaves_objects_where_they_were() -> None:
    objects = MemoryObjects()
    await objects.put("t-acme/results/1/1-abc", b"x")
    objects.is_away = True

    with pytest.raises(StoreUnavailable):
        await set_aside(objects, "tasks_2026_01", ["t-acme/results/1/1-abc"])
    assert list(objects.objects) == ["t-acme/results/1/1-abc"]
