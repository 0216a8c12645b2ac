"""`sutazai db`: bring the tables up to date, and look at what is in them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict

import cyclopts

from sutazai.adapters.objects.archive import archive_name, archived
from sutazai.adapters.postgres import migrate as migrations
from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.partitions import Part, Partitions, all_parts
from sutazai.adapters.postgres.slow import SlowStatement, slowest
from sutazai.adapters.postgres.statistics import AgentDay, Statistics
from sutazai.cli.printing import print_json, print_table
from sutazai.cli.stores import refuse, with_archive, with_database
from sutazai.core.errors import NotFound
from sutazai.ports.objects import ObjectStore

app = cyclopts.App(
    name="db",
    help="""Bring the tables up to date, and look at what is in them.

Example: `sutazai db migrate --dry-run`""",
)

_HEADS = ("MEAN MS", "MAX MS", "TOTAL MS", "CALLS", "ROWS", "STATEMENT")
_DAY_HEADS = ("DATE", "AGENT", "TASKS", "COMPLETED", "FAILED", "MEAN S", "ATTEMPTS")
_PART_HEADS = ("NAME", "FROM", "UNTIL BEFORE", "ROWS", "MIB")
_MOST = 1000


@app.command
def migrate(*, dry_run: bool = False, json: bool = False) -> int:
    """
    Bring the tables to the shape this program needs, and print what that took.

    Gateways do the same when they start; run it before, so that no start has to wait for it.

    Examples: `sutazai db migrate`, `sutazai db migrate --dry-run --json`

    Parameters
    ----------
    dry_run
        Print what is missing, and change nothing.
    json
        Print JSON.
    """

    async def work(database: Database) -> int:
        act = migrations.missing if dry_run else migrations.migrate
        done = await act(database, migrations.read())
        if json:
            print_json({"applied" if not dry_run else "missing": [f"{one.revision}_{one.name}" for one in done]})
            return 0
        sys.stdout.write("".join(f"{one.revision}_{one.name}\n" for one in done))
        sys.stderr.write(_said(done, dry_run=dry_run))
        return 0

    return with_database(work)


@app.command
def slow(*, over_ms: float = 100.0, limit: int = 20, json: bool = False) -> int:
    """
    Print the statements that take long on average, the slowest first.

    They are counted by PostgreSQL's extension pg_stat_statements; where it is missing, this says how to add it.

    Examples: `sutazai db slow`, `sutazai db slow --over-ms 10 --limit 50 --json`

    Parameters
    ----------
    over_ms
        Only those whose mean is above so many milliseconds.
    limit
        How many at most.
    json
        Print JSON.
    """

    async def work(database: Database) -> int:
        if not 1 <= limit <= _MOST:
            return refuse(f"The limit was {limit}. Give a number from 1 to {_MOST}.")
        if not (over_ms >= 0 and math.isfinite(over_ms)):
            return refuse(f"The mean was to be above {over_ms} ms. Give a number from 0 on.")
        found = await slowest(database, over_ms=over_ms, limit=limit)
        if json:
            print_json([asdict(one) for one in found])
        else:
            print_table(_HEADS, [_cells(one) for one in found])
        return 0

    return with_database(work)


@app.command
def statistics(*, refresh: bool = False, json: bool = False) -> int:
    """
    Print what each agent did on each day of UTC, the newest day first.

    Gateways and workers count once an hour, or as `[tasks] statistics_s` says.

    Examples: `sutazai db statistics`, `sutazai db statistics --refresh --json`

    Parameters
    ----------
    refresh
        Count anew before.
    json
        Print JSON.
    """

    async def work(database: Database) -> int:
        kept = Statistics(database, every_s=math.inf)
        if refresh and not await kept.refresh():
            sys.stderr.write("Another process was counting; these are the numbers from before.\n")
        found = await kept.days()
        if json:
            print_json([asdict(day) for day in found])
        else:
            print_table(_DAY_HEADS, [_day_cells(day) for day in found])
        return 0

    return with_database(work)


@app.command
def partitions(*, json: bool = False) -> int:
    """
    Print the parts of the tables of tasks and events.

    Gateways and workers make them ahead of time, a month or a quarter each, as `[tasks] partition` says, and write
    those older than `keep_months` to the object store.

    Examples: `sutazai db partitions`, `sutazai db partitions --json`

    Parameters
    ----------
    json
        Print JSON.
    """

    async def work(database: Database) -> int:
        found = await all_parts(database)
        if json:
            print_json([asdict(part) for part in found])
        else:
            print_table(_PART_HEADS, [_part_cells(part) for part in found])
        return 0

    return with_database(work)


@app.command
def restore(name: str, *, shard: str = "") -> int:
    """
    Read a part of the tables that was written to the object store into a table of its own, `archived_NAME`.

    It is for looking at; the gateways do not see its tasks. Drop the table when you are done.

    Example: `sutazai db restore tasks_2026_01`

    Parameters
    ----------
    name
        Of the part, such as `tasks_2026_01` or `events_2026_q1`.
    shard
        The shard that it is of; needed where there are several.
    """

    async def work(database: Database, objects: ObjectStore) -> int:
        try:
            rows = await Partitions(database).restore(name, archived(objects, archive_name(shard, f"{name}.csv.zst")))
        except NotFound:
            return refuse(f"The object store had no part {name!r} in its folder `archive`. Give the name of one.")
        sys.stdout.write(f"archived_{name}: {rows} rows\n")
        return 0

    return with_archive(shard, work)


def _said(done: Sequence[migrations.Migration], *, dry_run: bool) -> str:
    if not done:
        return "The tables are up to date.\n"
    files = "1 migration" if len(done) == 1 else f"{len(done)} migrations"
    return f"{files} would be applied.\n" if dry_run else f"Applied {files}.\n"


def _cells(one: SlowStatement) -> list[str]:
    times = [f"{value:.1f}" for value in (one.mean_ms, one.max_ms, one.total_ms)]
    return [*times, str(one.calls), str(one.rows), one.statement]


def _day_cells(day: AgentDay) -> list[str]:
    means = ["" if value is None else f"{value:.2f}" for value in (day.mean_processing_s, day.mean_attempts)]
    return [f"{day.date}", day.agent, str(day.total_tasks), str(day.completed), str(day.failed), *means]


def _part_cells(part: Part) -> list[str]:
    times = ["" if moment is None else f"{moment:%Y-%m-%d}" for moment in (part.begin, part.end)]
    return [part.name, *times, str(part.rows), f"{part.size_bytes / 2**20:.1f}"]
