"""
Carries to the stream in a process of its own, for tests that kill it: `broadcaster.py URL DATA_DIR BROKER PREFIX`.

It dies by itself after some messages, each time right after the broker has confirmed one and before that is written
down: the worst moment.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from sutazai.adapters.postgres.stores import open_stores
from sutazai.adapters.rabbitmq.queue import open_rabbitmq
from sutazai.ports.broadcasts import Source
from sutazai.settings.model import Database, Rabbitmq
from sutazai.settings.secret import Secret
from sutazai.tasks.broadcast import Broadcast, Rhythm

RHYTHM = Rhythm(look_s=0.02, beat_s=0.1, lease_s=0.5)


async def main(url: str, data_dir: Path, broker: Rabbitmq) -> None:
    """Carry until death."""
    left = random.randint(1, 8)
    async with open_stores(Database(url=Secret(url)), data_dir) as stores, open_rabbitmq(broker) as queue:
        (store,) = stores.broadcasts

        async def append(messages: Sequence[bytes]) -> None:
            nonlocal left
            await queue.events.append(messages)
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        async with asyncio.TaskGroup() as group:
            for source in Source:
                carrying = Broadcast(store, source, append, wall=lambda: datetime.now(UTC), rhythm=RHYTHM)
                group.create_task(carrying.run())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), Rabbitmq(url=Secret(sys.argv[3]), prefix=sys.argv[4])))
