"""`/admin/audit` and `/admin/usage`: who changed what, and who took what."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from sutazai.core.errors import BadRequest
from sutazai.edge.pool import Pool, for_admins
from sutazai.edge.replies import Address, json_reply

DEFAULT_ENTRIES = 100
MAX_ENTRIES = 1000
LAST_NUMBER = 2**63 - 1
USAGE_HOURS = 24


def routes(pool: Pool) -> list[Address]:
    """Both records."""

    async def audit(http: HttpRequest) -> Response:
        for_admins(http)
        limit = _whole(http, "limit", DEFAULT_ENTRIES, MAX_ENTRIES)
        before = _whole(http, "before", LAST_NUMBER, LAST_NUMBER)
        entries = await pool.audit.newest(limit=limit, before=before)
        is_more = len(entries) == limit and entries[-1].number > 1
        told = [entry.plain() for entry in entries]
        return json_reply({"entries": told, "next_before": entries[-1].number if is_more else None})

    async def usage(http: HttpRequest) -> Response:
        for_admins(http)
        since = _time(http, "since", datetime.now(UTC) - timedelta(hours=USAGE_HOURS))
        return json_reply({"since": since, "usage": await pool.usage.total(since=since)})

    return [Address("/admin/audit", audit), Address("/admin/usage", usage)]


def _whole(http: HttpRequest, name: str, default: int, most: int) -> int:
    """A whole number of the query, from 1 on. Raises `BadRequest`."""
    text = http.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and 1 <= int(text) <= most):
        raise BadRequest(f"{name} must be a whole number from 1 to {most}.", where=name)
    return int(text)


def _time(http: HttpRequest, name: str, default: datetime) -> datetime:
    """A time of the query in RFC 3339. Raises `BadRequest`."""
    text = http.query_params.get(name)
    if text is None:
        return default
    try:
        time = msgspec.convert(text.replace(" ", "+"), datetime)  # an unescaped `+` of a zone arrives as a space
        return time.astimezone(UTC) if time.tzinfo is not None else time.replace(tzinfo=UTC)
    except (msgspec.ValidationError, OverflowError) as error:  # the latter for the first and the last day there is
        raise BadRequest(f"{name} must be a time such as 2026-01-31T00:00:00Z.", where=name) from error
