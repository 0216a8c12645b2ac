"""
Answers that caches may keep: which, for how long, and how a client that has one is told that it is still good.

Three kinds there are. What is the same for everybody is public. Lists depend on who asks, so only the asker's own
cache may have them, and it asks each time whether they changed. All else is `no-store`, which the connection adds.

Tags are weak: an answer has the same one in every content coding.
"""

from __future__ import annotations

import hashlib
import re

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

PUBLIC = "public, max-age=300, stale-while-revalidate=60"
"""Good for five minutes, and one more while the cache asks anew."""
FOREVER = "public, max-age=31536000, immutable"
"""For addresses that hold the digest of what is there."""
PRIVATE = "private, no-cache"
PUBLIC_VARY = "Accept, Authorization"
PRIVATE_VARY = "Authorization, X-Api-Key"

_TAG = re.compile(r'(?:W/)?"([^"]*)"')


def public_reply(
    http: HttpRequest,
    body: bytes,
    media_type: str,
    *,
    cache_control: str = PUBLIC,
    vary: str = PUBLIC_VARY,
    headers: dict[str, str] | None = None,
) -> Response:
    """What is the same for everybody; 304 for who has it. Never for an answer that depends on who asks."""
    return _tagged(http, body, media_type, {"cache-control": cache_control, "vary": vary, **(headers or {})})


def private_reply(http: HttpRequest, value: object) -> Response:
    """JSON that depends on who asks; 304 where it is as the asker has it."""
    body = msgspec.json.encode(value)
    return _tagged(http, body, "application/json", {"cache-control": PRIVATE, "vary": PRIVATE_VARY})


def tag_of(body: bytes) -> str:
    """The `ETag` of an answer."""
    return f'W/"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'


def has_tag(if_none_match: str, tag: str) -> bool:
    """Whether the client has the answer with this tag, by the weak comparison of RFC 9110, section 8.8.3.2."""
    wanted = _TAG.fullmatch(tag)
    return if_none_match.strip() == "*" or (wanted is not None and wanted[1] in _TAG.findall(if_none_match))


def _tagged(http: HttpRequest, body: bytes, media_type: str, headers: dict[str, str]) -> Response:
    tag = tag_of(body)
    headers = {**headers, "etag": tag}
    if has_tag(http.headers.get("if-none-match", ""), tag):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=media_type, headers=headers)
