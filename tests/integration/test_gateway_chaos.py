"""Ten thousand requests through a gateway whose nodes and clients misbehave in every way: nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import pytest

from sutazai.bootstrap import Gateway
from sutazai.core.node import Health, NodeKind
from sutazai.settings.model import Discovery, HealthSettings, NodeSettings, Timeouts
from sutazai.testing import Answer, FakeNode, Fault, Received

if TYPE_CHECKING:
    from tests.conftest import Answered, Dial, StartGateway, StartNode, Wire

REQUESTS = 10_000
CLIENTS = 64
PATIENCE_S = 15.0
"""No client that stays waits longer than the limits in the settings allow; without them it might hang for ever."""
LIMITS = Timeouts(connect_s=1.0, first_token_s=1.0, idle_s=0.5, total_s=10.0, keep_alive_s=0.3)
MESSAGES = [{"role": "user", "content": "hello"}]
ASKED: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hello"},
    "/v1/embeddings": {"input": "hello"},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "hello", "options": {"num_ctx": 2048}},
    "/api/embed": {"input": "hello"},
    "/api/embeddings": {"prompt": "hello"},
}
STREAMS = ["/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate"]


@dataclass(slots=True)
class Weather:
    """What goes wrong, by a fixed seed."""

    dice: random.Random
    is_calm: bool = False

    def outcome(self, _: Received) -> Answer | Fault:
        """What a node does with one request: mostly it answers."""
        answer = self._answer()
        if self.is_calm or self.dice.random() < 0.8:
            return answer
        after = self.dice.randint(0, 3)
        bad: Sequence[Callable[[], Fault]] = (
            Fault.reset_before_head,
            Fault.close_before_head,
            Fault.garbage,
            lambda: Fault.status(self.dice.choice([400, 404, 429, 500, 502, 503, 504])),
            lambda: Fault.reset_mid_stream(after, answer),
            lambda: Fault.truncate(after, answer),
            lambda: Fault.garbage_mid_stream(after, answer),
            lambda: Fault.error_mid_stream(after, answer=answer),
            lambda: Fault.slow_head(0.0002, answer),
            lambda: Fault.odd_pieces(7, answer),
            lambda: Fault.close_idle(0.001, answer),
        )
        stalls: Sequence[Callable[[], Fault]] = (
            lambda: Fault.stall_before_head(answer),
            lambda: Fault.stall_mid_stream(after, answer),
            lambda: Fault.wrong_length(7, answer),
        )
        return self.dice.choice(stalls if self.dice.random() < 0.05 else bad)()

    def _answer(self) -> Answer:
        words = tuple(f"w{number} " for number in range(self.dice.randint(1, 12)))
        slow = self.dice.random() < 0.2
        return Answer(tokens=(*words, "end."), first_token_s=0.003 * slow, between_s=0.001 * slow)


@dataclass(slots=True)
class Crowd:
    """The clients, and what became of them."""

    dial: Dial
    port: int
    dice: random.Random
    left: int = REQUESTS
    outcomes: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)

    async def ask_on(self) -> None:
        """One client: asks again and again, on a new connection whenever it left or was cut off."""
        wire: Wire | None = None
        while self.left > 0:
            self.left -= 1
            wire = wire or await self.dial(self.port)
            path = self.dice.choice(list(ASKED))
            stream = path in STREAMS and self.dice.random() < 0.6
            wire.post(path, ASKED[path] | {"model": self.dice.choice(["llama3", "qwen3"]), "stream": stream})
            fate = self.dice.random()
            if fate < 0.1:
                await self._leave_early(wire)
                wire = None
            elif fate < 0.2 and stream:
                await self._leave_in_mid_stream(wire)
                wire = None
            elif not await self._stay(wire, path, stream=stream):
                wire = None
        if wire is not None:
            wire.writer.close()

    async def _leave_early(self, wire: Wire) -> None:
        await asyncio.sleep(self.dice.choice([0.0, 0.0, 0.001, 0.005, 0.02]))
        self._hang_up(wire)
        self.outcomes["left early"] += 1

    async def _leave_in_mid_stream(self, wire: Wire) -> None:
        await asyncio.wait_for(wire.reader.read(100), PATIENCE_S)
        self._hang_up(wire)
        self.outcomes["left in mid-stream"] += 1

    def _hang_up(self, wire: Wire) -> None:
        if self.dice.random() < 0.5:
            wire.writer.transport.abort()
        else:
            wire.writer.close()

    async def _stay(self, wire: Wire, path: str, *, stream: bool) -> bool:
        """Read the whole answer and judge it; False where the connection is gone."""
        try:
            answer = await asyncio.wait_for(wire.answer(), PATIENCE_S)
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError) as error:
            self.complaints.append(f"{path} stream={stream}: {error!r}")
            return False
        verdict = judged(answer, path, stream=stream)
        self.outcomes[verdict] += 1
        if verdict == "odd":
            self.complaints.append(f"{path} stream={stream}: {answer.status} {answer.body[-200:]!r}")
        if answer.headers.get("connection") == "close":
            wire.writer.close()
            return False
        return True


def judged(answer: Answered, path: str, *, stream: bool) -> str:
    """A complete answer, one clear error, or something odd."""
    if answer.status != 200:
        told = msgspec.json.decode(answer.body).get("error")
        message = told["message"] if isinstance(told, dict) else told
        return f"error {answer.status}" if message and answer.status >= 400 else "odd"
    if not stream:
        body = msgspec.json.decode(answer.body)
        return "complete" if path not in STREAMS or (b"end." in answer.body and "error" not in body) else "odd"
    errors = answer.body.count(b'"error"')
    last = b"data: [DONE]" if path.startswith("/v1/") else b'"done":true'
    is_complete = answer.body.count(b"end.") == 1 and answer.body.count(last) == 1
    if answer.body.count(b"w0 ") > 1:
        return "odd"  # begun twice
    if errors == 1:
        return "error in the stream"
    return "complete" if is_complete and not errors else "odd"


async def trouble(nodes: Sequence[FakeNode], wire: Wire, dice: random.Random, crowd: Crowd) -> None:
    """Nodes die and come back, and an operator cancels requests, as long as there are clients."""
    while crowd.left > 0:
        node = dice.choice(nodes)
        await asyncio.sleep(0.7)
        await node.stop()
        await asyncio.sleep(dice.choice([0.0, 0.1, 0.4]))
        await node.start()
        wire.get("/admin/requests")
        requests = (await wire.answer()).json["requests"]
        if requests:
            wire.get(f"/admin/requests/{dice.choice(requests)['id']}", method="DELETE")
            await wire.answer()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.alone
@pytest.mark.deadline(150)
async def test_after_ten_thousand_requests_of_every_kind_nothing_is_left(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    weather = Weather(random.Random(20_26))
    kinds = [NodeKind.OLLAMA, NodeKind.OLLAMA, NodeKind.OPENAI, NodeKind.OPENAI, NodeKind.LLAMACPP]
    nodes = [await fake_nodes(kind, ("llama3", "qwen3"), slots=8) for kind in kinds]
    for node in nodes:
        node.default = weather.outcome
    gateway = await gateways(
        *(NodeSettings(url=node.url, kind=node.kind.value, slots=8) for node in nodes),
        timeouts=LIMITS,
        health=HealthSettings(interval_s=0.3, timeout_s=1.0),
        discovery=Discovery(ollama=False),
    )
    observer = await dial(gateway.port)
    assert await observer.gauge("sutazai_connections") == 1
    tasks_before = len(asyncio.all_tasks())
    files_before = open_files() - 2 * sum(node.connections for node in nodes)

    crowd = Crowd(dial, gateway.port, random.Random(7))
    operator = await dial(gateway.port)
    await asyncio.gather(trouble(nodes, operator, random.Random(3), crowd), *(crowd.ask_on() for _ in range(CLIENTS)))
    operator.writer.close()
    weather.is_calm = True
    await calm(gateway, nodes, observer)

    assert crowd.complaints == []
    assert crowd.outcomes["complete"] > 0.6 * REQUESTS
    assert sum(crowd.outcomes.values()) == REQUESTS
    assert [state.in_flight for state in gateway.fleet.states()] == [0] * len(nodes)
    assert [(node.active, node.waiting, node.in_flight) for node in nodes] == [(0, 0, 0)] * len(nodes)
    observer.get("/admin/requests")
    assert (await observer.answer()).json == {"requests": []}
    for name in ("sutazai_in_flight", "sutazai_waiting", "sutazai_buffered_bytes"):
        assert await observer.gauge(name) == 0, name
    assert await observer.gauge("sutazai_connections") == 1
    assert abs(len(asyncio.all_tasks()) - tasks_before) <= 1, "a probe may be on its way"
    assert abs(open_files() - 2 * sum(node.connections for node in nodes) - files_before) <= 2
    for path, body in ASKED.items():
        observer.post(path, body | {"model": "llama3", "stream": False})
        assert (await observer.answer()).status == 200, path


async def calm(gateway: Gateway, nodes: Sequence[FakeNode], observer: Wire) -> None:
    """Wait until all is over and every node is back; names what is not."""
    left: dict[str, object] = {}
    for _ in range(300):
        left = {
            "connections": await observer.gauge("sutazai_connections") - 1,
            "in flight": await observer.gauge("sutazai_in_flight"),
            "at nodes": [node.in_flight for node in nodes if node.in_flight],
            "down": [state.node.name for state in gateway.fleet.states() if state.health is not Health.UP],
        }
        if not any(left.values()):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"Not over after 15 s: {left}")
