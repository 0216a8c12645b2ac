"""What a client can ask for beside the body: its place in line, its patience, its conversation, fresh answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sutazai.core.errors import BadRequest
from sutazai.core.request import Priority, Request

PRIORITY = b"x-sutazai-priority"
DEADLINE = b"x-sutazai-deadline-s"
SESSION = b"x-sutazai-session"
CACHE_CONTROL = b"cache-control"
HEADERS = frozenset({PRIORITY, DEADLINE, SESSION, CACHE_CONTROL})

MAX_DEADLINE_S = 86_400.0
MAX_SESSION_BYTES = 256

_PRIORITIES = {priority.name.lower().encode(): priority for priority in Priority}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the headers of a request ask for. Connections that repeat a head repeat them too."""

    priority: Priority | None = None
    deadline_s: float | None = None
    """From the arrival of the request on."""
    conversation: bytes = b""
    cache_control: bytes = b""

    def apply(self, request: Request, *, may_rise: bool) -> None:
        """Write them into the request; its priority is raised only where the caller may do so."""
        if self.priority is not None and (may_rise or self.priority > request.priority):
            request.priority = self.priority
        if self.deadline_s is not None:
            request.deadline_at = request.arrived_at + self.deadline_s
        request.conversation = self.conversation
        request.cache_control = self.cache_control


def wishes_in(headers: Mapping[bytes, bytes]) -> Wishes | None:
    """The wishes of a head, or None where it has none. Raises `BadRequest` for those that cannot be understood."""
    if HEADERS.isdisjoint(headers):
        return None
    return Wishes(
        priority=_priority(headers.get(PRIORITY)),
        deadline_s=_deadline_s(headers.get(DEADLINE)),
        conversation=_conversation(headers.get(SESSION, b"")),
        cache_control=headers.get(CACHE_CONTROL, b"").lower(),
    )


def _priority(value: bytes | None) -> Priority | None:
    if value is None:
        return None
    priority = _PRIORITIES.get(value.strip().lower())
    if priority is None:
        raise BadRequest(f"The header `{PRIORITY.decode()}` was not high, normal or low; send one of these.")
    return priority


def _deadline_s(value: bytes | None) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_DEADLINE_S:
        raise BadRequest(
            f"The header `{DEADLINE.decode()}` was no number of seconds above 0 and up to {MAX_DEADLINE_S:g}; "
            "send how long you can wait."
        )
    return seconds


def _conversation(value: bytes) -> bytes:
    if len(value) > MAX_SESSION_BYTES:
        raise BadRequest(f"The header `{SESSION.decode()}` was longer than {MAX_SESSION_BYTES} bytes; shorten it.")
    return value
