"""What a database knows of tasks that nobody may ever start: word of them is at a broker, and may be lost there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderWay:
    """An attempt that no end was written of."""

    task: str
    fence: int
    queue: str


class RefillStore(Protocol):
    """Of one database. Every method raises `StoreUnavailable` within its time limit."""

    async def beat(self, worker: str) -> None:
        """It lives."""

    async def beats(self) -> Mapping[str, int]:
        """The last beat of each worker that was not forgotten."""

    async def forget(self, workers: Mapping[str, int]) -> None:
        """Those that are gone, unless they have beaten since."""

    async def under_way(self, workers: Sequence[str], *, limit: int) -> Sequence[UnderWay]:
        """What these workers have begun and not ended; at most so many."""

    async def without_word(self, queue: str, *, since: datetime, limit: int) -> int:
        """
        Tasks that may be started since then and of which this database holds no word, counted up to so many.

        0 while it has word that is due since then: that of others may be on its way like it. At times those that it
        has word of are counted too.
        """

    async def refill(self, queue: str, *, since: datetime, limit: int) -> int:
        """
        Put word of the oldest of them into the queue again; how many they were.

        None while it has word that is due since then. Of several callers at once one does it.
        """
