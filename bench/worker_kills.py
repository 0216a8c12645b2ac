"""
Kill workers with SIGKILL, and count what was lost: `python -m bench.worker_kills [--kills 1000]`.

On a server of its own, for as long as it takes. Ends with 1 where a task was lost, or an effect missing or doubled.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.postgres_databases import fresh_database
from tests.worker_kills import Toll, kill_workers

from sutazai.adapters.postgres import migrate
from sutazai.adapters.postgres.database import open_database
from sutazai.settings.secret import Secret


async def run(kills: int, seed: int) -> Toll:
    """As many kills as are asked for."""
    with tempfile.TemporaryDirectory(prefix="sutazai-") as folder:
        async with fresh_database(Path(folder)) as url:
            async with open_database(Secret(url), timeout_s=20) as database:
                await migrate.migrate(database, migrate.read())
            return await kill_workers(url, kills=kills, within_s=float("inf"), seed=seed)


def main() -> int:
    """The toll, and whether it is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=7, help="of when workers die")
    given = parser.parse_args()
    toll = asyncio.run(run(given.kills, given.seed))
    sys.stdout.write(f"{toll}\n")
    return 0 if toll.is_none else 1


if __name__ == "__main__":
    sys.exit(main())
