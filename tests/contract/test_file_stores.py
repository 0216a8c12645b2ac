"""What every store of files does, run over the one in memory and the one in PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from tests.shards import addresses

from sutazai.core.file import File, file_id, is_file_id

if TYPE_CHECKING:
    from sutazai.adapters.postgres.stores import Stores
    from sutazai.ports.files import FileStore

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture(params=["memory", "postgres", "pgbouncer", "two shards"])
def urls(request: pytest.FixtureRequest) -> Sequence[str]:
    return addresses(request)


@pytest.fixture
def files(stores: Stores) -> FileStore:
    return stores.files


def file(number: int, *, tenant: str = "acme", purpose: str = "batch") -> File:
    return File(
        id=file_id(NOW.timestamp() + number, number),
        tenant=tenant,
        name='a "b" ключ.jsonl',
        purpose=purpose,
        size_bytes=2**40,
        created_at=NOW,
    )


async def test_a_file_is_kept_as_it_was(files: FileStore) -> None:
    assert await files.add(file(1), at_most=10)

    assert await files.get("acme", file(1).id) == file(1)


async def test_a_file_is_not_there_for_another_tenant(files: FileStore) -> None:
    await files.add(file(1), at_most=10)

    assert await files.get("other", file(1).id) is None
    assert not await files.delete("other", file(1).id)
    assert await files.page("other", purpose="", after="", is_oldest_first=False, limit=10) == []
    assert await files.get("acme", file(1).id) is not None


async def test_a_deleted_file_is_gone(files: FileStore) -> None:
    await files.add(file(1), at_most=10)

    assert await files.delete("acme", file(1).id)
    assert not await files.delete("acme", file(1).id)
    assert await files.get("acme", file(1).id) is None


@pytest.mark.parametrize("is_oldest_first", [True, False])
async def test_files_are_listed_in_pages_by_age(files: FileStore, is_oldest_first: bool) -> None:
    for number in (2, 0, 1, 3):
        await files.add(file(number), at_most=10)
    await files.add(file(4, purpose="batch_output"), at_most=10)

    seen: list[str] = []
    while page := await files.page(
        "acme", purpose="batch", after=seen[-1] if seen else "", is_oldest_first=is_oldest_first, limit=3
    ):
        seen += [one.id for one in page]

    assert seen == sorted((file(number).id for number in range(4)), reverse=not is_oldest_first)


async def test_writers_at_once_do_not_go_over_the_limit_of_their_tenant(files: FileStore) -> None:
    await files.add(file(99, tenant="other"), at_most=3)
    added = await asyncio.gather(*(files.add(file(number), at_most=3) for number in range(6)))

    assert sum(added) == 3
    assert len(await files.page("acme", purpose="", after="", is_oldest_first=True, limit=10)) == 3


def test_ids_of_files_can_be_told_from_other_texts() -> None:
    assert is_file_id(file_id(NOW.timestamp(), 2**80 - 1))
    assert not any(map(is_file_id, ["", "file-", "file-../x", file(1).id + "\n", file(1).id.upper()]))
