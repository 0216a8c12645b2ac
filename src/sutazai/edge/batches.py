"""`/v1/batches`: batch jobs in OpenAI's form. Each is a task of the agent `batch`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from sutazai.agents.batch import forget_parts
from sutazai.agents.batch_cancel import MAX_CHUNKS, asked_at, call_off
from sutazai.agents.batch_shapes import (
    BATCH,
    BATCH_CHUNK,
    WINDOW,
    WINDOW_S,
    BatchJob,
    BatchProgress,
    BatchResult,
    ChunkDone,
    Complaint,
)
from sutazai.core.errors import BadRequest, Conflict, NotFound
from sutazai.core.mark import Mark
from sutazai.core.request import Priority
from sutazai.core.task import PREFIX, FailureReason, Task, TaskStatus, is_task_id, uuid_of
from sutazai.edge.files import PURPOSE
from sutazai.edge.marks import mark_in
from sutazai.edge.pool import Pool, caller_of, for_inference
from sutazai.edge.replies import Address, body_as, json_reply, resource
from sutazai.edge.tasks import page_size
from sutazai.ports.agent import ENDPOINTS
from sutazai.ports.files import FileStore
from sutazai.ports.tasks import TaskFilter
from sutazai.tasks.submit import Submitter, Wanted

BATCH_PREFIX = "batch_"
_JOB = msgspec.json.Decoder(BatchJob)


def routes(pool: Pool) -> list[Address]:
    """Batch jobs."""
    store = pool.tasks

    async def create(http: HttpRequest) -> Response:
        by = _submitter(http)
        job = await body_as(http, _JOB)
        _check(job)
        await _check_file(pool.files, by.tenant, job.input_file_id)
        wanted = Wanted(
            agent=BATCH,
            input=msgspec.json.encode(job),
            priority=Priority.LOW,
            idempotency_key=http.headers.get("idempotency-key", ""),
        )
        return await now(await pool.results.whole(await pool.submission.submit(wanted, by)))

    async def listed(http: HttpRequest) -> Response:
        tenant, query = _submitter(http).tenant, http.query_params
        limit, after = page_size(query.get("limit")), query.get("after", "")
        before = _task_id(after)
        if after and not before:
            raise BadRequest("after was no id of a batch job.", where="after")
        found = await store.page(tenant, TaskFilter(agent=BATCH), before=before, limit=limit + 1, seen=mark_in(http))
        tasks = await pool.results.several(found[:limit])
        page = [told(task, cancelling_at=await cancelling_at(task)) for task in tasks]
        ids = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return json_reply({"object": "list", "data": page, "has_more": len(found) > limit, **ids})

    async def one(http: HttpRequest) -> Response:
        seen = mark_in(http)
        return await now(await wanted(http, seen), seen)

    async def cancel(http: HttpRequest) -> Response:
        task = await wanted(http)
        status = told(task)["status"]
        if task.status in {TaskStatus.COMPLETED, TaskStatus.FAILED} and status != "cancelled":
            raise Conflict(f"The batch job is {status} already; there is nothing to cancel.")
        tenant = task.draft.tenant
        if task.progress and not task.status.is_end:
            at = int(datetime.now(UTC).timestamp())
            await call_off(store, pool.messages, task, by=caller_of(http).key_id, at=at)
            return await now(await store.get(tenant, task.id) or task)
        cancelled = await store.cancel(tenant, task.id) or task
        if cancelled.status is TaskStatus.CANCELLED:
            await forget_parts(pool.objects, tenant, uuid_of(task.id).hex)
        return await now(cancelled)

    async def wanted(http: HttpRequest, seen: Mark | None = None) -> Task:
        """The batch job in the address. Raises `NotFound`, also for one of another tenant."""
        tenant, asked = _submitter(http).tenant, http.path_params["batch_id"]
        task = await store.get(tenant, task_id, seen=seen) if (task_id := _task_id(asked)) else None
        if task is None or task.draft.agent != BATCH:
            raise NotFound(f"No batch job is {asked[:64]!r} here; `GET /v1/batches` lists those that are.")
        return await pool.results.whole(task)

    async def now(task: Task, seen: Mark | None = None) -> Response:
        """The batch job with what its chunks have done by now."""
        chunks = []
        if not (task.status.is_end and task.result) and task.progress:
            which = TaskFilter(agent=BATCH_CHUNK, parent=task.id)
            chunks = list(await store.page(task.draft.tenant, which, limit=MAX_CHUNKS, seen=seen))
        done = [_read(chunk.result or chunk.progress, ChunkDone) for chunk in chunks]
        return json_reply(told(task, done, cancelling_at=await cancelling_at(task)))

    async def cancelling_at(task: Task) -> int | None:
        """When one that is not over was called off."""
        return await asked_at(pool.messages, task) if task.progress and not task.status.is_end else None

    return [
        resource("/v1/batches", GET=listed, POST=create),
        resource("/v1/batches/{batch_id}", GET=one),
        Address("/v1/batches/{batch_id}/cancel", cancel, methods=["POST"]),
    ]


async def _check_file(files: FileStore, tenant: str, file_id: str) -> None:
    """Raises `BadRequest` where the tenant has no such file, or keeps it for something else."""
    file = await files.get(tenant, file_id)
    if file is None:
        raise BadRequest(
            f"input_file_id named {file_id}, which is no file here. Upload it first.", where="input_file_id"
        )
    if file.purpose != PURPOSE:
        raise BadRequest(
            f"input_file_id named {file.id}, whose purpose is `{file.purpose}`. Upload the lines as `{PURPOSE}`.",
            where="input_file_id",
        )


def told(task: Task, chunks: Sequence[ChunkDone] = (), *, cancelling_at: int | None = None) -> dict[str, Any]:
    """A batch job in OpenAI's form; how many lines are done by now is known from its chunks."""
    job = _job(task)
    progress, result = _progress(task), _read(task.result, BatchResult)
    status = "cancelling" if cancelling_at else _status(task, progress, result)
    counts = {
        "total": result.total or progress.total,
        "completed": result.completed or sum(chunk.completed for chunk in chunks),
        "failed": result.failed or sum(chunk.failed for chunk in chunks),
    }
    errors, is_cancelled = _errors(task, result), status == "cancelled"
    created_at = int(task.created_at.timestamp())
    return {
        "id": BATCH_PREFIX + uuid_of(task.id).hex,
        "object": "batch",
        "endpoint": job.endpoint,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": job.input_file_id,
        "completion_window": job.completion_window,
        "status": status,
        "output_file_id": result.output_file_id,
        "error_file_id": result.error_file_id,
        "created_at": created_at,
        "expires_at": created_at + WINDOW_S,
        "in_progress_at": result.in_progress_at or progress.in_progress_at,
        "finalizing_at": result.finalizing_at or progress.finalizing_at,
        "cancelling_at": cancelling_at or result.cancelling_at or (_seconds(task.ended_at) if is_cancelled else None),
        **{f"{end}_at": _seconds(task.ended_at) if status == end else None for end in _ENDS},
        "request_counts": counts,
        "metadata": job.metadata,
        "model": result.model or progress.model,
        "usage": _usage(result) if task.status is TaskStatus.COMPLETED else None,
    }


_ENDS = ("completed", "failed", "expired", "cancelled")


def _status(task: Task, progress: BatchProgress, result: BatchResult) -> str:
    if task.status is TaskStatus.CANCELLED:
        return "cancelled"
    if task.status is TaskStatus.FAILED:
        return "expired" if task.reason is FailureReason.DEADLINE else "failed"
    if task.status is TaskStatus.COMPLETED:
        if result.errors:
            return "failed"
        if result.cancelling_at:
            return "cancelled"
        return "expired" if result.is_expired else "completed"
    return "cancelling" if task.is_cancelling else progress.stage


def _errors(task: Task, result: BatchResult) -> list[Complaint]:
    if task.status is TaskStatus.FAILED:
        code = FailureReason.ERROR if task.reason is None else task.reason
        return [Complaint(code=code.value, message=task.error or "The batch job was given up.")]
    return result.errors


def _usage(result: BatchResult) -> dict[str, Any]:
    return {
        "input_tokens": result.input_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": result.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": result.input_tokens + result.output_tokens,
    }


def _job(task: Task) -> BatchJob:
    try:
        return _JOB.decode(task.draft.input)
    except msgspec.ValidationError:  # another agent asked for it, and wrongly; it has failed, or will
        return BatchJob(input_file_id="", endpoint="")


def _progress(task: Task) -> BatchProgress:
    return (
        msgspec.json.decode(task.progress, type=BatchProgress) if task.progress else BatchProgress(stage="validating")
    )


def _read(text: str, kind: type[Any]) -> Any:
    return msgspec.json.decode(text, type=kind) if text else kind()


def _check(job: BatchJob) -> None:
    if job.endpoint not in ENDPOINTS:
        raise BadRequest(
            f"endpoint must be one of {', '.join(ENDPOINTS)}; others are not answered in batch jobs.", where="endpoint"
        )
    if job.completion_window != WINDOW:
        raise BadRequest(f"completion_window must be `{WINDOW}`.", where="completion_window")


def _task_id(batch_id: str) -> str:
    """The id of its task; empty for what is no id of a batch job."""
    task_id = PREFIX + batch_id.removeprefix(BATCH_PREFIX)
    return task_id if batch_id.startswith(BATCH_PREFIX) and is_task_id(task_id) else ""


def _submitter(http: HttpRequest) -> Submitter:
    """On whose behalf. Raises `Forbidden` for keys that may not ask models for anything."""
    for_inference(http)
    caller = caller_of(http)
    return Submitter(tenant=caller.tenant, user=caller.key_id, priority=caller.priority, may_rise=caller.is_admin)


def _seconds(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())
