"""Moves a slot, and is killed after a step: `python -m tests.shard_mover EVEN_URL ODD_URL SLOT SOURCE TARGET STEP`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from sutazai.adapters.postgres.database import open_database
from sutazai.adapters.postgres.sharded.moving import Mover
from sutazai.adapters.postgres.sharded.shards import Shards
from sutazai.settings.secret import Secret


async def main(even_url: str, odd_url: str, slot: str, source: str, target: str, last_step: str) -> None:
    """Until the step was taken."""

    async def after(step: str) -> None:
        if step == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    async with (
        open_database(Secret(even_url), timeout_s=20) as even,
        open_database(Secret(odd_url), timeout_s=20) as odd,
    ):
        shards = Shards(even, {"even": even, "odd": odd}, region="")
        await Mover(even, shards, after=after).move([int(slot)], source=source, target=target)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
