"""What the addresses beside inference look at, handed to them in one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest

from sutazai.core.errors import Forbidden
from sutazai.core.identity import Role
from sutazai.edge.auth import Caller
from sutazai.edge.exchange import Exchange
from sutazai.gateway.fleet import Fleet
from sutazai.gateway.keeping import Keeping
from sutazai.gateway.routed import Routed
from sutazai.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The gateway behind the application."""

    fleet: Fleet
    routed: Routed
    keeping: Keeping
    metrics: Metrics
    in_flight: Callable[[], dict[str, Exchange]]
    is_ready: Callable[[], tuple[bool, str]]
    """Whether to send requests here, and in a word why not."""


def caller_of(http: HttpRequest) -> Caller:
    """Who asks; the connection has checked it."""
    caller: Caller = http.scope["state"]["caller"]
    return caller


def for_admins(http: HttpRequest) -> None:
    """Raises `Forbidden` for keys that may only ask for inference."""
    if caller_of(http).role is not Role.ADMIN:
        raise Forbidden("This needs an admin key. `sutazai keys create NAME --admin` makes one.")
