"""`sutazai shards`: the databases that tenants' data is spread over, and moves between them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import cyclopts

from sutazai.adapters.postgres.sharded.directory import ShardView
from sutazai.adapters.postgres.sharded.moving import Moved, Mover, Progress
from sutazai.cli.printing import complain, print_json, print_table
from sutazai.cli.stores import Sharding, refuse, with_shards
from sutazai.policy.sharding import SLOTS, SlotMove, rebalancing, slot_of

app = cyclopts.App(
    name="shards",
    help="""Spread the data of tenants over several databases, and move it between them.

Each tenant has one of 4096 shard slots by its name, and each slot belongs to one shard of its region. The shards stand
in the settings as `[[shards]]`. Example: `sutazai shards list`""",
)

_HEADS = ("SHARD", "REGION", "SLOTS", "STATE")
_MOVED_HEADS = ("SLOTS", "FROM", "TO", "TASKS", "EVENTS", "OTHER ROWS", "PAUSE S", "TOOK S")
NOTE_S = 2.0
"""Between two lines about a move."""


@app.command(name="list")
def list_(*, json: bool = False) -> int:
    """
    Print all shards, how many slots each has, and moves that were not finished.

    Examples: `sutazai shards list`, `sutazai shards list --json`

    Parameters
    ----------
    json
        Print JSON.
    """

    async def work(sharding: Sharding) -> int:
        views, under_way = await sharding.directory.views(), await sharding.directory.under_way()
        if json:
            print_json({"shards": [asdict(view) for view in views], "moves": [asdict(move) for move in under_way]})
            return 0
        print_table(_HEADS, [_cells(view) for view in views])
        for move in under_way:
            complain(
                f"The slot {move.slot} is on its way from {move.source} to {move.target}. If nobody moves it, "
                f"finish it with `sutazai shards move --slot {move.slot} --to {move.target}`."
            )
        return 0

    return with_shards(work)


@app.command
def add(name: str, /, *, json: bool = False) -> int:
    """
    Take a shard of `[[shards]]` into use: make its tables, and enter it into the directory.

    The first one gets all slots, and must be where the data is: an entry without a `url`. A later one has none until
    `sutazai shards rebalance` moves its part there. All gateways and workers need the new `[[shards]]` before.

    Examples: `sutazai shards add main`, `sutazai shards add second --json`

    Parameters
    ----------
    name
        As in `[[shards]]`.
    json
        Print JSON.
    """

    async def work(sharding: Sharding) -> int:
        slots = await sharding.directory.add(name)
        planned = rebalancing(await sharding.directory.owners(), await _names(sharding))
        if json:
            print_json({"name": name, "slots": slots, "to_move": len(planned)})
            return 0
        sys.stdout.write(f"The shard {name!r} is in use, with {slots:,} slots.\n")
        if planned:
            complain(f"`sutazai shards rebalance` would move {len(planned):,} of {SLOTS:,} slots.")
        return 0

    return with_shards(work)


@app.command
def move(
    tenant: str | None = None, /, *, to: str, slot: int | None = None, dry_run: bool = False, json: bool = False
) -> int:
    """
    Move a tenant's slot to another shard of its region, with all tenants that have the same slot.

    They go on working: only for the last moment their requests wait. What was interrupted is brought to its end by the
    same command.

    Examples: `sutazai shards move acme --to second`, `sutazai shards move --slot 1742 --to second --dry-run`

    Parameters
    ----------
    tenant
        Its name.
    to
        The shard that is to have it.
    slot
        The slot, in place of a tenant.
    dry_run
        Say what would be moved, and move nothing.
    json
        Print JSON.
    """
    if (tenant is None) == (slot is None):
        return refuse("Name either a tenant or a slot with --slot.")
    number = slot if slot is not None else slot_of(tenant or "")
    if not 0 <= number < SLOTS:
        return refuse(f"The slot was {number}. Give a number from 0 to {SLOTS - 1}.")

    async def work(sharding: Sharding) -> int:
        known = await _names(sharding)
        if to not in known:
            return refuse(f"No shard {to!r} is in use in this region; there are: {', '.join(known) or 'none'}.")
        under_way = [one for one in await sharding.directory.under_way() if one.slot == number]
        owner = (await sharding.directory.owners())[number]
        source = under_way[0].source if under_way else owner
        if source == to and not under_way:
            complain(f"The slot {number} is in {to!r} already.")
            return 0
        return await _carry_out(sharding, [SlotMove(number, source, to)], dry_run=dry_run, json=json)

    return with_shards(work)


@app.command
def rebalance(*, dry_run: bool = False, json: bool = False) -> int:
    """
    Give each shard of the region its part of the slots, with the fewest moves, one after another.

    Slots that hold nothing are moved together. Interrupted, it goes on where it was when it is called again.

    Examples: `sutazai shards rebalance --dry-run`, `sutazai shards rebalance --json`

    Parameters
    ----------
    dry_run
        Say what would be moved, and move nothing.
    json
        Print JSON.
    """

    async def work(sharding: Sharding) -> int:
        unfinished = list(await sharding.directory.under_way())
        # The slots on their way will be where they go.
        owners = dict(await sharding.directory.owners()) | {one.slot: one.target for one in unfinished}
        moves = [*unfinished, *rebalancing(owners, await _names(sharding))]
        if not moves:
            complain("The slots are even already.")
            return 0
        return await _carry_out(sharding, moves, dry_run=dry_run, json=json)

    return with_shards(work)


async def _names(sharding: Sharding) -> Sequence[str]:
    return [view.name for view in await sharding.directory.views() if view.is_added and view.is_named]


async def _carry_out(sharding: Sharding, moves: Sequence[SlotMove], *, dry_run: bool, json: bool) -> int:
    told = _Told(len(moves))
    mover = Mover(sharding.database, sharding.shards, note=told.note)
    groups = await mover.plan(moves)
    if dry_run:
        plan = [
            {"slots": [one.slot for one in group], "from": group[0].source, "to": group[0].target} for group in groups
        ]
        if json:
            print_json(plan)
        else:
            rows = [[_slots([one.slot for one in group]), group[0].source, group[0].target] for group in groups]
            print_table(_MOVED_HEADS[:3], rows)
        return 0
    done: list[Moved] = []
    try:
        for group in groups:
            slots = [one.slot for one in group]
            done.append(await mover.move(slots, source=group[0].source, target=group[0].target))
            told.done += len(slots)
    finally:
        if json:
            print_json([asdict(one) for one in done])
        else:
            print_table(_MOVED_HEADS, [_moved(one) for one in done])
    return 0


class _Told:
    """Lines about a move: how far it is, and how long the rest may take."""

    def __init__(self, slots: int) -> None:
        self.done = 0
        self._slots = slots
        self._began = time.monotonic()
        self._told_at = 0.0

    def note(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._told_at < NOTE_S:
            return
        self._told_at = now
        part = min(1.0, progress.copied / progress.of) if progress.of else 0.0
        share = (self.done + part * len(progress.slots)) / self._slots
        left = f", about {(now - self._began) * (1 - share) / share:.0f} s left" if share else ""
        complain(
            f"{self.done}/{self._slots} slots; {_slots(progress.slots)} to {progress.target}: {progress.step}, "
            f"{progress.copied:,} rows copied{left}"
        )


def _cells(view: ShardView) -> list[str]:
    state = "in use" if view.is_added and view.is_named else "not added" if view.is_named else "of other settings"
    return [view.name, view.region, str(view.slots), state]


def _moved(one: Moved) -> list[str]:
    tasks, events = (one.rows.get(table, 0) for table in ("tasks", "events"))
    others = sum(one.rows.values()) - tasks - events
    return [
        _slots(one.slots), one.source, one.target, str(tasks), str(events), str(others), f"{one.pause_s:.3f}",
        f"{one.took_s:.1f}",
    ]  # fmt: skip


def _slots(slots: Sequence[int]) -> str:
    return str(slots[0]) if len(slots) == 1 else f"{len(slots)} empty ones"
