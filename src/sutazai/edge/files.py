"""`/v1/files`: files that clients keep here, in OpenAI's form."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from sutazai.core.errors import BadRequest, Forbidden, NotFound
from sutazai.core.file import File, file_id, is_file_id
from sutazai.dialects.multipart import Part, form_of
from sutazai.edge.marks import mark_in
from sutazai.edge.pool import Pool, caller_of, for_inference
from sutazai.edge.replies import Address, json_reply, resource
from sutazai.ports.objects import object_name

MAX_FILES = 10_000
"""Of one tenant."""
LARGEST_PAGE = 10_000
USUAL_PAGE = 1000
PURPOSE = "batch"
MAX_NAME = 255


def routes(pool: Pool) -> list[Address]:
    """Files and their contents."""
    files, objects = pool.files, pool.objects

    async def create(http: HttpRequest) -> Response:
        tenant = _tenant(http)
        name, content = _upload(form_of(http.headers.get("content-type", ""), await http.body()))
        now = datetime.now(UTC)
        file = File(
            id=file_id(now.timestamp(), secrets.randbits(80)),
            tenant=tenant,
            name=name,
            purpose=PURPOSE,
            size_bytes=len(content),
            created_at=now,
        )
        at = _at(file)
        await objects.put(at, content)  # first: a row without its bytes would be a promise that nobody keeps
        if not await files.add(file, at_most=MAX_FILES):
            await objects.delete(at)
            raise Forbidden(f"The tenant has {MAX_FILES} files already; delete some of them.")
        return json_reply(told(file))

    async def listed(http: HttpRequest) -> Response:
        tenant = _tenant(http)
        query = http.query_params
        limit, after = _limit(query), query.get("after", "")
        if after and not is_file_id(after):
            raise BadRequest("after was no id of a file.", where="after")
        order, purpose = query.get("order", "desc"), query.get("purpose", "")
        if order not in {"asc", "desc"} or "\0" in purpose:
            raise BadRequest("order must be `asc` or `desc`, and purpose a word.", where="order")
        found = await files.page(
            tenant,
            purpose=purpose,
            after=after,
            is_oldest_first=order == "asc",
            limit=limit + 1,
            seen=mark_in(http),
        )
        page = [told(file) for file in found[:limit]]
        ids = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return json_reply({"object": "list", "data": page, "has_more": len(found) > limit, **ids})

    async def one(http: HttpRequest) -> Response:
        return json_reply(told(await wanted(http)))

    async def content(http: HttpRequest) -> Response:
        file = await wanted(http)
        parts = objects.stream(_at(file))
        first = await anext(parts, b"")  # before the head: what is wrong with the store is told by a status
        if http.method == "HEAD" or not first:
            return Response(first, media_type="application/octet-stream")

        async def whole() -> AsyncIterator[bytes]:
            yield first
            async for part in parts:
                yield part

        return StreamingResponse(whole(), media_type="application/octet-stream")

    async def delete(http: HttpRequest) -> Response:
        file = await wanted(http)
        await files.delete(file.tenant, file.id)
        await objects.delete(_at(file))
        return json_reply({"id": file.id, "object": "file", "deleted": True})

    async def wanted(http: HttpRequest) -> File:
        """The file in the address. Raises `NotFound`, also for one of another tenant."""
        tenant, wanted_id = _tenant(http), http.path_params["file_id"]
        file = await files.get(tenant, wanted_id) if is_file_id(wanted_id) else None
        if file is None:
            raise NotFound(f"No file is {wanted_id[:64]!r} here; `GET /v1/files` lists those that are.")
        return file

    return [
        resource("/v1/files", GET=listed, POST=create),
        resource("/v1/files/{file_id}", GET=one, DELETE=delete),
        Address("/v1/files/{file_id}/content", content),
    ]


def told(file: File) -> dict[str, object]:
    """A file in OpenAI's form."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at.timestamp()),
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }


def _at(file: File) -> str:
    return object_name(file.tenant, "files", file.id)


def _tenant(http: HttpRequest) -> str:
    for_inference(http)
    return caller_of(http).tenant


def _upload(form: Mapping[str, Part]) -> tuple[str, bytes]:
    """Name and content of the file in a form. Raises `BadRequest`."""
    purpose, file = form.get("purpose"), form.get("file")
    if purpose is None or purpose.content != PURPOSE.encode():
        raise BadRequest(f"purpose must be `{PURPOSE}`; files are kept for nothing else.", where="purpose")
    if file is None or not file.filename:
        raise BadRequest("file was missing, or had no name. Send one file with its `filename`.", where="file")
    if len(file.filename) > MAX_NAME or not file.filename.isprintable():
        raise BadRequest(f"The file's name must be at most {MAX_NAME} printable characters.", where="file")
    return file.filename, file.content


def _limit(query: Mapping[str, str]) -> int:
    given = query.get("limit")
    if given is None:
        return USUAL_PAGE
    if not (given.isascii() and given.isdigit() and len(given) < 6 and 0 < int(given) <= LARGEST_PAGE):
        raise BadRequest(f"limit must be a whole number from 1 to {LARGEST_PAGE}.", where="limit")
    return int(given)
