"""Objects in a folder or in a bucket of S3 (and what speaks its API), by obstore."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, S3Store

from sutazai.core.errors import NotFound, SettingsError, StoreUnavailable, TooLarge
from sutazai.ports.objects import checked_name
from sutazai.settings.model import Objects

FOLDER = "objects"
PART_BYTES = 1024 * 1024
"""Least size of a part of a stream, but for the last."""
UPLOAD_BYTES = 8 * 1024 * 1024
"""Of a stream that are held, and sent together; S3 takes ten thousand times as much."""
RETRIES = 2


def open_objects(settings: Objects, data_dir: Path) -> StoredObjects:
    """
    The store that the settings name; by default a folder below `data_dir`, which is made where it is missing.

    A bucket is not asked for anything yet: where it is away, the first call says so. Raises `StoreUnavailable`, or
    `SettingsError` where one of the two keys is missing.
    """
    url = settings.url or str(data_dir / FOLDER)
    try:
        store = _bucket(settings) if url.startswith("s3://") else LocalStore(Path(url), mkdir=True)
    except (BaseError, OSError, ValueError) as error:
        raise StoreUnavailable(f"The object store could not be opened. Mend `objects.url` ({error}).") from error
    return StoredObjects(store, timeout_s=settings.timeout_s, max_object_bytes=settings.max_object_bytes)


def _bucket(settings: Objects) -> S3Store:
    parts = urlsplit(settings.url)
    limit = timedelta(seconds=settings.timeout_s)
    keys = {}
    if (settings.access_key_id is None) != (settings.secret_access_key is None):
        raise SettingsError(["objects.access_key_id goes with objects.secret_access_key; give both or neither."])
    if settings.access_key_id is not None and settings.secret_access_key is not None:
        keys = {
            "access_key_id": settings.access_key_id.reveal(),
            "secret_access_key": settings.secret_access_key.reveal(),
        }
    if settings.endpoint:
        keys["endpoint"] = settings.endpoint
    return S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        region=settings.region,
        client_options={"allow_http": settings.endpoint.startswith("http://"), "timeout": limit},
        retry_config={"max_retries": RETRIES, "retry_timeout": limit},
        **keys,  # type: ignore[arg-type]  # a TypedDict cannot be spread in part
    )


class StoredObjects:
    """The `ObjectStore` of production."""

    def __init__(self, store: LocalStore | S3Store, *, timeout_s: float, max_object_bytes: int) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._max_object_bytes = max_object_bytes

    async def put(self, name: str, content: bytes, *, is_new: bool = False) -> bool:
        checked_name(name)
        if len(content) > self._max_object_bytes:
            raise TooLarge(f"The object had {len(content)} bytes; at most {self._max_object_bytes} are kept in one.")
        async with self._limited(name):
            try:
                await obstore.put_async(self._store, name, content, mode="create" if is_new else "overwrite")
            except AlreadyExistsError:
                return False
        return True

    async def put_stream(self, name: str, parts: AsyncIterator[bytes]) -> int:
        checked_name(name)
        clock, size_bytes = asyncio.get_running_loop().time, 0
        with _our_errors(name, self._timeout_s):
            async with asyncio.timeout(None) as limit:
                # Left with an error, the writer gives up what it has uploaded, and else it closes. An iterator in the
                # hands of `put_async` would go on when that is cancelled.
                async with obstore.open_writer_async(self._store, name, buffer_size=UPLOAD_BYTES) as writer:
                    async for part in parts:
                        limit.reschedule(clock() + self._timeout_s)
                        size_bytes += await writer.write(part)
                        limit.reschedule(None)
                    limit.reschedule(clock() + self._timeout_s)
        return size_bytes

    async def get(self, name: str) -> bytes:
        checked_name(name)
        async with self._limited(name):
            found = await obstore.get_async(self._store, name)
            return bytes(await found.bytes_async())

    async def get_range(self, name: str, *, start: int, length: int) -> bytes:
        checked_name(name)
        async with self._limited(name):
            size_bytes = (await obstore.head_async(self._store, name))["size"]
            end = min(start + length, size_bytes)
            if start >= end:  # which stores refuse, each with an error of its own
                return b""
            return bytes(await obstore.get_range_async(self._store, name, start=start, end=end))

    async def stream(self, name: str) -> AsyncIterator[bytes]:
        checked_name(name)
        async with self._limited(name):
            parts = aiter((await obstore.get_async(self._store, name)).stream(min_chunk_size=PART_BYTES))
        while True:
            async with self._limited(name):
                part = await anext(parts, None)
            if part is None:
                return
            if len(part):
                yield bytes(part)

    async def delete(self, name: str) -> None:
        checked_name(name)
        try:
            async with self._limited(name):
                await obstore.delete_async(self._store, name)
        except NotFound:
            return

    async def list(self, prefix: str, *, limit: int) -> Sequence[str]:
        checked_name(prefix)
        names: list[str] = []
        batches = aiter(obstore.list(self._store, prefix=f"{prefix}/"))
        while len(names) < limit:
            async with self._limited(prefix):
                batch = await anext(batches, None)
            if batch is None:
                break
            names += [found["path"] for found in batch]
        return names[:limit]

    @asynccontextmanager
    async def _limited(self, name: str) -> AsyncIterator[None]:
        """One call, within the time limit, with our errors."""
        with _our_errors(name, self._timeout_s):
            async with asyncio.timeout(self._timeout_s):
                yield


@contextmanager
def _our_errors(name: str, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"No object is at {name!r}; it was deleted or never written.") from error
    except TimeoutError as error:
        raise StoreUnavailable(
            f"The object store kept silent for {timeout_s:g} s; see that `objects.url` can be reached."
        ) from error
    except (BaseError, OSError) as error:
        raise StoreUnavailable(f"The object store failed ({type(error).__name__}); try again.") from error
