"""`sutazai events`: what happened to tasks, as it happens, as a file, and as the proof of what is kept."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import cyclopts
import msgspec
import zstandard

from sutazai.adapters.postgres.stores import Stores
from sutazai.cli.printing import complain, fitting, print_json, print_table
from sutazai.cli.stores import REFUSED, refuse, with_stores
from sutazai.core.task import Task, TaskStatus, is_task_id
from sutazai.ports.replay import ReplaySession, ReplayStore
from sutazai.ports.task_events import KeptEvent
from sutazai.tasks import replay as replaying
from sutazai.tasks.replay import Found

app = cyclopts.App(
    name="events",
    help="""Follow, export, replay and verify the events of tasks.

Example: `sutazai events verify`""",
)

POLL_S = 0.5
PAGE = 500
NOTE_S = 1.0
_DETAIL = 120
"""Characters of an event's data in a line for people."""


@app.command
def tail(*, after: int | None = None, shard: str = "", json: bool = False) -> int:
    """
    Print events as they happen, until Ctrl-C.

    Examples: `sutazai events tail`, `sutazai events tail --after 0 --json`

    Parameters
    ----------
    after
        Begin past this position; 0 = with the oldest. Without it with what comes from now on.
    shard
        The shard to look at; needed where there are several.
    json
        Print a line of JSON for each.
    """

    async def work(replays: ReplayStore) -> int:
        position = await _newest(replays) if after is None else after
        while True:
            page = await replays.tail(after=position, limit=PAGE)
            for kept in page:
                sys.stdout.write(fitting(_json(kept) if json else _line(kept), sys.stdout) + "\n")
                position = kept.position
            sys.stdout.flush()
            if not page:
                await asyncio.sleep(POLL_S)

    with suppress(KeyboardInterrupt):
        return _with_replays(work, shard)
    return 0


@app.command
def export(file: Path | None = None, *, shard: str = "") -> int:
    """
    Write all events as lines of JSON, in the order they were kept.

    The file appears when it is complete; `.zst` at the end of its name compresses it. What the transactions of now
    may still add is not in it.

    Examples: `sutazai events export events.ndjson.zst`, `sutazai events export | jq .kind`

    Parameters
    ----------
    file
        Where to; standard output without it.
    shard
        The shard to look at; needed where there are several.
    """

    async def work(replays: ReplayStore) -> int:
        with _written(file) as target, _progress() as note:
            count = 0
            async with replays.session() as session:
                async for batch in session.in_order():
                    target.write("".join(f"{_json(kept)}\n" for kept in batch).encode())
                    count += len(batch)
                    note(count)
        complain(f"{count:,} events were written.")
        return 0

    return _with_replays(work, shard)


@app.command
def replay(*, until: str | None = None, task: str | None = None, shard: str = "", json: bool = False) -> int:
    """
    Make all tasks anew from their events, in the table `tasks_replayed`, and prove that they are those that are kept.

    With `--until` they are made as they stood then, and not compared. With `--task` one is shown. Exits with 1 where
    something is not whole.

    Examples: `sutazai events replay`, `sutazai events replay --until 2026-11-01T12:00:00Z --json`

    Parameters
    ----------
    until
        A time such as `2026-11-01T12:00:00Z`; of UTC where it names no zone.
    task
        The id of one task.
    shard
        The shard to look at; needed where there are several.
    json
        Print JSON.
    """
    try:
        moment = None if until is None else _moment(until)
    except ValueError:
        return refuse(f"The time was {until!r}. Write it like `2026-11-01T12:00:00Z`.")
    if task is not None and not is_task_id(task):
        return refuse(f"{task!r} is no id of a task. Ids begin with `task_`.")

    async def work(session: ReplaySession) -> int:
        if task is not None:
            return await _show(session, task, moment, json=json)
        with _progress() as note:
            began = time.monotonic()
            found = await replaying.replay(session, until=moment, note=note)
        return _tell(found, time.monotonic() - began, json=json)

    return _in_session(work, shard)


@app.command
def verify(*, shard: str = "", json: bool = False) -> int:
    """
    Look whether all events of every task are there, can be read, and give the task that is kept.

    Changes nothing. Exits with 1 where something is not whole, and says what.

    Examples: `sutazai events verify`, `sutazai events verify --json`

    Parameters
    ----------
    shard
        The shard to look at; needed where there are several.
    json
        Print JSON.
    """

    async def work(session: ReplaySession) -> int:
        with _progress() as note:
            began = time.monotonic()
            found = await replaying.verify(session, note=note)
        return _tell(found, time.monotonic() - began, json=json)

    return _in_session(work, shard)


def _with_replays(work: Callable[[ReplayStore], Awaitable[int]], shard: str) -> int:
    async def on_stores(stores: Stores) -> int:
        found = stores.replays.get(shard) or (None if shard else _only(stores.replays))
        if found is None:
            known = ", ".join(filter(None, stores.replays)) or "none"
            return refuse(f"Each shard has events of its own. Name one with --shard; there are: {known}.")
        return await work(found)

    return with_stores(on_stores)


def _only(replays: Mapping[str, ReplayStore]) -> ReplayStore | None:
    return next(iter(replays.values())) if len(replays) == 1 else None


def _in_session(work: Callable[[ReplaySession], Awaitable[int]], shard: str) -> int:
    async def on_replays(replays: ReplayStore) -> int:
        async with replays.session() as session:
            return await work(session)

    return _with_replays(on_replays, shard)


async def _show(session: ReplaySession, task_id: str, until: datetime | None, *, json: bool) -> int:
    folded = await replaying.as_it_stood(session, task_id, until=until)
    if folded is None:
        return refuse(f"{task_id} had no events{' by then' if until else ''}.")
    if folded.fault is not None or folded.task is None:
        return refuse(f"{task_id} is not whole: {folded.fault.why if folded.fault else 'it had no events'}")
    if json:
        print_json(folded.task)
    else:
        print_table(("FIELD", "VALUE"), _cells(folded.task))
    return 0


def _cells(task: Task) -> list[list[str]]:
    draft: dict[str, object] = msgspec.to_builtins(task.draft)
    fields: dict[str, object] = msgspec.to_builtins(task)
    del fields["draft"]
    return [[name, "" if value is None else str(value)] for name, value in (draft | fields).items()]


def _tell(found: Found, took_s: float, *, json: bool) -> int:
    if json:
        print_json(found.plain())
    else:
        print_table(("STATUS", "TASKS"), [[status.value, f"{found.statuses[status]:,}"] for status in TaskStatus])
        for fault in found.faults:
            complain(f"{fault.task or 'tasks'}: {fault.why}")
        if found.comparison is not None and not found.comparison.is_equal:
            complain(f"The tasks made anew are not those that are kept: {', '.join(found.comparison.differing)}.")
    if found.fault_count > len(found.faults):
        complain(f"{found.fault_count - len(found.faults):,} more were not whole.")
    verdict = "all whole" if found.is_whole else "not all whole"
    complain(f"{found.events:,} events of {found.tasks:,} tasks in {took_s:.1f} s: {verdict}.")
    return 0 if found.is_whole else REFUSED


async def _newest(replays: ReplayStore) -> int:
    """The position of the newest event that can be told of."""
    async with replays.session() as session:
        return await session.newest()


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _json(kept: KeptEvent) -> str:
    fields = {name: getattr(kept, name) for name in ("position", "task", "version", "tenant", "kind", "schema", "at")}
    return msgspec.json.encode(fields | {"data": msgspec.Raw(kept.data.encode())}).decode()


def _line(kept: KeptEvent) -> str:
    data = kept.data if len(kept.data) <= _DETAIL else f"{kept.data[:_DETAIL]}…"
    at = kept.at.isoformat(timespec="milliseconds")
    return f"{kept.position} {at} {kept.tenant} {kept.task} {kept.version} {kept.kind} {data}"


@contextmanager
def _written(file: Path | None) -> Iterator[IO[bytes]]:
    """A file that appears when all is written."""
    if file is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("wb") as raw:
            if file.suffix == ".zst":
                with zstandard.ZstdCompressor(level=6).stream_writer(raw, closefd=False) as compressed:
                    yield compressed
            else:
                yield raw
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """Counts on standard error: in a terminal in place, elsewhere not at all."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    told_at = time.monotonic()

    def note(count: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= NOTE_S:
            told_at = time.monotonic()
            sys.stderr.write(f"\r{count:,} events")
            sys.stderr.flush()

    yield note
    sys.stderr.write("\r\033[K")
