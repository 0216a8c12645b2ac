"""Files in memory: the second implementation of the port, for tests."""

from __future__ import annotations

from collections.abc import Sequence

from sutazai.core.errors import StoreUnavailable
from sutazai.core.file import File
from sutazai.core.mark import Mark


class MemoryFiles:
    """A `FileStore` that can be told to fail as a lost database does."""

    def __init__(self) -> None:
        self._files: dict[str, File] = {}
        self.is_away = False
        """Whether every call raises `StoreUnavailable`."""

    async def add(self, file: File, *, at_most: int) -> bool:
        self._check()
        if sum(one.tenant == file.tenant for one in self._files.values()) >= at_most:
            return False
        self._files[file.id] = file
        return True

    async def get(self, tenant: str, file_id: str) -> File | None:
        self._check()
        file = self._files.get(file_id)
        return file if file is not None and file.tenant == tenant else None

    async def page(
        self, tenant: str, *, purpose: str, after: str, is_oldest_first: bool, limit: int, seen: Mark | None = None
    ) -> Sequence[File]:
        self._check()
        found = [one for one in self._files.values() if one.tenant == tenant and purpose in {"", one.purpose}]
        if after:
            found = [one for one in found if (one.id > after) is is_oldest_first and one.id != after]
        return sorted(found, key=lambda one: one.id, reverse=not is_oldest_first)[:limit]

    async def delete(self, tenant: str, file_id: str) -> bool:
        found = await self.get(tenant, file_id)
        if found is not None:
            del self._files[file_id]
        return found is not None

    def _check(self) -> None:
        if self.is_away:
            raise StoreUnavailable("The files in memory were told to be away. Set `is_away` to False.")
