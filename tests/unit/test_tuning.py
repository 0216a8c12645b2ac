"""The measuring of a node over a clock that only its answers move."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest

from sutazai.core.errors import EngineFault, NodeTimeout, NodeUnreachable, Overloaded, SutazaiError
from sutazai.core.node import Node, NodeKind, NodeReport
from sutazai.core.request import Head, Request, Usage
from sutazai.gateway.tuning import Outcome, Subject, tune
from sutazai.policy.tuning import REPEATS, Grid, Sample, Tuning
from sutazai.ports.inference import Call, NoCall, Reply

GRID = Grid(slots=(1, 2, 4), threads=(1, 2, 4), batch_tokens=(128, 512))
START = Tuning(slots=1, threads=1, batch_tokens=512)
BEST = Tuning(slots=4, threads=2, batch_tokens=512)


@dataclass
class Bench:
    """A node whose speed is a formula, and all that is seen of how it is measured."""

    now: float = 0.0
    runs: list[Tuning] = field(default_factory=list)
    open_now: int = 0
    bodies: list[dict[str, object]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    refused: frozenset[int] = frozenset()
    """Counts of slots with which it cannot be run."""
    broken: frozenset[int] = frozenset()
    """Counts of slots with which every request fails."""
    needed_after: float = float("inf")
    """The number of samples after which others need the node."""
    stuck_after: float = float("inf")
    """The number of samples after which it answers nothing any more."""
    never_answers: bool = False
    tells_usage: bool = True

    @asynccontextmanager
    async def opened(self, tuning: Tuning) -> AsyncIterator[SimulatedNode]:
        if tuning.slots in self.refused:
            raise EngineFault("Memory did not do.")
        self.runs.append(tuning)
        self.open_now += 1
        try:
            yield SimulatedNode(self, tuning)
        finally:
            self.open_now -= 1

    async def check(self) -> None:
        if len(self.samples) >= self.needed_after:
            raise Overloaded("It worked on a request of others.", retry_after_s=60)

    async def tune(self, *, budget_s: float = 60.0) -> Outcome:
        subject = Subject(
            model="m",
            options={"ignore_eos": True},
            most_prompt_tokens=600,
            head_start=1,
            opened=self.opened,
            check=self.check,
        )
        return await tune(subject, GRID, START, budget_s=budget_s, clock=lambda: self.now, note=self.samples.append)


class SimulatedNode:
    """Answers at once, and moves the clock by what that would have taken."""

    def __init__(self, bench: Bench, tuning: Tuning) -> None:
        self.node = Node(name="n1", kind=NodeKind.LLAMACPP, url="http://n1")
        self._bench = bench
        self._tuning = tuning

    def start(self, request: Request, reply: Reply) -> Call:
        bench, tuning = self._bench, self._tuning
        body = msgspec.json.decode(request.body, type=dict[str, object])
        bench.bodies.append(body)
        if bench.never_answers or len(bench.samples) >= bench.stuck_after:
            return NoCall()
        if tuning.slots in bench.broken:
            reply.fail(NodeUnreachable("The connection was reset.", node="n1"))
            return NoCall()
        usage = _usage(body)
        per_s = {1: 10.0, 2: 18.0, 4: 13.0}[tuning.threads] * tuning.slots**0.5
        bench.now += usage.output_tokens / per_s + usage.input_tokens / (2 * tuning.batch_tokens)
        reply.whole(Head(200, b"application/json", 2, "n1", ""), b"{}", usage if bench.tells_usage else None)
        return NoCall()

    async def probe(self) -> NodeReport:
        return NodeReport(models={}, loaded=None)

    async def show(self, model: str) -> Mapping[str, object]:
        return {"model": model}

    async def close(self) -> None:
        return


def _usage(body: dict[str, object]) -> Usage:
    messages = msgspec.convert(body["messages"], list[dict[str, str]])
    return Usage(2 * len(messages[0]["content"].split()), msgspec.convert(body["max_tokens"], int))


async def test_the_fastest_tuning_is_found_and_every_sample_is_told() -> None:
    bench = Bench()

    outcome = await bench.tune()

    assert (outcome.start, outcome.best, outcome.is_complete) == (START, BEST, True)
    assert outcome.samples == bench.samples
    assert len(outcome.samples) <= GRID.most_samples


async def test_a_node_is_run_anew_only_for_another_tuning() -> None:
    bench = Bench()

    outcome = await bench.tune()

    assert Counter(bench.runs) == Counter(set(bench.runs))
    assert set(bench.runs) == {sample.tuning for sample in outcome.samples}
    assert bench.open_now == 0


async def test_every_tuning_is_asked_the_same_work_with_prompts_that_no_cache_knows() -> None:
    bench = Bench()

    await bench.tune()

    prompts = [msgspec.convert(body["messages"], list[dict[str, str]])[0]["content"] for body in bench.bodies]
    assert len(set(prompts)) == len(prompts)
    assert {(body["model"], body["ignore_eos"]) for body in bench.bodies} == {("m", True)}
    # one length each for: loading, sizing up the prompt and the answer, the answers, the long prompt
    assert len({body["max_tokens"] for body in bench.bodies}) <= 3
    assert max(_usage(body).input_tokens for body in bench.bodies) <= 602


async def test_a_tuning_in_which_the_node_cannot_be_run_is_tried_once_and_never_taken() -> None:
    bench = Bench(refused=frozenset({4}))

    outcome = await bench.tune()

    assert outcome.best == Tuning(slots=2, threads=2, batch_tokens=512)
    refused = [sample for sample in outcome.samples if sample.tuning.slots == 4]
    assert [sample.generated_per_s for sample in refused] == [0] * len({sample.tuning for sample in refused})


async def test_a_tuning_in_which_requests_fail_is_never_taken() -> None:
    outcome = await Bench(broken=frozenset({2})).tune()

    assert outcome.best.slots == 1


@pytest.mark.parametrize(
    ("bench", "words"),
    [
        (Bench(refused=frozenset({1})), "Memory did not do"),
        (Bench(broken=frozenset({1})), "connection was reset"),
        (Bench(tells_usage=False), "n1 did not tell how many tokens it took"),
    ],
)
async def test_a_node_that_fails_as_it_is_ends_the_measuring(bench: Bench, words: str) -> None:
    with pytest.raises(SutazaiError, match=words):
        await bench.tune()

    assert bench.open_now == 0


async def test_a_node_that_others_need_is_left_to_them_at_once() -> None:
    bench = Bench(needed_after=4)

    with pytest.raises(Overloaded):
        await bench.tune()

    assert (len(bench.samples), bench.open_now) == (4, 0)


async def test_when_the_time_is_up_the_best_of_what_was_measured_is_taken() -> None:
    bench = Bench(stuck_after=REPEATS + 4)

    outcome = await bench.tune(budget_s=0.2)

    assert (outcome.best, outcome.is_complete, bench.open_now) == (Tuning(2, 1, 512), False, 0)
    assert len(outcome.samples) == REPEATS + 4


async def test_a_time_too_short_for_what_the_node_has_is_told() -> None:
    bench = Bench(never_answers=True)

    with pytest.raises(NodeTimeout, match=r"0\.01 s did not do for 3 samples of m\. Give it more time\."):
        await bench.tune(budget_s=0.01)

    assert bench.open_now == 0


async def test_cancelled_it_leaves_nothing_open() -> None:
    bench = Bench(never_answers=True)
    tuning = asyncio.create_task(bench.tune())
    while not bench.bodies:
        await asyncio.sleep(0)

    tuning.cancel()

    with pytest.raises(asyncio.CancelledError):
        await tuning
    assert bench.open_now == 0


async def test_no_tuning_is_sampled_more_often_than_it_is_repeated() -> None:
    outcome = await Bench().tune()

    assert max(Counter(sample.tuning for sample in outcome.samples).values()) == REPEATS
