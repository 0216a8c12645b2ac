"""
The lines of a batch job's files, read from what its chunks wrote, piece after piece.

A file may be larger than memory: embeddings of ten thousand texts are two hundred megabytes. So no more than one piece
is in memory at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from sutazai.agents.batch_lines import Answered, given_up, lines_in, unpacked
from sutazai.agents.batch_shapes import ChunkKept, Piece, file_at
from sutazai.core.task import FailureReason, Task, TaskStatus
from sutazai.ports.objects import ObjectStore

READS_AT_ONCE = 8
EXPIRED = "batch_expired"


@dataclass(slots=True)
class Answers:
    """What the chunks of a batch job came to."""

    objects: ObjectStore
    tenant: str
    digits: str
    """Of the batch job's id."""
    input_file_id: str
    chunks: Sequence[tuple[Piece, Task]]
    """In the order of the input, each with the task that has ended."""
    is_called_off: bool
    _kept: list[ChunkKept] = field(init=False)

    def __post_init__(self) -> None:
        self._kept = [_kept(task) for _, task in self.chunks]

    @property
    def completed(self) -> int:
        """Lines that have an answer."""
        return sum(kept.completed for kept in self._kept)

    @property
    def total(self) -> int:
        """All lines."""
        return sum(piece.lines for piece, _ in self.chunks)

    @property
    def is_expired(self) -> bool:
        """Whether lines were left because the day was over."""
        return any(
            _left(piece, kept) and self._why(task)[0] == EXPIRED
            for (piece, task), kept in zip(self.chunks, self._kept, strict=True)
        )

    @property
    def input_tokens(self) -> int:
        """That the answers took."""
        return sum(kept.input_tokens for kept in self._kept)

    @property
    def output_tokens(self) -> int:
        """That the answers took."""
        return sum(kept.output_tokens for kept in self._kept)

    async def lines(self, *, are_good: bool) -> AsyncIterator[bytes]:
        """
        The lines of one of the files, in the order of the input.

        Raises what the object store does; `NotFound` where the input is not there any more.
        """
        for (piece, task), kept in zip(self.chunks, self._kept, strict=True):
            left = _left(piece, kept)
            if not (kept.completed if are_good else kept.failed or left):
                continue
            found = {line.number: line for line in await self._read([part.name for part in kept.parts])}
            if left and not are_good:
                found |= await self._given_up(piece, task, found.keys())
            for number in sorted(found):
                if found[number].is_good is are_good:
                    yield bytes(found[number].line) + b"\n"

    async def _read(self, names: Sequence[str]) -> list[Answered]:
        found: list[Answered] = []
        waiting = iter(names)
        while some := list(islice(waiting, READS_AT_ONCE)):
            for content in await asyncio.gather(*map(self.objects.get, some)):
                found += unpacked(content)
        return found

    async def _given_up(self, piece: Piece, task: Task, found: Collection[int]) -> dict[int, Answered]:
        """The lines that nobody answered, as errors."""
        code, message = self._why(task)
        at = file_at(self.tenant, self.input_file_id)
        content = await self.objects.get_range(at, start=piece.start, length=piece.length)
        return {
            number: given_up(self.digits, number, line, code, message)
            for number, line in lines_in(content, piece)
            if number not in found
        }

    def _why(self, task: Task) -> tuple[str, str]:
        """Code and sentence for the lines that a chunk left without an answer."""
        if self.is_called_off or task.status is TaskStatus.CANCELLED:
            return "batch_cancelled", "This request was not executed before the batch was cancelled."
        # One that completed without all its lines has seen that the day was over.
        if task.reason is FailureReason.DEADLINE or task.status is TaskStatus.COMPLETED:
            return EXPIRED, "This request could not be executed before the completion window expired."
        return "request_failed", task.error or "This request was given up. Send it again in another batch job."


def _kept(task: Task) -> ChunkKept:
    with suppress(msgspec.MsgspecError):  # of a chunk that was never begun
        return msgspec.json.decode(task.checkpoint, type=ChunkKept)
    return ChunkKept()


def _left(piece: Piece, kept: ChunkKept) -> int:
    return piece.lines - sum(len(part.lines) for part in kept.parts)
