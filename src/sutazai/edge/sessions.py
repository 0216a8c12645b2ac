"""
`/v1/sessions`: conversations that the platform keeps.

Below a session lies the address of OpenAI's chat, so a client of OpenAI talks within a session when its base address
is the session's. What is sent there are the new messages alone.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Annotated, Any, cast

import msgspec
from msgspec import Meta
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sutazai.core.errors import BadRequest, SutazaiError
from sutazai.core.request import Dialect, Endpoint, Head, Request
from sutazai.core.session import Session
from sutazai.dialects.conversation import as_list
from sutazai.dialects.errors import keep_alive, stream_error
from sutazai.dialects.reading import MAX_MODEL_CHARACTERS
from sutazai.edge.errors import status_of
from sutazai.edge.heads import header_pairs
from sutazai.edge.marks import mark_in
from sutazai.edge.pool import Pool, caller_of, for_inference
from sutazai.edge.replies import Address, body_as, json_reply, resource
from sutazai.edge.wishes import Wishes
from sutazai.gateway.sessions import Turn

USUAL_PAGE = 20
LARGEST_PAGE = 100
STREAM_TYPE = b"text/event-stream; charset=utf-8"
NO_NUL = r"^[^\x00]*$"


class Draft(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /v1/sessions`."""

    model: Annotated[str, Meta(min_length=1, max_length=MAX_MODEL_CHARACTERS, pattern=NO_NUL)]
    system: Annotated[str, Meta(pattern=NO_NUL)] | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, Meta(min_length=1, max_length=64, pattern=NO_NUL)],
                Annotated[str, Meta(max_length=512, pattern=NO_NUL)],
            ],
            Meta(max_length=16),
        ]
        | None
    ) = None
    ttl_s: float | None = None


_DRAFT = msgspec.json.Decoder(Draft)


def routes(pool: Pool) -> list[Address]:
    """Sessions, what was said in them, and their turns."""
    sessions = pool.sessions

    async def create(http: HttpRequest) -> Response:
        draft = await body_as(http, _DRAFT)
        session = await sessions.create(
            _tenant(http),
            model=draft.model,
            system=draft.system or "",
            metadata=draft.metadata or {},
            ttl_s=draft.ttl_s,
        )
        return json_reply(_session(session), status=201)

    async def listed(http: HttpRequest) -> Response:
        limit = _page_size(http.query_params.get("limit"))
        before = http.query_params.get("after", "")
        if "\0" in before:
            raise BadRequest("after was no id of a session.", where="after")
        found = await sessions.page(_tenant(http), before=before, limit=limit + 1, seen=mark_in(http))
        page = [_session(session) for session in found[:limit]]
        return json_reply(
            {
                "object": "list",
                "data": page,
                "has_more": len(found) > limit,
                "last_id": page[-1]["id"] if page else None,
            }
        )

    async def one(http: HttpRequest) -> Response:
        return json_reply(_session(await sessions.get(_tenant(http), http.path_params["session_id"])))

    async def delete(http: HttpRequest) -> Response:
        session_id = http.path_params["session_id"]
        await sessions.delete(_tenant(http), session_id)
        return json_reply({"id": session_id, "object": "session.deleted", "deleted": True})

    async def messages(http: HttpRequest) -> Response:
        said = await sessions.messages(_tenant(http), http.path_params["session_id"])
        return Response(as_list([message.body for message in said]), media_type="application/json")

    async def turn(http: HttpRequest) -> Response:
        request = await _request(http, pool.fleet.clock())
        begun = await sessions.ask(http.path_params["session_id"], request)
        return TurnReply(begun, keep_alive_s=pool.keep_alive_s())

    return [
        resource("/v1/sessions", GET=listed, POST=create),
        resource("/v1/sessions/{session_id}", GET=one, DELETE=delete),
        Address("/v1/sessions/{session_id}/messages", messages),
        Address("/v1/sessions/{session_id}/chat/completions", turn, methods=["POST"]),
    ]


class TurnReply(Response):
    """The answer of a turn, which is closed with the reply, however that ends."""

    def __init__(self, turn: Turn, *, keep_alive_s: float) -> None:
        super().__init__()
        self._turn = turn
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises what happened before anything was said."""
        try:
            if self._turn.request.stream:
                await self._stream(send)
            else:
                body = await self._turn.whole()
                head = await self._turn.head()
                await send(_start(head, head.content_type))
                await send({"type": "http.response.body", "body": body})
        finally:
            self._turn.close()

    async def _stream(self, send: Send) -> None:
        began = await self._wait(send)
        try:
            head = await self._turn.head()
            if not began:
                await send(_start(head, head.content_type))
                began = True
            async with aclosing(cast("Any", self._turn.parts())) as parts:
                async for part in parts:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        except SutazaiError as error:
            if not began:
                raise
            status, kind = status_of(error)
            last = stream_error(Dialect.OPENAI, status, error.message, kind)
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _wait(self, send: Send) -> bool:
        """Give signs of life until there is something to say; whether there were any."""
        began = False
        while True:
            try:
                async with asyncio.timeout(self._keep_alive_s):
                    await self._turn.until_part()
            except TimeoutError:
                if not began:
                    await send(_start(Head(200, STREAM_TYPE, None, "", "waiting"), STREAM_TYPE))
                    began = True
                await send({"type": "http.response.body", "body": keep_alive(Dialect.OPENAI), "more_body": True})
            else:
                return began


def _start(head: Head, content_type: bytes) -> dict[str, Any]:
    headers = [
        (b"content-type", content_type),
        (b"x-sutazai-node", head.node.encode()),
        (b"x-sutazai-reason", head.reason.encode()),
        (b"x-sutazai-cache", head.cache),
        *header_pairs(head.extra),
    ]
    return {"type": "http.response.start", "status": head.status, "headers": headers}


async def _request(http: HttpRequest, now: float) -> Request:
    """The turn as a request, without what the session adds. Raises `Forbidden`."""
    caller = caller_of(http)
    request = Request(
        http.scope["state"]["request_id"],
        Endpoint.OPENAI_CHAT,
        "",
        False,
        await http.body(),
        _tenant(http),
        caller.key_id,
        now,
        priority=caller.priority,
        allowance=caller.allowance,
    )
    wishes: Wishes | None = http.scope["state"]["wishes"]
    if wishes is not None:
        wishes.apply(request, may_rise=caller.is_admin)
    return request


def _tenant(http: HttpRequest) -> str:
    """Whose sessions these are. Raises `Forbidden` for keys that may not ask for inference."""
    for_inference(http)
    return caller_of(http).tenant


def _page_size(given: str | None) -> int:
    if given is None:
        return USUAL_PAGE
    if not (given.isascii() and given.isdigit() and len(given) < 4 and 0 < int(given) <= LARGEST_PAGE):
        raise BadRequest(f"limit must be a whole number from 1 to {LARGEST_PAGE}.", where="limit")
    return int(given)


def _session(session: Session) -> dict[str, Any]:
    return {
        "id": session.id,
        "object": "session",
        "model": session.model,
        "system": session.system or None,
        "metadata": session.metadata,
        "ttl_s": session.ttl_s,
        "created_at": int(session.created_at.timestamp()),
        "expires_at": int(session.expires_at.timestamp()),
        "turns": session.version,
        "messages": session.messages,
    }
