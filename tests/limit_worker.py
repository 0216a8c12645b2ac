"""
One of several gateways that share their limits, in a process of its own: the stage alone, asked as fast as it answers.

Takes a JSON object as its argument and prints one: how many were admitted, and of those that ran at once when each
began and ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field

from sutazai.adapters.redis.limits import RedisLimits
from sutazai.adapters.redis.link import open_redis
from sutazai.core.errors import RateLimited, SutazaiError
from sutazai.core.identity import Allowance, Limits
from sutazai.core.request import Endpoint, Head, Request, Usage
from sutazai.gateway.counts import Counts
from sutazai.gateway.limited import Limited
from sutazai.ports.inference import Call, Reply
from sutazai.settings.model import Redis
from sutazai.settings.secret import Secret


class Node:
    """Answers after a while, with twenty tokens."""

    def __init__(self, takes_s: float) -> None:
        self._takes_s = takes_s
        self._timer: asyncio.TimerHandle | None = None

    def start(self, request: Request, reply: Reply) -> Call:
        head = Head(200, b"application/json", 2, "a", "warm")
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._takes_s, lambda: reply.whole(head, b"{}", Usage(10, 10)))
        return self

    def cancel(self) -> None:
        assert self._timer is not None
        self._timer.cancel()

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass


@dataclass(slots=True)
class Client:
    """Waits for the one answer."""

    answered: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def head(self, head: Head) -> None:
        pass

    def chunk(self, data: bytes) -> None:
        pass

    def end(self, usage: Usage | None) -> None:
        self.answered.set_result(True)

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        self.answered.set_result(True)

    def fail(self, error: SutazaiError) -> None:
        if isinstance(error, RateLimited):
            self.answered.set_result(False)
        else:
            self.answered.set_exception(error)


async def main(task: dict[str, float | str], limits: Limits) -> None:
    """Ask until the time is over, from several clients at once."""
    settings = Redis(url=Secret(str(task["url"])), prefix=str(task["prefix"]), timeout_s=5.0)
    allowance = Allowance(tenant="acme", key_id="k1", of_tenant=limits, of_key=Limits())
    spans: list[tuple[float, float]] = []
    asked = 0
    name = str(task["name"])
    async with open_redis(settings) as link:
        counts = Counts(clock=time.monotonic, wall_s=time.time)
        shared = RedisLimits(link, gateway=name)
        node = Node(float(task["takes_s"]))
        limited = Limited(node, local=counts, shared=shared, price=lambda _: (0.0, 0.0))

        async def client(number: int) -> None:
            nonlocal asked
            while time.monotonic() < float(task["until"]):
                asked += 1
                began, client = time.monotonic(), Client()
                request = Request(f"{name}-{asked}", Endpoint.OPENAI_CHAT, "m", False, b"{}", "acme", "k1", began)
                request.allowance = allowance
                limited.start(request, client)
                if await client.answered:
                    ended = time.monotonic()
                    spans.append((ended - float(task["takes_s"]), ended))

        await asyncio.sleep(float(task["from"]) - time.monotonic())
        keeping = asyncio.create_task(limited.run())
        await asyncio.gather(*map(client, range(4)))
        keeping.cancel()
        await asyncio.wait([keeping])
    seen = {"asked": asked, "spans": spans, "alone": limited.alone, "unsettled": limited.unsettled}
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    asyncio.run(main(given["task"], Limits(**given["limits"])))
