"""How many tasks wait in each queue, looked at now and then so that whoever asks need not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress

from sutazai.core.errors import StoreUnavailable
from sutazai.ports.queue import Queue

LOOK_S = 5.0


class Depths:
    """The depths of queues, a few seconds old."""

    def __init__(self, queues: Sequence[Queue], names: Iterable[str]) -> None:
        """A queue's depth is its sum over `queues`: with a broker, its outbox counts too."""
        self._queues = queues
        self.waiting: dict[str, int] = dict.fromkeys(names, 0)
        """By name. What could not be asked stays as it was."""

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            for name in self.waiting:
                with suppress(StoreUnavailable):
                    self.waiting[name] = sum([await queue.depth(name) for queue in self._queues])
            await asyncio.sleep(LOOK_S)
