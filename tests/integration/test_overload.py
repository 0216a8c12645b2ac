"""Three times as much as the pool can do: what it does then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from sutazai.core.node import NodeKind
from sutazai.settings.model import Cache, NodeSettings, Queue
from sutazai.testing import Answer

if TYPE_CHECKING:
    from tests.conftest import Dial, StartGateway, StartNode

CHAT = "/v1/chat/completions"
SLOTS = 4
SERVICE_S = 0.05
LOAD_S = 3.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One request, as its client saw it."""

    status: int
    seconds: float
    retry_after_s: int


async def asked(dial: Dial, port: int, clients: int) -> list[Seen]:
    """What so many clients get who ask again as soon as they were answered or refused."""
    until = time.monotonic() + LOAD_S

    async def client(number: int) -> list[Seen]:
        wire = await dial(port)
        seen: list[Seen] = []
        while time.monotonic() < until:
            messages = [{"role": "user", "content": f"{number}: {len(seen)}"}]
            began = time.monotonic()
            wire.post(CHAT, {"model": "m", "messages": messages})
            answer = await wire.answer()
            retry_after_s = int(answer.headers.get("retry-after", "0"))
            seen.append(Seen(answer.status, time.monotonic() - began, retry_after_s))
            if answer.status != 200:
                await asyncio.sleep(SERVICE_S)  # far sooner than it was told
        return seen

    return [one for each in await asyncio.gather(*map(client, range(clients))) for one in each]


def answered(seen: Sequence[Seen]) -> int:
    return sum(one.status == 200 for one in seen)


@pytest.mark.alone
@pytest.mark.deadline(120)
async def test_at_three_times_capacity_the_pool_does_what_it_can_and_refuses_the_rest_politely(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes(NodeKind.OPENAI, ("m",), slots=SLOTS)
    node.default = Answer(first_token_s=SERVICE_S)
    listed = NodeSettings(url=node.url, kind="openai", slots=SLOTS)
    queue = Queue(max_waiting=8, max_wait_s=1.0)
    gateway = await gateways(listed, queue=queue, cache=Cache(enabled=False))

    peak = answered(await asked(dial, gateway.port, SLOTS + 1))
    before = len(node.inferences)
    flood = await asked(dial, gateway.port, 3 * (SLOTS + 1 + queue.max_waiting))
    refused = [one for one in flood if one.status != 200]

    assert answered(flood) >= 0.8 * peak
    assert refused
    assert {one.status for one in refused} <= {429, 503}
    assert all(one.retry_after_s >= 1 for one in refused)
    assert (len(node.inferences) - before) <= 1.2 * answered(flood)
