"""
OpenAI's Batch API as a task: an input file is checked, its lines are answered by child tasks, and files are written.

Every step can be repeated after a crash. Children have names, so there is one for each piece of the input; the files
have ids made of the task's, so there is one of each kind; what was reached is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

import msgspec
from msgspec import Struct, field

from sutazai.agents.batch_cancel import called_off_at
from sutazai.agents.batch_chunk import Refusal, batch_chunk
from sutazai.agents.batch_files import Answers
from sutazai.agents.batch_lines import Scan
from sutazai.agents.batch_shapes import (
    BATCH,
    BATCH_CHUNK,
    WINDOW_S,
    BatchJob,
    BatchProgress,
    BatchResult,
    Chunk,
    Complaint,
    Piece,
    file_at,
    folder_of,
)
from sutazai.agents.registry import agent
from sutazai.core.errors import Forbidden, NotFound
from sutazai.core.file import File
from sutazai.core.task import uuid_of
from sutazai.ports.agent import ENDPOINTS, Agent, AgentContext
from sutazai.ports.files import FileStore
from sutazai.ports.objects import ObjectStore

MAX_FILES = 20_000
"""Of one tenant; more than it may upload, so that what a batch job wrote finds room."""
DELETED_AT_ONCE = 1000
Wall = Callable[[], datetime]


class _Kept(Struct):
    """The checkpoint."""

    pieces: list[Piece]
    in_progress_at: int
    model: str | None = None
    """That all lines name; None where they name several, or none."""
    children: list[str] = field(default_factory=list)
    """One for each piece, once all were made."""
    result: BatchResult | None = None
    """Once the files are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """Where a batch job reads and writes."""

    files: FileStore
    objects: ObjectStore
    wall: Wall = lambda: datetime.now(UTC)


def batch_agents(stores: Stores, refusal: Refusal) -> tuple[Agent, Agent]:
    """
    The agent `batch`, and the one that its children are for.

    Args:
        refusal: how the API tells an error.
    """

    @agent(name=BATCH, capabilities={"children"}, concurrency=2, time_limit_s=3600.0, max_attempts=10)
    async def batch(context: AgentContext, job: BatchJob) -> BatchResult:
        """Answers every line of a file, as OpenAI's Batch API does."""
        return await _Batch(context, job, stores).run()

    return batch, batch_chunk(stores.objects, refusal, wall=stores.wall)


async def forget_parts(objects: ObjectStore, tenant: str, batch: str) -> None:
    """Delete what chunks wrote, but not the files that were made of it."""
    folder = folder_of(tenant, batch)
    while names := await objects.list(folder, limit=DELETED_AT_ONCE):
        for name in names:
            await objects.delete(name)


class _Batch:
    """One attempt at a batch job."""

    def __init__(self, context: AgentContext, job: BatchJob, stores: Stores) -> None:
        self._context = context
        self._job = job
        self._stores = stores
        self._tenant = context.task.draft.tenant
        self._digits = uuid_of(context.task.id).hex

    async def run(self) -> BatchResult:
        kept = _kept(self._context.last_checkpoint)
        if kept is None:
            scan = await self._scanned()
            if isinstance(scan, BatchResult):
                return scan
            kept = _Kept(scan.pieces, int(self._stores.wall().timestamp()), scan.model)
            await self._keep(kept)
        if kept.result is None:
            kept.result = await self._answered(kept)
            await self._keep(kept)
        await forget_parts(self._stores.objects, self._tenant, self._digits)
        return kept.result

    async def _scanned(self) -> Scan | BatchResult:
        """The checked input, or what is wrong with it."""
        await self._tell(BatchProgress(stage="validating"))
        if self._job.endpoint not in ENDPOINTS:
            words = f"endpoint must be one of {', '.join(ENDPOINTS)}; others are not answered in batch jobs."
            return BatchResult(errors=[Complaint(code="invalid_endpoint", message=words, param="endpoint")])
        scan = Scan(self._job.endpoint)
        try:
            async for data in self._stores.objects.stream(file_at(self._tenant, self._job.input_file_id)):
                scan.feed(data)
                if scan.is_hopeless:
                    break
        except NotFound:
            return self._no_input()
        scan.end()
        return BatchResult(errors=scan.complaints) if scan.complaints else scan

    async def _answered(self, kept: _Kept) -> BatchResult:
        """Have the lines answered, and write the files."""
        total = sum(piece.lines for piece in kept.pieces)
        begun = BatchProgress(stage="in_progress", total=total, in_progress_at=kept.in_progress_at, model=kept.model)
        await self._tell(begun)
        if not kept.children:
            kept.children = [await self._child(piece, number) for number, piece in enumerate(kept.pieces)]
            await self._keep(kept)
        tasks = await self._context.join(kept.children)
        finalizing_at = int(self._stores.wall().timestamp())
        await self._tell(msgspec.structs.replace(begun, stage="finalizing", finalizing_at=finalizing_at))
        cancelling_at = await called_off_at(self._context, self._context.task.id)
        answers = Answers(
            self._stores.objects,
            self._tenant,
            self._digits,
            self._job.input_file_id,
            list(zip(kept.pieces, tasks, strict=True)),
            is_called_off=cancelling_at is not None,
        )
        failed = total - answers.completed
        try:
            output_file_id = await self._file("output", answers.lines(are_good=True)) if answers.completed else None
            error_file_id = await self._file("error", answers.lines(are_good=False)) if failed else None
        except NotFound:
            return self._no_input()
        return BatchResult(
            output_file_id=output_file_id,
            error_file_id=error_file_id,
            total=total,
            completed=answers.completed,
            failed=failed,
            input_tokens=answers.input_tokens,
            output_tokens=answers.output_tokens,
            model=kept.model,
            is_expired=answers.is_expired,
            cancelling_at=cancelling_at,
            in_progress_at=kept.in_progress_at,
            finalizing_at=finalizing_at,
        )

    async def _child(self, piece: Piece, number: int) -> str:
        chunk = Chunk(
            batch=self._digits, input_file_id=self._job.input_file_id, piece=piece, endpoint=self._job.endpoint
        )
        ends_at = self._context.task.created_at + timedelta(seconds=WINDOW_S)
        return await self._context.spawn(BATCH_CHUNK, chunk, key=f"chunk-{number}", deadline=ends_at)

    async def _file(self, kind: str, lines: AsyncIterator[bytes]) -> str:
        """The id of a file of these lines, which is written once."""
        created_at = self._context.task.created_at
        file_id = f"file-{self._digits[:12]}{sha256(f'{kind} {self._digits}'.encode()).hexdigest()[:20]}"
        if await self._stores.files.get(self._tenant, file_id) is not None:
            return file_id  # by an attempt before this one
        size_bytes = await self._stores.objects.put_stream(file_at(self._tenant, file_id), lines)
        file = File(
            id=file_id,
            tenant=self._tenant,
            name=f"batch_{self._digits}_{kind}.jsonl",
            purpose="batch_output",
            size_bytes=size_bytes,
            created_at=created_at,
        )
        if not await self._stores.files.add(file, at_most=MAX_FILES):
            raise Forbidden(f"The tenant has {MAX_FILES} files already; delete some of them, then retry the task.")
        return file_id

    async def _keep(self, kept: _Kept) -> None:
        await self._context.checkpoint(msgspec.to_builtins(kept))

    async def _tell(self, progress: BatchProgress) -> None:
        await self._context.progress(msgspec.to_builtins(progress))

    def _no_input(self) -> BatchResult:
        words = f"The file {self._job.input_file_id} was not there. Upload it again and make another batch job."
        return BatchResult(errors=[Complaint(code="file_not_found", message=words, param="input_file_id")])


def _kept(checkpoint: Any) -> _Kept | None:
    try:
        return msgspec.convert(checkpoint, _Kept)
    except msgspec.ValidationError:
        return None
