"""`/v1/tasks` and `/v1/agents`: durable work for agents, watched while it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from sutazai.core.errors import BadRequest, NotFound
from sutazai.core.identity import Scope
from sutazai.core.mark import Mark
from sutazai.core.task import Task, TaskStatus, is_task_id
from sutazai.dialects.complaints import decoded
from sutazai.edge.auth import Caller
from sutazai.edge.direct import Handler, Reply
from sutazai.edge.events import EVENT_STREAM, EventReply
from sutazai.edge.incoming import Incoming
from sutazai.edge.marks import check_mark, mark_in, written
from sutazai.edge.pool import Pool, caller_of
from sutazai.edge.replies import JSON, Address, json_reply, resource
from sutazai.edge.task_shapes import TaskBody, told_briefly, told_task
from sutazai.ports.agent import Agent
from sutazai.ports.tasks import TaskFilter
from sutazai.tasks.submit import Submitter
from sutazai.tasks.webhooks import tenant_secret

USUAL_PAGE = 20
LARGEST_PAGE = 100
MAX_VERSION = 2**31 - 1
_TASK = msgspec.json.Decoder(TaskBody)


def routes(pool: Pool) -> list[Address]:
    """Tasks, their events, and the agents that do them."""
    store = pool.tasks
    described: list[dict[str, Any]] = []

    async def listed(http: HttpRequest) -> Response:
        tenant = submitter(http).tenant
        query = http.query_params
        limit = page_size(query.get("limit"))
        found = await store.page(
            tenant, _filter(query), before=_id_in(query, "after"), limit=limit + 1, seen=mark_in(http)
        )
        page = [told_briefly(task) for task in found[:limit]]
        last_id = page[-1]["id"] if page else None
        return json_reply({"object": "list", "data": page, "has_more": len(found) > limit, "last_id": last_id})

    async def one(http: HttpRequest) -> Response:
        return await told(await wanted(http, mark_in(http)))

    async def cancel(http: HttpRequest) -> Response:
        task_id = http.path_params["task_id"]
        return await told(_there(await store.cancel(submitter(http).tenant, task_id), task_id))

    async def retry(http: HttpRequest) -> Response:
        task_id = http.path_params["task_id"]
        return await told(_there(await store.requeue(submitter(http).tenant, task_id), task_id), status=202)

    async def events(http: HttpRequest) -> Response:
        seen = _last_event(http.headers.get("last-event-id", ""))
        task = await wanted(http)
        if seen >= task.version and task.status.is_end:
            return Response(status_code=204)  # all was told; a browser comes back until it is answered so
        if http.method == "HEAD":
            return Response(media_type=EVENT_STREAM.decode())
        seen = min(seen, task.version)
        return EventReply(task, store, pool.watch, pool.marks, seen=seen, keep_alive_s=pool.keep_alive_s())

    async def told(task: Task, *, status: int = 200) -> Response:
        return json_reply(told_task(await pool.results.whole(task)), status=status)

    async def wanted(http: HttpRequest, seen: Mark | None = None) -> Task:
        """The task in the address. Raises `NotFound`, also for one of another tenant."""
        task_id = http.path_params["task_id"]
        return _there(await store.get(submitter(http).tenant, task_id, seen=seen), task_id)

    async def secret(http: HttpRequest) -> Response:
        tenant = submitter(http).tenant
        if not pool.webhook_secret:
            raise NotFound("No webhooks are told here: `webhooks.secret` was not set. Set it in the settings.")
        told = {"object": "webhook.secret", "secret": tenant_secret(pool.webhook_secret, tenant)}
        return json_reply(told)

    async def agents(http: HttpRequest) -> Response:
        submitter(http)
        if not described:
            found = pool.submission.agents
            described.extend(_told_agent(found[name]) for name in sorted(found) if not found[name].is_internal)
        return json_reply({"object": "list", "data": described})

    return [
        resource("/v1/tasks", also=("POST",), GET=listed),
        resource("/v1/tasks/{task_id}", GET=one, DELETE=cancel),
        Address("/v1/tasks/{task_id}/retry", retry, methods=["POST"]),
        Address("/v1/tasks/{task_id}/events", events),
        Address("/v1/agents", agents),
        Address("/v1/webhooks/secret", secret),
    ]


def direct(pool: Pool) -> Mapping[tuple[bytes, bytes], Handler]:
    """What is asked most: submissions."""

    async def submit(incoming: Incoming, body: bytes) -> Reply:
        by = submitter_of(incoming.caller)
        headers = incoming.headers
        check_mark(headers)
        wanted = decoded(_TASK, body).wanted(header_key=headers.get(b"idempotency-key", b"").decode("latin-1"))
        task = await pool.submission.submit(wanted, by)
        told = msgspec.json.encode(told_task(await pool.results.whole(task)))
        location = (b"location", b"/v1/tasks/%b" % task.id.encode())
        return Reply(202, (JSON, location, *await written(pool.marks, by.tenant)), told)

    return {(b"POST", b"/v1/tasks"): submit}


def submitter(http: HttpRequest) -> Submitter:
    """On whose behalf this is. Raises `Forbidden` for keys that may have no tasks."""
    return submitter_of(caller_of(http))


def submitter_of(caller: Caller) -> Submitter:
    """The same for a caller."""
    caller.needs(Scope.TASKS)
    return Submitter(tenant=caller.tenant, user=caller.key_id, priority=caller.priority, may_rise=caller.is_admin)


def page_size(given: str | None) -> int:
    """The `limit` of a list. Raises `BadRequest`."""
    if given is None:
        return USUAL_PAGE
    if not (given.isascii() and given.isdigit() and len(given) < 4 and 0 < int(given) <= LARGEST_PAGE):
        raise BadRequest(f"limit must be a whole number from 1 to {LARGEST_PAGE}.", where="limit")
    return int(given)


def _filter(query: Mapping[str, str]) -> TaskFilter:
    status, agent = query.get("status", ""), query.get("agent", "")
    known = [one.value for one in TaskStatus]
    if status and status not in known:
        raise BadRequest(f"status must be one of {', '.join(known)}.", where="status")
    if "\0" in agent:
        raise BadRequest("agent was no name of an agent.", where="agent")
    return TaskFilter(status=TaskStatus(status) if status else None, agent=agent, parent=_id_in(query, "parent"))


def _id_in(query: Mapping[str, str], name: str) -> str:
    given = query.get(name, "")
    if given and not is_task_id(given):
        raise BadRequest(f"{name} was no id of a task.", where=name)
    return given


def _last_event(given: str) -> int:
    """The version that a client has seen; 0 where it is new here."""
    if not given:
        return 0
    if not (given.isascii() and given.isdigit() and len(given) <= 10 and int(given) <= MAX_VERSION):
        raise BadRequest("The header `Last-Event-ID` was no number of an event. Leave it out to begin anew.")
    return int(given)


def _there(task: Task | None, task_id: str) -> Task:
    if task is None:
        raise NotFound(f"No task is {task_id[:64]!r} here; `GET /v1/tasks` lists those that are.")
    return task


def _told_agent(agent: Agent) -> dict[str, Any]:
    return {
        "name": agent.name,
        "object": "agent",
        "description": agent.describes,
        "capabilities": sorted(agent.capabilities),
        "input_schema": msgspec.json.schema(agent.input_type),
        "output_schema": msgspec.json.schema(agent.output_type),
        "max_attempts": agent.max_attempts,
        "time_limit_s": agent.time_limit_s,
    }
