"""
Some lines of a batch job, a few at once.

What was answered is written in parts while the others go on, and each part is named in the checkpoint before the next
one is made. So a chunk whose worker died asks again only what was under way, and a line has one answer that counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from sutazai.agents.batch_cancel import called_off_at
from sutazai.agents.batch_lines import Answered, Line, answered, given_up, lines_in, packed, refused
from sutazai.agents.batch_shapes import BATCH_CHUNK, Chunk, ChunkDone, ChunkKept, Part, file_at, folder_of
from sutazai.agents.registry import agent
from sutazai.core.errors import (
    BudgetSpent,
    Cancelled,
    NodeFault,
    NodeRejected,
    NodeUnreachable,
    NoHealthyNode,
    NotFound,
    Overloaded,
    RateLimited,
    ShuttingDown,
    StoreUnavailable,
    SutazaiError,
)
from sutazai.core.task import id_of, uuid_of
from sutazai.ports.agent import Agent, AgentContext
from sutazai.ports.objects import ObjectStore

LINES_AT_ONCE = 4
TRIES = 5
"""Of a line in one attempt; then the whole chunk pauses."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0

Refusal = Callable[[SutazaiError], tuple[int, bytes]]
"""Status and body of an error, as a client of the API gets them."""

_PASSING = (Overloaded, RateLimited, NoHealthyNode, NodeUnreachable, ShuttingDown, StoreUnavailable)
"""They say nothing of the line: the chunk pauses, and its lines wait."""
_TRIED_AGAIN = frozenset({429, 500, 502, 503, 504})
"""Statuses of nodes that another try may spare the line."""


def batch_chunk(
    objects: ObjectStore,
    refusal: Refusal,
    *,
    wall: Callable[[], datetime],
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Agent:
    """
    The agent, which reads and writes there.

    Args:
        pause: waits so many seconds between two tries of a line.
    """

    @agent(
        name=BATCH_CHUNK,
        is_internal=True,
        concurrency=4,
        time_limit_s=4 * 3600.0,
        max_attempts=40,
    )
    async def chunk(context: AgentContext, given: Chunk) -> ChunkDone:
        """Answers some lines of a batch job; none any more once that was called off, or its day is over."""
        kept = _kept(context.last_checkpoint)
        if await called_off_at(context, id_of(UUID(given.batch))) is not None:
            return ChunkDone(kept.completed, kept.failed)
        try:
            lines = await _lines(context, objects, given)
        except NotFound:  # the input file was deleted, which its batch job will tell
            return ChunkDone(kept.completed, kept.failed)
        done = {number for part in kept.parts for number in part.lines}
        ends_at = context.task.draft.deadline

        def is_over() -> bool:
            return ends_at is not None and wall() >= ends_at

        todo = ((number, line) for number, line in lines if number not in done and not is_over())
        await _Work(context, objects, refusal, pause, given, kept).run(todo)
        return ChunkDone(kept.completed, kept.failed)

    return chunk


class _Work:
    """The lines of one attempt."""

    def __init__(
        self,
        context: AgentContext,
        objects: ObjectStore,
        refusal: Refusal,
        pause: Callable[[float], Awaitable[None]],
        given: Chunk,
        kept: ChunkKept,
    ) -> None:
        self._context = context
        self._objects = objects
        self._refusal = refusal
        self._pause = pause
        self._given = given
        self._batch = given.batch
        self._kept = kept

    async def run(self, waiting: Iterator[tuple[int, Line]]) -> None:
        """
        All of them, each begun when there is room for it.

        Raises what kept one from being answered, after the others that are done were written.
        """
        under_way = set[asyncio.Task[Answered]]()
        try:
            while True:
                for number, line in waiting:
                    under_way.add(asyncio.create_task(self._answer(number, line), name=f"line {number}"))
                    if len(under_way) == LINES_AT_ONCE:
                        break
                if not under_way:
                    return
                done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                await self._keep([one.result() for one in done if one.exception() is None])
                for one in done:
                    one.result()
        finally:
            for one in under_way:
                one.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _keep(self, lines: list[Answered]) -> None:
        if not lines:
            return
        kept, context = self._kept, self._context
        digits = uuid_of(context.task.id).hex
        name = folder_of(context.task.draft.tenant, self._batch, f"{digits}-{context.fence}-{len(kept.parts)}")
        await self._objects.put(name, packed(lines))
        kept.parts.append(Part(name, [line.number for line in lines]))
        good = sum(line.is_good for line in lines)
        kept.completed += good
        kept.failed += len(lines) - good
        kept.input_tokens += sum(line.input_tokens for line in lines)
        kept.output_tokens += sum(line.output_tokens for line in lines)
        await context.checkpoint(msgspec.to_builtins(kept))
        await context.progress(msgspec.to_builtins(ChunkDone(kept.completed, kept.failed)))

    async def _answer(self, number: int, line: Line) -> Answered:
        """What came of a line. Raises what may pass, after some tries."""
        pause_s = FIRST_PAUSE_S
        for tries in range(1, TRIES + 1):
            try:
                answer = await self._context.ask(self._given.endpoint, line.body)
                return answered(self._batch, number, line, answer)
            except SutazaiError as error:
                if isinstance(error, Cancelled):
                    return given_up(self._batch, number, line, "cancelled", error.message)
                if tries == TRIES and _is_passing(error):
                    raise
                if tries == TRIES or not _is_worth_a_try(error):
                    status, body = self._refusal(error)
                    return refused(self._batch, number, line, status, body)
                told_s = getattr(error, "retry_after_s", 0.0)
            await self._pause(min(LONGEST_PAUSE_S, max(pause_s, told_s)))
            pause_s *= 2
        raise AssertionError("the loop returns or raises")


def _is_passing(error: SutazaiError) -> bool:
    return isinstance(error, _PASSING) and not isinstance(error, BudgetSpent)


def _is_worth_a_try(error: SutazaiError) -> bool:
    """Whether the same line may have an answer in a moment."""
    if isinstance(error, NodeRejected):
        return error.status in _TRIED_AGAIN
    return isinstance(error, NodeFault) or _is_passing(error)


async def _lines(context: AgentContext, objects: ObjectStore, given: Chunk) -> list[tuple[int, Line]]:
    piece = given.piece
    at = file_at(context.task.draft.tenant, given.input_file_id)
    return list(lines_in(await objects.get_range(at, start=piece.start, length=piece.length), piece))


def _kept(checkpoint: Any) -> ChunkKept:
    with suppress(msgspec.ValidationError):
        return msgspec.convert(checkpoint, ChunkKept)
    return ChunkKept()
