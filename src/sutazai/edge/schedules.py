"""`/v1/schedules`: tasks that are submitted again and again."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from sutazai.core.errors import BadRequest, NotFound
from sutazai.core.request import Priority
from sutazai.core.schedule import Schedule, schedule_uuid
from sutazai.core.task import TaskDraft
from sutazai.edge.admin_shapes import Body, PriorityName
from sutazai.edge.marks import mark_in
from sutazai.edge.pool import Pool
from sutazai.edge.replies import Address, body_as, json_reply, resource
from sutazai.edge.task_shapes import NO_NUL
from sutazai.edge.tasks import page_size, submitter
from sutazai.tasks.submit import Wanted


class ScheduleBody(Body, frozen=True):
    """A schedule to be made, or to be put in the place of another."""

    cron: Annotated[str, Meta(max_length=200)]
    agent: Annotated[str, Meta(min_length=1, max_length=200, pattern=NO_NUL)]
    timezone: Annotated[str, Meta(max_length=64)] = "UTC"
    input: msgspec.Raw = msgspec.Raw(b"{}")
    priority: PriorityName | None = None
    webhook: Annotated[str, Meta(max_length=2048)] | None = None
    max_attempts: Annotated[int, Meta(ge=1)] | None = None
    time_limit_s: Annotated[float, Meta(gt=0)] | None = None
    budget_tokens: Annotated[int, Meta(ge=1)] | None = None

    def wanted(self) -> Wanted:
        """The task of each time."""
        return Wanted(
            agent=self.agent,
            input=bytes(self.input),
            priority=None if self.priority is None else Priority[self.priority.upper()],
            webhook=self.webhook or "",
            max_attempts=self.max_attempts,
            time_limit_s=self.time_limit_s,
            budget_tokens=self.budget_tokens,
        )


_SCHEDULE = msgspec.json.Decoder(ScheduleBody)


def routes(pool: Pool) -> list[Address]:
    """All schedules, and one of them."""
    store = pool.schedules

    async def add(http: HttpRequest) -> Response:
        body, draft = await wanted(http)
        return json_reply(_told(await pool.recurring.add(body.cron, body.timezone, draft)), status=201)

    async def put(http: HttpRequest) -> Response:
        body, draft = await wanted(http)
        schedule_id = http.path_params["schedule_id"]
        return json_reply(_told(await pool.recurring.replace(schedule_id, body.cron, body.timezone, draft)))

    async def wanted(http: HttpRequest) -> tuple[ScheduleBody, TaskDraft]:
        by = submitter(http)
        body = await body_as(http, _SCHEDULE)
        return body, pool.submission.draft(body.wanted(), by)

    async def listed(http: HttpRequest) -> Response:
        tenant = submitter(http).tenant
        limit = page_size(http.query_params.get("limit"))
        after = http.query_params.get("after", "")
        if after and schedule_uuid(after) is None:
            raise BadRequest("after was no id of a schedule.", where="after")
        found = await store.page(tenant, after=after, limit=limit + 1, seen=mark_in(http))
        page = list(map(_told, found[:limit]))
        last_id = page[-1]["id"] if page else None
        return json_reply({"object": "list", "data": page, "has_more": len(found) > limit, "last_id": last_id})

    async def one(http: HttpRequest) -> Response:
        schedule_id = http.path_params["schedule_id"]
        schedule = await store.get(submitter(http).tenant, schedule_id)
        if schedule is None:
            raise _not_found(schedule_id)
        return json_reply(_told(schedule))

    async def delete(http: HttpRequest) -> Response:
        schedule_id = http.path_params["schedule_id"]
        if not await store.delete(submitter(http).tenant, schedule_id):
            raise _not_found(schedule_id)
        return json_reply({"id": schedule_id, "object": "schedule.deleted", "deleted": True})

    return [
        resource("/v1/schedules", GET=listed, POST=add),
        resource("/v1/schedules/{schedule_id}", GET=one, PUT=put, DELETE=delete),
    ]


def _not_found(schedule_id: str) -> NotFound:
    return NotFound(f"No schedule is {schedule_id[:64]!r} here; `GET /v1/schedules` lists those that are.")


def _told(schedule: Schedule) -> dict[str, Any]:
    draft = schedule.draft
    return {
        "id": schedule.id,
        "object": "schedule",
        "cron": schedule.cron,
        "timezone": schedule.timezone,
        "agent": draft.agent,
        "input": msgspec.Raw(draft.input.encode()),
        "priority": draft.priority.name.lower(),
        "webhook": draft.webhook or None,
        "max_attempts": draft.max_attempts,
        "time_limit_s": draft.time_limit_s,
        "budget_tokens": draft.budget_tokens,
        "created_at": schedule.created_at,
        "due_at": schedule.due_at,
        "last_due_at": schedule.last_due_at,
        "last_task": schedule.last_task or None,
        "last_error": schedule.last_error or None,
    }
