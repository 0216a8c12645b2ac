"""What the addresses beside inference look at, handed to them in one value."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest

from sutazai.core.identity import Scope
from sutazai.core.request import Place
from sutazai.edge.auth import Caller
from sutazai.edge.exchange import Exchange
from sutazai.gateway.fleet import Fleet
from sutazai.gateway.keeping import Keeping
from sutazai.gateway.routed import Routed
from sutazai.gateway.sessions import Sessions
from sutazai.ports.audit import AuditLog
from sutazai.ports.cache import Forgotten
from sutazai.ports.files import FileStore
from sutazai.ports.keys import KeyStore, UsageStore
from sutazai.ports.marks import Marks
from sutazai.ports.messages import MessageStore
from sutazai.ports.objects import ObjectStore
from sutazai.ports.schedules import ScheduleStore
from sutazai.ports.tasks import TaskStore
from sutazai.ports.tenants import TenantStore
from sutazai.tasks.recurring import Recurring
from sutazai.tasks.results import Results
from sutazai.tasks.submit import Submission
from sutazai.tasks.watch import Watch
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
    place_of: Callable[[str], Place | None]
    """Where a request, by its id, stands in line."""
    keys: KeyStore
    tenants: TenantStore
    usage: UsageStore
    audit: AuditLog
    forget: Callable[[Forgotten], Awaitable[int]]
    """Forget answers here and in every other gateway; how many, where that can be told."""
    choice: Callable[[], str]
    """What clients call the model that is chosen for them; empty where none could be."""
    sessions: Sessions
    tasks: TaskStore
    submission: Submission
    watch: Watch
    schedules: ScheduleStore
    recurring: Recurring
    webhook_secret: str
    """What the secrets of tenants are derived from; empty where webhooks are not told."""
    messages: MessageStore
    files: FileStore
    objects: ObjectStore
    marks: Marks
    results: Results
    keep_alive_s: Callable[[], float]
    """How often a stream without a token gets a sign of life, as of now."""


def caller_of(http: HttpRequest) -> Caller:
    """Who asks; the connection has checked it."""
    caller: Caller = http.scope["state"]["caller"]
    return caller


def for_inference(http: HttpRequest) -> None:
    """Raises `Forbidden` for keys that may not ask models for anything."""
    caller_of(http).needs(Scope.INFERENCE)


def for_admins(http: HttpRequest) -> None:
    """Raises `Forbidden` for keys that do not administrate the gateway."""
    caller_of(http).needs_admin()
