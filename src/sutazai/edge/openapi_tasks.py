"""The description of `/v1/tasks`, `/v1/schedules` and `/v1/agents`."""

from __future__ import annotations

from sutazai.edge.openapi_words import ANYTHING, PRIORITY, Schema, at, body, created, get, in_path, in_query, json_body
from sutazai.tasks.submit import MAX_AFTER, MAX_ATTEMPTS, MAX_BUDGET_TOKENS, MAX_TIME_LIMIT_S

STATUS: Schema = {"enum": ["pending", "waiting", "processing", "completed", "failed", "cancelled"]}
TASK_ID: Schema = {"type": "string", "pattern": "^task_[0-9a-f]{32}$"}
MOMENT: Schema = {"type": ["string", "null"], "format": "date-time"}
PRINTABLE: Schema = {"type": ["string", "null"], "maxLength": 255, "pattern": "^[ -~]*$"}
TASK_BODY: Schema = body(
    ["agent"],
    agent={"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[ -~]+$", "examples": ["echo"]},
    input={
        "type": "object",
        "description": "As the agent wants it: `GET /v1/agents`.",
        "properties": {"text": {"type": "string"}},
    },
    priority={"enum": [None, *PRIORITY["enum"]]},
    run_at=MOMENT,
    deadline=MOMENT,
    idempotency_key=PRINTABLE,
    parent={"anyOf": [{"type": "null"}, TASK_ID]},
    after={"type": ["array", "null"], "items": TASK_ID, "maxItems": MAX_AFTER},
    webhook={"type": ["string", "null"], "format": "uri", "maxLength": 2048},
    max_attempts={"type": ["integer", "null"], "minimum": 1, "maximum": MAX_ATTEMPTS},
    time_limit_s={"type": ["number", "null"], "minimum": 0.001, "maximum": MAX_TIME_LIMIT_S},
    budget_tokens={"type": ["integer", "null"], "minimum": 1, "maximum": MAX_BUDGET_TOKENS},
)
TASK: Schema = body(
    ["id", "object", "agent", "status", "priority", "version", "created_at"],
    id=TASK_ID,
    status=STATUS,
    version={"type": "integer"},
)
_TASK_FIELDS = TASK_BODY["properties"]
SCHEDULE_BODY: Schema = body(
    ["cron", "agent"],
    cron={"type": "string", "maxLength": 200, "examples": ["0 0 1 1 *"]},
    timezone={"type": "string", "maxLength": 64, "examples": ["UTC"]},
    **{
        name: _TASK_FIELDS[name]
        for name in ("agent", "input", "priority", "webhook", "max_attempts", "time_limit_s", "budget_tokens")
    },
)
SCHEDULE: Schema = body(["id", "object", "cron", "timezone", "agent", "due_at"], id={"type": "string"})
AGENT: Schema = body(
    ["name", "description", "input_schema", "output_schema"],
    input_schema={"type": ["object", "boolean"]},
    output_schema={"type": ["object", "boolean"]},
)
EVENTS: Schema = {
    "type": "object",
    "description": "Server-sent events with the version of the task as `id`; they end when the task does.",
    "required": ["data"],
    "properties": {"data": {"type": "string"}},
}
ONE = "/v1/tasks/{task_id}"


def task_paths() -> Schema:
    """Tasks, their events, and agents."""
    listed = get("tasks", body(["object", "data", "has_more"], data={"type": "array", "items": TASK}))
    listed["parameters"] = [
        in_query("status", STATUS),
        in_query("agent", {"type": "string"}),
        in_query("parent", TASK_ID),
        in_query("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
        in_query("after", TASK_ID),
    ]
    agents = get("agents", body(["object", "data"], data={"type": "array", "items": AGENT}))
    paths: Schema = {
        "/v1/tasks": {"get": listed, "post": _accepted(created("submit_task", TASK, TASK_BODY), "201")},
        ONE: {
            "get": at("task_id", get("task", TASK)),
            "delete": at("task_id", get("cancel_task", TASK)),
        },
        f"{ONE}/retry": {"post": at("task_id", _accepted(get("retry_task", TASK), "200"))},
        f"{ONE}/events": {"get": _events()},
        "/v1/agents": {"get": agents},
        "/v1/webhooks/secret": {"get": get("webhook_secret", body(["object", "secret"], secret={"type": "string"}))},
    }
    paths |= _schedule_paths()
    for operations in paths.values():
        for operation in operations.values():
            operation["tags"] = ["tasks"]
    return paths


def _schedule_paths() -> Schema:
    listed = get("schedules", body(["object", "data", "has_more"], data={"type": "array", "items": SCHEDULE}))
    listed["parameters"] = [
        in_query("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
        in_query("after", {"type": "string"}),
    ]
    replaced = get("replace_schedule", SCHEDULE) | {"requestBody": json_body(SCHEDULE_BODY)}
    deleted = get("delete_schedule", body(["id", "deleted"], deleted={"const": True}))
    return {
        "/v1/schedules": {"get": listed, "post": created("add_schedule", SCHEDULE, SCHEDULE_BODY)},
        "/v1/schedules/{schedule_id}": {
            "get": at("schedule_id", get("schedule", SCHEDULE)),
            "put": at("schedule_id", replaced),
            "delete": at("schedule_id", deleted),
        },
    }


def _accepted(operation: Schema, status: str) -> Schema:
    operation["responses"]["202"] = operation["responses"].pop(status)
    return operation


def _events() -> Schema:
    operation = get("task_events", ANYTHING)
    operation["responses"]["200"]["content"] = {"text/event-stream": {"schema": EVENTS}}
    operation["responses"]["204"] = {"description": "The task has ended, and all was told."}
    last = {"name": "Last-Event-ID", "in": "header", "schema": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}
    return operation | {"parameters": [in_path("task_id"), last]}
