"""
Measures how fast one node is in one tuning after the other, by asking it as clients do, and tells the fastest.

The same work is asked of every tuning: so many answers, as many at once as the gateway would ask for with the slots of
the tuning, then one long prompt. How much that is follows from how fast the node is when the tuning begins. No two
prompts are alike, or a cache of the node's would answer.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import msgspec

from sutazai.core.errors import EngineFault, NodeFault, NodeTimeout
from sutazai.core.request import Endpoint, Request, Usage
from sutazai.gateway.pulled import Pulled
from sutazai.policy.tuning import REPEATS, Grid, Sample, Tuning, choose, search
from sutazai.ports.nodes import NodeClient

ANSWERS_S, PROMPT_S = 3.0, 1.5
"""What the two parts of a sample take about; shorter ones drown in noise."""
FEWEST_TOKENS, MOST_TOKENS = 8, 256
"""Of one answer."""
FEWEST_WORDS = 32
"""Of a prompt that is measured."""
WORD_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured, and what may be done with it."""

    model: str
    options: Mapping[str, object]
    """Further fields of each request, such as `ignore_eos` where the node knows it."""
    most_prompt_tokens: int
    head_start: int
    """Requests that it gets beyond its slots, as from the gateway: without them it waits for us between two."""
    opened: Callable[[Tuning], AbstractAsyncContextManager[NodeClient]]
    """The node run like that. Raises `EngineFault` or `NodeFault` where it cannot be."""
    check: Callable[[], Awaitable[None]]
    """Asked before each sample; raises what is to end the measuring, because the node is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it."""

    start: Tuning
    best: Tuning
    samples: Sequence[Sample]
    is_complete: bool
    """False where the time was up before the search had ended."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one sample asks."""

    answers: int
    answer_tokens: int
    """Of each answer, at most."""
    prompt_words: int
    """Of the long prompt; the answers have short ones."""


async def tune(
    subject: Subject,
    grid: Grid,
    start: Tuning,
    *,
    budget_s: float,
    clock: Callable[[], float],
    note: Callable[[Sample], None],
) -> Outcome:
    """
    Measure until the search ends or the time is up.

    Args:
        clock: monotonic seconds.
        note: called with each sample.

    Raises `NodeFault` or `EngineFault` where the node fails in the tuning that it has, or is not even measured in that
    within the time; one that fails in another is merely not chosen. Cancelled, it leaves nothing under way.
    """
    course = _Course(search(grid, start), note)
    work: Work | None = None
    try:
        async with asyncio.timeout(budget_s) as budget:
            while (tuning := course.wanted) is not None:
                try:
                    async with subject.opened(tuning) as node:
                        asking = _Asking(node, subject, clock)
                        await asking.ask(FEWEST_WORDS, FEWEST_TOKENS)  # loads the model
                        work = work or await asking.work(max(grid.slots))
                        while course.wanted == tuning:
                            await subject.check()
                            course.take(await asking.sample(tuning, work))
                except (EngineFault, NodeFault):
                    if tuning == start:
                        raise
                    course.take(Sample(tuning=tuning, generated_per_s=0, prompt_per_s=0))
    except TimeoutError:
        if not budget.expired():
            raise
    if len(course.samples) < REPEATS:
        name = subject.model
        raise NodeTimeout(f"{budget_s:g} s did not do for {REPEATS} samples of {name}. Give it more time.", node=name)
    return Outcome(
        start=start, best=choose(course.samples, start), samples=course.samples, is_complete=course.wanted is None
    )


class _Course:
    """The search so far."""

    def __init__(self, walk: Generator[Tuning, Sample, None], note: Callable[[Sample], None]) -> None:
        self._walk = walk
        self._note = note
        self.samples: list[Sample] = []
        self.wanted: Tuning | None = next(walk)
        """What to measure next; None at the end."""

    def take(self, sample: Sample) -> None:
        self.samples.append(sample)
        self._note(sample)
        try:
            self.wanted = self._walk.send(sample)
        except StopIteration:
            self.wanted = None


class _Asking:
    """Requests to one node, and how long they take."""

    def __init__(self, node: NodeClient, subject: Subject, clock: Callable[[], float]) -> None:
        self._node = node
        self._subject = subject
        self._clock = clock

    async def work(self, answers: int) -> Work:
        """How much to ask, so that a sample takes about its time on this node; `answers` of them."""
        took_s, usage = await self._timed(self.ask(FEWEST_WORDS, 1))
        tokens_per_word = max(1.0, usage.input_tokens / FEWEST_WORDS)
        words = min(FEWEST_WORDS * PROMPT_S / took_s, self._subject.most_prompt_tokens / tokens_per_word)
        took_s, usage = await self._timed(self.ask(1, FEWEST_TOKENS))
        tokens = usage.output_tokens * ANSWERS_S / took_s / answers
        return Work(answers, int(min(max(tokens, FEWEST_TOKENS), MOST_TOKENS)), max(FEWEST_WORDS, int(words)))

    async def sample(self, tuning: Tuning, work: Work) -> Sample:
        """One measurement."""
        answers_s, answered = await self._timed(self._answers(tuning.slots, work))
        prompt_s, read = await self._timed(self.ask(work.prompt_words, 1))
        return Sample(
            tuning=tuning, generated_per_s=answered.output_tokens / answers_s, prompt_per_s=read.input_tokens / prompt_s
        )

    async def ask(self, words: int, tokens: int) -> Usage:
        """One request: a prompt of so many words, an answer of at most so many tokens. Raises `NodeFault`."""
        pulled = Pulled()
        try:
            pulled.begin(self._node, self._request(words, tokens))
            await pulled.until_head()
            while await pulled.part():
                pass
        finally:
            pulled.cancel()
        if pulled.usage is None or not (pulled.usage.input_tokens and pulled.usage.output_tokens):
            name = self._node.node.name
            raise NodeFault(f"{name} did not tell how many tokens it took, so its speed is not known.", node=name)
        return pulled.usage

    async def _answers(self, slots: int, work: Work) -> Usage:
        total, waiting = Usage(), asyncio.Semaphore(slots + self._subject.head_start)

        async def one() -> None:
            async with waiting:
                usage = await self.ask(1, work.answer_tokens)
            total.output_tokens += usage.output_tokens

        try:
            async with asyncio.TaskGroup() as group:
                for number in range(work.answers):
                    group.create_task(one(), name=f"answer {number}")
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return total

    async def _timed(self, asked: Awaitable[Usage]) -> tuple[float, Usage]:
        began = self._clock()
        usage = await asked
        return max(1e-6, self._clock() - began), usage

    def _request(self, words: int, tokens: int) -> Request:
        number = secrets.token_hex(8)
        text = " ".join(secrets.token_hex(WORD_BYTES) for _ in range(words))
        body = {
            "model": self._subject.model,
            "messages": [{"role": "user", "content": f"{number} {text}"}],
            "max_tokens": tokens,
            "temperature": 0,
            **self._subject.options,
        }
        return Request(
            f"tune-{number}",
            Endpoint.OPENAI_CHAT,
            self._subject.model,
            stream=False,
            body=msgspec.json.encode(body),
            tenant="local",
            key_id="",
            arrived_at=self._clock(),
        )
