"""The contract of `ports/inference.py`, kept by everything that answers requests."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import pytest

from sutazai.adapters.ollama import OllamaNode
from sutazai.adapters.openai import OpenAINode
from sutazai.core.errors import (
    BadRequest,
    NodeFault,
    NodeRejected,
    NodeTimeout,
    NodeUnreachable,
    SutazaiError,
)
from sutazai.core.node import Node, NodeKind
from sutazai.core.request import Dialect, Endpoint, Head, Request, Usage
from sutazai.gateway.admitted import Admitted
from sutazai.gateway.fleet import Fleet
from sutazai.gateway.routed import Patience, Routed
from sutazai.policy.admission import AdmissionRules
from sutazai.policy.retry import RetryRules
from sutazai.policy.routing import RoutingRules
from sutazai.ports.inference import Call, Inference
from sutazai.ports.nodes import NodeClient
from sutazai.settings.model import ModelSettings
from sutazai.testing import Answer, FakeNode, Fault

if TYPE_CHECKING:
    from tests.conftest import StartNode

LEAVES_WITHIN_S = 0.5
MESSAGES = [{"role": "user", "content": "hello"}]
IN_DIALECT = {Dialect.OPENAI: Endpoint.OPENAI_CHAT, Dialect.OLLAMA: Endpoint.OLLAMA_CHAT}
LONG = Answer(tokens=tuple(f"word{number} " for number in range(40)), between_s=0.01)
ENDLESS = Answer(tokens=("word ",) * 100_000, between_s=0.01)
ids = itertools.count()


class Heard:
    """A reply that keeps all it hears, and complains at once about what comes out of turn."""

    def __init__(self) -> None:
        self.heads: list[Head] = []
        self.body = b""
        self.usage: Usage | None = None
        self.error: SutazaiError | None = None
        self.ended = False
        self.silenced = False
        self.news = asyncio.Event()
        self.at_chunk: Callable[[], None] = self.news.set

    def head(self, head: Head) -> None:
        self._in_turn()
        assert not self.heads
        self.heads.append(head)
        self.news.set()

    def chunk(self, data: bytes) -> None:
        self._in_turn()
        assert self.heads, "a chunk follows a head"
        assert data
        self.body += data
        self.at_chunk()
        self.news.set()

    def end(self, usage: Usage | None) -> None:
        self._in_turn()
        assert self.heads
        self._finish(usage)

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        self._in_turn()
        assert not self.heads, "it comes in place of head, chunk and end"
        self.heads.append(head)
        self.body = body
        self._finish(usage)

    def fail(self, error: SutazaiError) -> None:
        self._in_turn()
        assert error.message
        self.error = error
        self._finish(None)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                self.news.clear()
                await self.news.wait()

    async def over(self) -> None:
        await self.until(lambda: self.ended)

    def _in_turn(self) -> None:
        assert not self.ended, "nothing comes after the end"
        assert not self.silenced, "nothing comes after a cancellation"

    def _finish(self, usage: Usage | None) -> None:
        self.ended = True
        self.usage = usage
        self.news.set()


def client_of(node: FakeNode) -> NodeClient:
    what = Node(name="a", kind=node.kind, url=node.url)
    if node.kind is NodeKind.OLLAMA:
        return OllamaNode(what, api_key=None, connect_s=1.0, model_settings=lambda _: ModelSettings())
    return OpenAINode(what, api_key=None, connect_s=1.0)


@asynccontextmanager
async def alone(node: FakeNode) -> AsyncIterator[Inference]:
    client = client_of(node)
    yield client
    await client.close()


@asynccontextmanager
async def routed(node: FakeNode) -> AsyncIterator[Inference]:
    """The whole stage above the same node, without retries, so that errors come as the node gave them."""
    client = client_of(node)
    fleet = Fleet(RoutingRules(head_start=1, slow_start_s=0.0, failure_penalty_s=1.0), failures_to_down=1000)
    stage = Routed(
        fleet,
        patience=Patience(first_token_s=30.0, idle_s=30.0, total_s=30.0, max_wait_s=30.0),
        retry=RetryRules(attempts=1, budget_ratio=0.0, budget_minimum_per_s=0.0, backoff_s=0.0, backoff_max_s=0.0),
        random=random.Random(1).random,
        later=asyncio.get_running_loop().call_later,
        on_fault=lambda _node, _model, _error: None,
    )
    state = fleet.add(client.node, client, slots=4)
    fleet.reported(state, await client.probe())
    rules = AdmissionRules(
        max_waiting=100,
        max_waiting_bytes=10**6,
        max_wait_s=30.0,
        output_weight=2.0,
        promote_after_s=30.0,
        swap_patience_s=10.0,
    )
    yield Admitted(stage, rules)
    await client.close()

    assert state.in_flight == 0
    assert not stage.runs


STAGES = [(kind, make) for make in (alone, routed) for kind in NodeKind]


@pytest.fixture(params=STAGES, ids=lambda stage: f"{stage[1].__name__}-{stage[0].value}")
async def stage(request: pytest.FixtureRequest, fake_nodes: StartNode) -> AsyncIterator[tuple[FakeNode, Inference]]:
    """A fake node, and something that answers requests with it."""
    kind, make = request.param
    node = await fake_nodes(kind)
    async with make(node) as answers:
        yield node, answers


every_dialect = pytest.mark.parametrize("dialect", Dialect)
streamed_or_not = pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])


def asked(dialect: Dialect, *, stream: bool, body: bytes | None = None) -> Request:
    body = body or msgspec.json.encode({"model": "llama3", "messages": MESSAGES, "stream": stream})
    now = asyncio.get_running_loop().time()
    return Request(f"r{next(ids)}", IN_DIALECT[dialect], "llama3", stream, body, "local", "", now)


@every_dialect
@streamed_or_not
async def test_a_good_answer_is_a_head_its_chunks_and_one_end(
    stage: tuple[FakeNode, Inference], dialect: Dialect, stream: bool
) -> None:
    node, answers = stage
    heard = Heard()
    answers.start(asked(dialect, stream=stream), heard)
    await heard.over()

    assert heard.error is None
    assert heard.heads[0].status == 200
    assert heard.heads[0].node == "a"
    assert b"Hel" in heard.body
    assert heard.heads[0].length in {None, len(heard.body)}
    assert heard.usage is None or heard.usage.output_tokens == 2
    assert node.inferences[0].finished


@every_dialect
@streamed_or_not
async def test_one_request_after_another_is_answered(
    stage: tuple[FakeNode, Inference], dialect: Dialect, stream: bool
) -> None:
    _, answers = stage
    for _ in range(5):
        heard = Heard()
        answers.start(asked(dialect, stream=stream), heard)
        await heard.over()

        assert heard.error is None


@every_dialect
@streamed_or_not
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault.reset_before_head(), NodeUnreachable),
        (Fault.close_before_head(), NodeUnreachable),
        (Fault.garbage(), NodeUnreachable),
        (Fault.reset_mid_stream(1), NodeUnreachable),
        (Fault.truncate(1), NodeUnreachable),
        (Fault.status(400), NodeRejected),
        (Fault.status(503), NodeRejected),
        (Fault.status(302), NodeRejected),
        (Fault.status(500, b"<html>"), NodeRejected),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else "",
)
async def test_a_bad_answer_ends_in_one_failure_that_names_the_node(
    stage: tuple[FakeNode, Inference],
    dialect: Dialect,
    stream: bool,
    fault: Fault,
    error: type[NodeFault],
) -> None:
    node, answers = stage
    node.default = fault
    heard = Heard()
    answers.start(asked(dialect, stream=stream), heard)
    await heard.over()

    assert isinstance(heard.error, error)
    assert heard.error.node == "a"
    assert stream or not heard.heads, "half an answer is not handed on where another node could give a whole one"


@every_dialect
async def test_a_stream_that_turns_into_nonsense_fails(stage: tuple[FakeNode, Inference], dialect: Dialect) -> None:
    node, answers = stage
    node.default = Fault.garbage_mid_stream(1)
    heard = Heard()
    answers.start(asked(dialect, stream=True), heard)
    await heard.over()
    await node.wait_idle(within_s=LEAVES_WITHIN_S)

    assert isinstance(heard.error, NodeUnreachable)


@every_dialect
async def test_a_node_that_is_away_fails_the_request_and_start_does_not_raise(
    stage: tuple[FakeNode, Inference], dialect: Dialect
) -> None:
    node, answers = stage
    await node.stop()
    heard = Heard()
    answers.start(asked(dialect, stream=True), heard)
    await heard.over()

    assert isinstance(heard.error, NodeUnreachable | NodeTimeout)


@every_dialect
@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"model":1}', b"\xff", b'{"messages":'])
async def test_start_never_raises_whatever_the_body(
    stage: tuple[FakeNode, Inference], dialect: Dialect, body: bytes
) -> None:
    """Bodies were read before; a stage that reads them again says so by failing."""
    _, answers = stage
    heard = Heard()
    answers.start(asked(dialect, stream=True, body=body or b" "), heard)
    await heard.over()

    assert isinstance(heard.error, BadRequest | NodeRejected | None)


@every_dialect
@streamed_or_not
@pytest.mark.parametrize("moment", ["at once", "at the node", "in the answer"])
async def test_a_cancelled_request_is_silent_and_the_node_is_free(
    stage: tuple[FakeNode, Inference], dialect: Dialect, stream: bool, moment: str
) -> None:
    node, answers = stage
    node.default = ENDLESS
    heard = Heard()
    call = answers.start(asked(dialect, stream=stream), heard)
    if moment != "at once":
        await node.wait_for(1)
    if moment == "in the answer":
        await (heard.until(lambda: bool(heard.body)) if stream else node.until(lambda: node.active == 1))
    call.cancel()
    heard.silenced = True
    await node.wait_idle(within_s=LEAVES_WITHIN_S)
    call.cancel()
    call.pause()
    call.resume()

    assert all(received.aborted for received in node.inferences)
    assert node.active == 0


@every_dialect
async def test_a_reply_may_cancel_while_it_is_being_told(stage: tuple[FakeNode, Inference], dialect: Dialect) -> None:
    node, answers = stage
    node.default = LONG
    heard = Heard()
    call: Call | None = None

    def leave() -> None:
        assert call is not None
        call.cancel()
        heard.silenced = True

    heard.at_chunk = leave
    call = answers.start(asked(dialect, stream=True), heard)
    await heard.until(lambda: heard.silenced)
    await node.wait_idle(within_s=LEAVES_WITHIN_S)

    assert node.inferences[0].aborted


@every_dialect
@streamed_or_not
async def test_cancelling_after_the_end_does_nothing(
    stage: tuple[FakeNode, Inference], dialect: Dialect, stream: bool
) -> None:
    """The connection may be at work for somebody else by then."""
    node, answers = stage
    first, second = Heard(), Heard()
    call = answers.start(asked(dialect, stream=stream), first)
    await first.over()
    node.default = LONG
    answers.start(asked(dialect, stream=True), second)
    await second.until(lambda: bool(second.body))
    call.cancel()
    call.pause()
    await second.over()

    assert second.error is None
    assert b"word39" in second.body


@every_dialect
async def test_a_paused_request_stops_the_node_and_goes_on_where_it_was(
    stage: tuple[FakeNode, Inference], dialect: Dialect
) -> None:
    """What is not read fills the sockets, and then the node cannot send."""
    node, answers = stage
    node.default = Answer(tokens=("x" * 65536,) * 400)
    heard = Heard()
    call = answers.start(asked(dialect, stream=True), heard)
    await heard.until(lambda: bool(heard.body))
    call.pause()
    await standing_still(lambda: node.inferences[0].tokens_sent)
    read, sent = len(heard.body), node.inferences[0].tokens_sent
    assert sent < 300
    await standing_still(lambda: len(heard.body))
    assert len(heard.body) - read <= 2**20, "what was read already may still come"
    call.resume()
    await heard.over()

    assert heard.error is None
    assert heard.body.count(b"x" * 65536) == 400


@every_dialect
async def test_a_request_paused_before_it_was_sent_is_paused_still(
    stage: tuple[FakeNode, Inference], dialect: Dialect
) -> None:
    _, answers = stage
    heard = Heard()
    call = answers.start(asked(dialect, stream=True), heard)
    call.pause()
    for _ in range(20):
        await asyncio.sleep(0.005)
    assert not heard.ended
    call.resume()
    await heard.over()

    assert heard.error is None


@every_dialect
@streamed_or_not
async def test_a_pause_in_the_last_piece_harms_nobody_after_it(
    stage: tuple[FakeNode, Inference], dialect: Dialect, stream: bool
) -> None:
    """The answer came whole before the pause took effect; its connection is read again for the next request."""
    _, answers = stage
    for _ in range(3):
        heard = Heard()
        calls: list[Call] = []
        heard.at_chunk = partial(pause_all, calls)
        calls.append(answers.start(asked(dialect, stream=stream), heard))
        for _ in range(100):
            if heard.ended:
                break
            await asyncio.sleep(0.005)
            if not heard.ended and heard.body:
                calls[0].resume()

        assert heard.ended


def pause_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call.pause()


async def standing_still(count: Callable[[], int]) -> None:
    """Wait until a number has not changed for a while."""
    seen = -1
    while seen != count():
        seen = count()
        await asyncio.sleep(0.1)
