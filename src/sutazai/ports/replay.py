"""What replay needs of the place where events and tasks are kept: both as of one moment, and room for a copy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from sutazai.core.task import Task
from sutazai.ports.task_events import KeptEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The tasks as they are kept beside those made from events."""

    kept: int
    replayed: int
    kept_digest: str
    """Of all their fields, whatever their order; computed where they are kept."""
    replayed_digest: str
    differing: Sequence[str] = ()
    """Some of those that are not alike, or that only one side has."""

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same."""
        return (self.kept, self.kept_digest) == (self.replayed, self.replayed_digest)


class ReplaySession(Protocol):
    """Everything as of one moment. Every method raises `StoreUnavailable`."""

    def events(self, *, until: datetime | None = None, task: str = "") -> AsyncIterator[Sequence[KeptEvent]]:
        """All events up to that time, or those of one task, in batches: task by task, oldest first."""

    def in_order(self) -> AsyncIterator[Sequence[KeptEvent]]:
        """All events, in batches, in the order of positions."""

    async def count(self) -> tuple[int, int]:
        """How many tasks there are and, about, how many events."""

    async def newest(self) -> int:
        """The highest position; 0 where there is no event."""

    async def tasks(self, ids: Sequence[str]) -> Mapping[str, Task]:
        """The tasks as they are kept."""

    async def empty_copy(self) -> None:
        """Begin a new copy of the tasks; the last one goes."""

    async def add(self, tasks: Sequence[tuple[Task, str]]) -> None:
        """Put tasks into the copy, each with its draft as it was written."""

    async def compare(self) -> Comparison:
        """The copy beside the tasks."""


class ReplayStore(Protocol):
    """The events and tasks of one database."""

    def session(self) -> AbstractAsyncContextManager[ReplaySession]:
        """Look at one moment for as long as it takes. The copy is kept when it ends without an error."""

    async def tail(self, *, after: int, limit: int) -> Sequence[KeptEvent]:
        """As in `TaskStore`."""
