"""`sutazai audit`: who changed what, and whether the log is whole."""

from __future__ import annotations

import sys

import cyclopts

from sutazai.adapters.postgres.stores import Stores
from sutazai.cli.printing import print_json, print_table
from sutazai.cli.stores import refuse, with_stores
from sutazai.ports.audit import AuditEntry

app = cyclopts.App(
    name="audit",
    help="""Show and verify who changed what.

Example: `sutazai audit list`""",
)

_HEADS = ("NUMBER", "AT", "WHO", "ACTION", "SUBJECT", "OUTCOME", "DETAIL")
_MOST = 10_000


@app.command(name="list")
def list_(*, limit: int = 50, before: int | None = None, json: bool = False) -> int:
    """
    Print the newest entries, newest first.

    Examples: `sutazai audit list`, `sutazai audit list --before 1200 --limit 100 --json`

    Parameters
    ----------
    limit
        How many at most.
    before
        Only entries with lower numbers: the rest of an earlier list.
    json
        Print JSON.
    """

    async def work(stores: Stores) -> int:
        if not 1 <= limit <= _MOST:
            return refuse(f"The limit was {limit}. Give a number from 1 to {_MOST}.")
        if before is not None and not 1 <= before < 2**63:
            return refuse(f"There is no entry {before}. Give a number that `sutazai audit list` printed.")
        entries = await stores.audit.newest(limit=limit, before=before)
        if json:
            print_json([entry.plain() for entry in entries])
        else:
            print_table(_HEADS, [_cells(entry) for entry in entries])
        return 0

    return with_stores(work)


@app.command
def verify(*, known: str | None = None) -> int:
    """
    Look at the seal of every entry, and print the newest one's number and seal.

    Exits with 1, and says what is wrong, where an entry was changed, replaced or removed. The end of a log can be cut
    off without a trace in it: keep what this prints somewhere else, and give it back with `--known`.

    Examples: `sutazai audit verify`, `sutazai audit verify --known 17:3f2a...`

    Parameters
    ----------
    known
        A number and seal that an earlier `verify` printed; the log must still hold that entry.
    """

    async def work(stores: Stores) -> int:
        found = await stores.audit.verify()
        if found.fault:
            return refuse(f"{found.fault} The {found.entries} before it are whole.")
        if known is not None and not await _holds(stores, known):
            return refuse(f"The log does not hold the entry {known}: its end was cut off, or it is another log.")
        sys.stdout.write(f"{found.entries}:{found.head.hex()}\n")
        sys.stderr.write(f"All {found.entries} entries are whole.\n")
        return 0

    return with_stores(work)


async def _holds(stores: Stores, known: str) -> bool:
    """Whether there is an entry of that number with that seal; the beginning of nothing is always there."""
    number, _, seal = known.strip().partition(":")
    if not (number.isascii() and number.isdigit() and len(number) < 19):
        return False
    if int(number) == 0:
        return True
    found = await stores.audit.newest(limit=1, before=int(number) + 1)
    return bool(found) and found[0].number == int(number) and found[0].digest.hex() == seal


def _cells(entry: AuditEntry) -> list[str]:
    at = entry.at.isoformat(timespec="seconds")
    return [str(entry.number), at, entry.actor, entry.action, entry.subject, entry.outcome, entry.detail]
