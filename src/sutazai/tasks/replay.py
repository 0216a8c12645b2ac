"""
Makes tasks anew from their events: to prove that what is kept is what happened, and to see what was at another time.

Events come task by task, so one task is in hand at a time. A task whose events are not whole is told and left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from sutazai.core.errors import StoreUnavailable
from sutazai.core.task import IllegalChange, Task, TaskStatus, after
from sutazai.ports.replay import Comparison, ReplaySession
from sutazai.ports.task_events import KeptEvent

MOST_FAULTS = 100
"""Told in words; past it they are counted."""

Note = Callable[[int], None]
"""Told how many events have been looked at so far."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A task that its events do not give."""

    task: str
    version: int
    """Of the event that it is about."""
    why: str


@dataclass(frozen=True, slots=True)
class Folded:
    """A task that was made from events, with its draft as it was written; or why not."""

    task: Task | None
    draft: str
    fault: Fault | None = None


@dataclass(slots=True)
class Found:
    """What a look at all events found."""

    events: int = 0
    tasks: int = 0
    statuses: Counter[TaskStatus] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    fault_count: int = 0
    comparison: Comparison | None = None

    @property
    def is_whole(self) -> bool:
        """Whether nothing was wrong."""
        return not self.fault_count and (self.comparison is None or self.comparison.is_equal)

    def plain(self) -> Mapping[str, object]:
        """For JSON."""
        compared = self.comparison and {
            "kept": self.comparison.kept,
            "replayed": self.comparison.replayed,
            "kept_digest": self.comparison.kept_digest,
            "replayed_digest": self.comparison.replayed_digest,
            "differing": list(self.comparison.differing),
        }
        return {
            "events": self.events,
            "tasks": self.tasks,
            "statuses": {status.value: self.statuses[status] for status in TaskStatus},
            "faults": [{"task": one.task, "version": one.version, "why": one.why} for one in self.faults],
            "fault_count": self.fault_count,
            "comparison": compared,
            "is_whole": self.is_whole,
        }

    def blame(self, fault: Fault) -> None:
        """Keep a fault."""
        self.fault_count += 1
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(fault)


class Folder:
    """Folds events that come task by task."""

    def __init__(self) -> None:
        self._id = ""
        self._task: Task | None = None
        self._draft = ""
        self._fault: Fault | None = None

    def feed(self, batch: Sequence[KeptEvent]) -> Iterator[Folded]:
        """Tasks that are complete, because another one began."""
        for kept in batch:
            if kept.task != self._id:
                yield from self.end()
                self._id = kept.task
            if self._fault is None:
                self._apply(kept)

    def end(self) -> Iterator[Folded]:
        """The last one."""
        if self._id:
            yield Folded(None if self._fault else self._task, self._draft, self._fault)
        self._id, self._task, self._draft, self._fault = "", None, "", None

    def _apply(self, kept: KeptEvent) -> None:
        wanted = 1 if self._task is None else self._task.version + 1
        if kept.version != wanted:
            self._fault = Fault(kept.task, wanted, f"The event {wanted} was missing; {kept.version} came next.")
            return
        try:
            if self._task is None:
                self._draft = _draft_of(kept)
            self._task = after(self._task, kept.event, id=kept.task, at=kept.at)
        except (StoreUnavailable, IllegalChange) as error:
            self._fault = Fault(kept.task, kept.version, error.message)


async def replay(session: ReplaySession, *, until: datetime | None, note: Note) -> Found:
    """
    Make all tasks anew in the copy and, unless it is to show an earlier time, compare it with those that are kept.

    The task rows of events that are faulty are missing from the copy.
    """
    found = Found()
    await session.empty_copy()
    async for batch in _folded(session, found, until=until, note=note):
        await session.add([(one.task, one.draft) for one in batch if one.task is not None])
    if until is None:
        found.comparison = await session.compare()
    return found


async def verify(session: ReplaySession, *, note: Note) -> Found:
    """Look whether every task is whole: no event is missing or unreadable, and they give the task that is kept."""
    found = Found()
    async for batch in _folded(session, found, until=None, note=note):
        made = [one.task for one in batch if one.task is not None]
        kept = await session.tasks([task.id for task in made])
        for task in made:
            if kept.get(task.id) != task:
                found.blame(_difference(task, kept.get(task.id)))
    count, _ = await session.count()
    if count > found.tasks:
        found.blame(Fault("", 0, f"{count - found.tasks:,} tasks had no events."))
    return found


async def as_it_stood(session: ReplaySession, task_id: str, *, until: datetime | None) -> Folded | None:
    """One task at that time, or now; None where it did not exist."""
    folder = Folder()
    async for batch in session.events(until=until, task=task_id):
        for folded in folder.feed(batch):
            return folded
    return next(folder.end(), None)


async def _folded(
    session: ReplaySession, found: Found, *, until: datetime | None, note: Note
) -> AsyncIterator[Sequence[Folded]]:
    """Batches of tasks; counted, and faults told."""
    folder = Folder()
    async for batch in session.events(until=until):
        found.events += len(batch)
        yield _counted(found, list(folder.feed(batch)))
        note(found.events)
    yield _counted(found, list(folder.end()))


def _counted(found: Found, batch: Sequence[Folded]) -> Sequence[Folded]:
    found.tasks += len(batch)
    found.statuses.update(one.task.status for one in batch if one.task is not None)
    for one in batch:
        if one.fault is not None:
            found.blame(one.fault)
    return batch


def _difference(made: Task, kept: Task | None) -> Fault:
    if kept is None:
        return Fault(made.id, made.version, "Its events were there, and the task was not.")
    names = [name for name in Task.__dataclass_fields__ if getattr(made, name) != getattr(kept, name)]
    return Fault(made.id, made.version, f"Its events gave another {', '.join(names)} than was kept.")


class _Submitted(msgspec.Struct):
    draft: msgspec.Raw = msgspec.Raw()


_submitted = msgspec.json.Decoder(_Submitted)


def _draft_of(kept: KeptEvent) -> str:
    """The draft as it was written, whatever fields drafts have today."""
    try:
        return bytes(_submitted.decode(kept.data).draft).decode()
    except msgspec.MsgspecError:
        return ""
