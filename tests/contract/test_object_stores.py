"""What every object store does, run over the one in memory, a folder and a bucket of S3."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import boto3  # type: ignore[import-untyped]  # it ships none
import pytest
from moto.server import ThreadedMotoServer

from sutazai.adapters.objects.store import open_objects
from sutazai.core.errors import BadRequest, NotFound, SettingsError, StoreUnavailable, TooLarge
from sutazai.ports.objects import ObjectStore, object_name
from sutazai.settings.model import Objects
from sutazai.settings.secret import Secret
from sutazai.testing.objects import MemoryObjects

MOST_BYTES = 4 * 2**20
NAME = object_name("acme", "files", "file-1")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server that plays S3, with the bucket `bucket`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        aws_access_key_id="id",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="bucket")
    client.close()
    yield f"http://{host}:{port}"
    server.stop()


def bucket(endpoint: str, prefix: str, *, timeout_s: float = 20.0) -> Objects:
    return Objects(
        url=f"s3://bucket/{prefix}",
        endpoint=endpoint,
        access_key_id=Secret("id"),
        secret_access_key=Secret("secret"),
        timeout_s=timeout_s,
        max_object_bytes=MOST_BYTES,
    )


@pytest.fixture(params=["memory", "folder", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store."""
    if request.param == "memory":
        return MemoryObjects(max_object_bytes=MOST_BYTES)
    if request.param == "folder":
        return open_objects(Objects(max_object_bytes=MOST_BYTES), tmp_path)
    return open_objects(bucket(request.getfixturevalue("s3"), tmp_path.name), tmp_path)


@pytest.mark.parametrize("content", [b"", b"one", b"\0\xff" * 600_000], ids=["empty", "small", "large"])
async def test_what_was_put_is_there_whole_and_in_parts(objects: ObjectStore, content: bytes) -> None:
    assert await objects.put(NAME, content)

    assert await objects.get(NAME) == content
    parts = [part async for part in objects.stream(NAME)]
    assert b"".join(parts) == content
    assert all(parts)


async def test_an_object_takes_the_place_of_the_one_before(objects: ObjectStore) -> None:
    await objects.put(NAME, b"one")
    await objects.put(NAME, b"two")

    assert await objects.get(NAME) == b"two"


async def parts_of(*contents: bytes, then: Exception | None = None) -> AsyncIterator[bytes]:
    for content in contents:
        yield content
    if then is not None:
        raise then


@pytest.mark.parametrize("contents", [[], [b""], [b"one", b"", b"two"], [bytes(2_500_000)] * 3])
async def test_a_stream_of_any_size_is_written_whole(objects: ObjectStore, contents: list[bytes]) -> None:
    await objects.put(NAME, b"before")

    assert await objects.put_stream(NAME, parts_of(*contents)) == sum(map(len, contents))

    assert await objects.get(NAME) == b"".join(contents)


async def test_a_stream_that_breaks_off_leaves_what_was_there(objects: ObjectStore) -> None:
    await objects.put(NAME, b"before")

    for contents in ([b"x"], [bytes(6_000_000)] * 2):
        with pytest.raises(NotFound, match="gone"):
            await objects.put_stream(NAME, parts_of(*contents, then=NotFound("It was gone.")))

    assert await objects.get(NAME) == b"before"
    assert await objects.list("t-acme", limit=9) == [NAME]


async def test_a_new_object_takes_no_place_of_another(objects: ObjectStore) -> None:
    assert await objects.put(NAME, b"one", is_new=True)
    assert not await objects.put(NAME, b"two", is_new=True)

    assert await objects.get(NAME) == b"one"


async def test_of_several_new_objects_at_once_one_is_kept(objects: ObjectStore) -> None:
    contents = [b"%d" % number for number in range(5)]
    kept = await asyncio.gather(*(objects.put(NAME, content, is_new=True) for content in contents))

    assert sum(kept) == 1
    assert await objects.get(NAME) == contents[kept.index(True)]


@pytest.mark.parametrize(
    ("start", "length", "part"), [(0, 3, b"012"), (4, 2, b"45"), (8, 100, b"89"), (10, 1, b""), (99, 1, b"")]
)
async def test_a_range_ends_where_the_object_does(objects: ObjectStore, start: int, length: int, part: bytes) -> None:
    await objects.put(NAME, b"0123456789")

    assert await objects.get_range(NAME, start=start, length=length) == part


async def test_what_is_not_there_is_not_found(objects: ObjectStore) -> None:
    with pytest.raises(NotFound):
        await objects.get(NAME)
    with pytest.raises(NotFound):
        await objects.get_range(NAME, start=0, length=1)
    with pytest.raises(NotFound):
        await anext(aiter(objects.stream(NAME)))


async def test_what_was_deleted_is_gone_and_may_be_deleted_again(objects: ObjectStore) -> None:
    await objects.put(NAME, b"one")
    await objects.delete(NAME)
    await objects.delete(NAME)

    with pytest.raises(NotFound):
        await objects.get(NAME)


async def test_a_list_has_what_is_below_the_prefix_and_nothing_beside_it(objects: ObjectStore) -> None:
    inside = [object_name("acme", "batches", "b1", str(number)) for number in range(3)]
    beside = [object_name("acme", "batches", "b10", "0"), object_name("other", "batches", "b1", "0")]
    for name in (*inside, *beside):
        await objects.put(name, b"x")

    prefix = object_name("acme", "batches", "b1")
    assert sorted(await objects.list(prefix, limit=10)) == inside
    assert len(await objects.list(prefix, limit=2)) == 2
    assert await objects.list(object_name("nobody"), limit=10) == []


async def test_an_object_over_the_limit_is_refused(objects: ObjectStore) -> None:
    with pytest.raises(TooLarge, match=str(MOST_BYTES)):
        await objects.put(NAME, bytes(MOST_BYTES + 1))
    with pytest.raises(NotFound):
        await objects.get(NAME)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "a/../b",
        "..",
        "a//b",
        "a/",
        "a/.b",
        "a\\b",
        "a\0b",
        "a/b\n",
        "a%2f..",
        "é",
        "/".join("abcdefghi"),
    ],
)
async def test_no_name_leads_out_of_the_store(objects: ObjectStore, name: str) -> None:
    for call in (objects.put(name, b"x"), objects.get(name), objects.delete(name), objects.list(name, limit=1)):
        with pytest.raises(BadRequest):
            await call


def test_tenants_of_any_name_have_parts_of_their_own() -> None:
    tenants = ["acme", "Acme", "..", "a/b", "a b", "t-acme", "ключ", "", "x" * 300, "acme\n"]
    assert len({object_name(tenant, "files") for tenant in tenants}) == len(tenants)


async def test_a_bucket_that_cannot_be_reached_is_unavailable(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and never listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        objects = open_objects(bucket(f"http://127.0.0.1:{taken.getsockname()[1]}", "", timeout_s=0.3), tmp_path)
        with pytest.raises(StoreUnavailable):
            await objects.get(NAME)


async def test_a_bucket_that_keeps_silent_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        objects = open_objects(bucket(f"http://127.0.0.1:{silent.getsockname()[1]}", "", timeout_s=0.2), tmp_path)
        with pytest.raises(StoreUnavailable):
            await objects.put(NAME, b"x")


async def test_a_stream_into_a_bucket_that_keeps_silent_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        objects = open_objects(bucket(f"http://127.0.0.1:{silent.getsockname()[1]}", "", timeout_s=0.2), tmp_path)
        for content in (b"x", bytes(9_000_000)):
            with pytest.raises(StoreUnavailable):
                await objects.put_stream(NAME, parts_of(content))


async def test_a_stream_may_take_longer_than_the_limit_of_a_call(tmp_path: Path) -> None:
    objects = open_objects(Objects(timeout_s=0.1), tmp_path)

    async def slow() -> AsyncIterator[bytes]:
        for _ in range(4):
            await asyncio.sleep(0.05)
            yield b"x"

    assert await objects.put_stream(NAME, slow()) == 4


async def test_a_stream_that_is_cancelled_leaves_nothing(objects: ObjectStore) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield bytes(9_000_000)
        await asyncio.Event().wait()

    writing = asyncio.create_task(objects.put_stream(NAME, endless()))
    await asyncio.sleep(0.2)
    writing.cancel()
    await asyncio.wait([writing])

    assert writing.cancelled()
    assert await objects.list("t-acme", limit=9) == []


def test_one_key_without_the_other_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="both or neither"):
        open_objects(Objects(url="s3://bucket", access_key_id=Secret("id")), tmp_path)
