"""Objects in memory: the second implementation of the port, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from sutazai.core.errors import NotFound, StoreUnavailable, TooLarge
from sutazai.ports.objects import checked_name

PART_BYTES = 64 * 1024


class MemoryObjects:
    """An `ObjectStore` that can be told to fail as a lost one does."""

    def __init__(self, *, max_object_bytes: int = 2**20) -> None:
        self.objects: dict[str, bytes] = {}
        self.is_away = False
        """Whether every call raises `StoreUnavailable`."""
        self._max_object_bytes = max_object_bytes

    async def put(self, name: str, content: bytes, *, is_new: bool = False) -> bool:
        self._check(name)
        if len(content) > self._max_object_bytes:
            raise TooLarge(f"The object had {len(content)} bytes; at most {self._max_object_bytes} are kept in one.")
        if is_new and name in self.objects:
            return False
        self.objects[name] = bytes(content)
        return True

    async def put_stream(self, name: str, parts: AsyncIterator[bytes]) -> int:
        self._check(name)
        content = b"".join([part async for part in parts])
        self.objects[name] = content
        return len(content)

    async def get(self, name: str) -> bytes:
        self._check(name)
        if name not in self.objects:
            raise NotFound(f"No object is at {name!r}; it was deleted or never written.")
        return self.objects[name]

    async def get_range(self, name: str, *, start: int, length: int) -> bytes:
        return (await self.get(name))[start : start + length]

    async def stream(self, name: str) -> AsyncIterator[bytes]:
        content = await self.get(name)
        for start in range(0, len(content), PART_BYTES):
            yield content[start : start + PART_BYTES]

    async def delete(self, name: str) -> None:
        self._check(name)
        self.objects.pop(name, None)

    async def list(self, prefix: str, *, limit: int) -> Sequence[str]:
        self._check(prefix)
        return [name for name in self.objects if name.startswith(f"{prefix}/")][:limit]

    def _check(self, name: str) -> None:
        checked_name(name)
        if self.is_away:
            raise StoreUnavailable("The objects in memory were told to be away. Set `is_away` to False.")
