"""Where it is kept which files there are. Their bytes are in `ports/objects.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sutazai.core.file import File
from sutazai.core.mark import Mark


class FileStore(Protocol):
    """
    Files, each of one tenant: for every other it is not there.

    Every method raises `StoreUnavailable` within its time limit when the store is away.
    """

    async def add(self, file: File, *, at_most: int) -> bool:
        """Keep one; False, and nothing is kept, where the tenant has `at_most` files already."""

    async def get(self, tenant: str, file_id: str) -> File | None:
        """The file, if it is the tenant's."""

    async def page(
        self, tenant: str, *, purpose: str, after: str, is_oldest_first: bool, limit: int, seen: Mark | None = None
    ) -> Sequence[File]:
        """
        So many in the order of ids, beyond the id `after`; an empty `purpose` or `after` means any.

        `seen` is as in `ports/marks.py`.
        """

    async def delete(self, tenant: str, file_id: str) -> bool:
        """Forget it; False where it was not there."""
