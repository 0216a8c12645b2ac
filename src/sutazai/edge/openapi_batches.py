"""The description of `/v1/batches`."""

from __future__ import annotations

from sutazai.agents.batch_shapes import WINDOW
from sutazai.edge.openapi_files import FILE_ID
from sutazai.edge.openapi_words import Schema, at, body, get, in_query, json_body
from sutazai.ports.agent import ENDPOINTS

BATCH_ID: Schema = {"type": "string", "pattern": "^batch_[0-9a-f]{32}$"}
SECONDS: Schema = {"type": ["integer", "null"]}
STATUS: Schema = {
    "enum": [
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    ]
}
BATCH_BODY: Schema = body(
    ["input_file_id", "endpoint"],
    input_file_id=FILE_ID,
    endpoint={"enum": list(ENDPOINTS)},
    completion_window={"enum": [WINDOW]},
    metadata={
        "type": ["object", "null"],
        "maxProperties": 16,
        "propertyNames": {"type": "string", "minLength": 1, "maxLength": 64, "pattern": "^[a-z0-9-]+$"},
        "additionalProperties": {"type": "string", "maxLength": 512, "pattern": "^[^\\x00]*$"},
    },
)
COUNT: Schema = {"type": "integer", "minimum": 0}
BATCH: Schema = body(
    ["id", "object", "endpoint", "input_file_id", "completion_window", "status", "created_at", "request_counts"],
    id=BATCH_ID,
    object={"const": "batch"},
    endpoint={"type": "string"},
    input_file_id=FILE_ID,
    status=STATUS,
    created_at={"type": "integer"},
    completed_at=SECONDS,
    request_counts=body(["total", "completed", "failed"], total=COUNT, completed=COUNT, failed=COUNT),
    output_file_id={"anyOf": [{"type": "null"}, FILE_ID]},
    error_file_id={"anyOf": [{"type": "null"}, FILE_ID]},
)


def batch_paths() -> Schema:
    """Batch jobs."""
    listed = get("batches", body(["object", "data", "has_more"], data={"type": "array", "items": BATCH}))
    listed["parameters"] = [
        in_query("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
        in_query("after", BATCH_ID),
    ]
    create = get("create_batch", BATCH) | {"requestBody": json_body(BATCH_BODY)}
    one = "/v1/batches/{batch_id}"
    return {
        "/v1/batches": {"get": listed, "post": create},
        one: {"get": at("batch_id", get("batch", BATCH))},
        f"{one}/cancel": {"post": at("batch_id", get("cancel_batch", BATCH))},
    }
