"""Errors as clients see them: the one table of status codes, and the form of each dialect."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sutazai.core import errors
from sutazai.core.request import Dialect
from sutazai.dialects.errors import error_body

STATUSES: dict[type[errors.SutazaiError], tuple[int, str]] = {
    errors.UnknownModel: (404, "not_found_error"),
    errors.WrongMethod: (405, "invalid_request_error"),
    errors.TooLarge: (413, "invalid_request_error"),
    errors.BadRequest: (400, "invalid_request_error"),
    errors.Unauthorized: (401, "authentication_error"),
    errors.Forbidden: (403, "permission_error"),
    errors.Misdirected: (421, "invalid_request_error"),
    errors.NotFound: (404, "not_found_error"),
    errors.Conflict: (409, "conflict_error"),
    errors.Overloaded: (503, "overloaded_error"),
    errors.BudgetSpent: (429, "insufficient_quota"),
    errors.RateLimited: (429, "rate_limit_error"),
    errors.FellBehind: (503, "overloaded_error"),
    errors.NoHealthyNode: (503, "overloaded_error"),
    errors.ShuttingDown: (503, "overloaded_error"),
    errors.StoreUnavailable: (503, "api_error"),
    errors.Cancelled: (499, "cancelled"),
    errors.NodeTimeout: (504, "timeout_error"),
    errors.NodeFault: (502, "api_error"),
    errors.SutazaiError: (500, "api_error"),
}
"""Looked up along the class's own line of descent, so the nearest entry counts."""

CLIENT_LEFT = 499
"""What the log says of a request whose client went away; nobody receives it."""


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error ready to be sent."""

    status: int
    kind: str
    body: bytes
    retry_after_s: int | None


def status_of(error: errors.SutazaiError) -> tuple[int, str]:
    """
    The status and the `type` of an error.

    A node's own refusal of the request keeps its status; its failures become a gateway's (502), so that a 500 always
    means a mistake of ours.
    """
    if isinstance(error, errors.NodeRejected):
        return _rejected(error.status)
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def _rejected(status: int) -> tuple[int, str]:
    if status in {429, 503}:
        return status, "overloaded_error"
    if status in {401, 403}:  # the node did not accept the gateway's key: not the client's fault
        return 502, "api_error"
    if 400 <= status < 500:
        return status, "not_found_error" if status == 404 else "invalid_request_error"
    return (400, "invalid_request_error") if status == 501 else (502, "api_error")


def answer_to(error: errors.SutazaiError, dialect: Dialect, status: int | None = None) -> ErrorAnswer:
    """The whole answer to a request that failed before anything was said; `status` where its own is not meant."""
    own_status, kind = status_of(error)
    status = status or own_status
    retry_after_s = getattr(error, "retry_after_s", None)
    where = getattr(error, "where", None)
    return ErrorAnswer(
        status,
        kind,
        error_body(dialect, status, error.message, kind=kind, where=where),
        max(1, math.ceil(retry_after_s)) if retry_after_s else None,
    )
