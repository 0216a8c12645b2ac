"""The description of `/v1/files`."""

from __future__ import annotations

from sutazai.edge.openapi_words import Schema, at, body, get, in_query

FILE_ID: Schema = {"type": "string", "pattern": "^file-[0-9a-f]{32}$"}
FILE: Schema = body(
    ["id", "object", "bytes", "created_at", "filename", "purpose"],
    id=FILE_ID,
    bytes={"type": "integer"},
    created_at={"type": "integer"},
    filename={"type": "string"},
    purpose={"enum": ["batch", "batch_output"]},
)
UPLOAD: Schema = body(["purpose", "file"], purpose={"enum": ["batch"]}, file={"type": "string", "format": "binary"})


def file_paths() -> Schema:
    """Files and their contents."""
    listed = get("files", body(["object", "data", "has_more"], data={"type": "array", "items": FILE}))
    listed["parameters"] = [
        in_query("limit", {"type": "integer", "minimum": 1, "maximum": 10_000}),
        in_query("after", FILE_ID),
        in_query("order", {"enum": ["asc", "desc"]}),
        in_query("purpose", {"type": "string"}),
    ]
    upload = get("upload_file", FILE)
    upload["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": UPLOAD}}}
    content = get("file_content", FILE)
    content["responses"]["200"]["content"] = {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
    }
    one = "/v1/files/{file_id}"
    return {
        "/v1/files": {"get": listed, "post": upload},
        one: {
            "get": at("file_id", get("file", FILE)),
            "delete": at("file_id", get("delete_file", body(["id", "deleted"], deleted={"const": True}))),
        },
        f"{one}/content": {"get": at("file_id", content)},
    }
