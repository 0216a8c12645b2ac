"""A database that commits, and then its answer is lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sutazai.adapters.postgres.database import CommitUnknown, Database


class LossyDatabase(Database):
    """Loses as many answers as it is told."""

    losses = 0

    @classmethod
    def of_same(cls, database: Database) -> LossyDatabase:
        """Another way to the same servers."""
        lossy = object.__new__(cls)
        vars(lossy).update(vars(database))
        return lossy

    @asynccontextmanager
    async def transaction(self, *, within_s: float | None = None) -> AsyncIterator[Any]:
        async with super().transaction(within_s=within_s) as connection:
            yield connection
        self._lose()

    @asynccontextmanager
    async def statement(self) -> AsyncIterator[Any]:
        async with super().statement() as connection:
            yield connection
        self._lose()

    def _lose(self) -> None:
        if self.losses:
            self.losses -= 1
            raise CommitUnknown("The connection broke.")
