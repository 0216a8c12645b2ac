"""The gateway's side of tasks: the way in, the watchers, the schedules, and the webhooks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from sutazai.adapters.postgres.stores import Stores
from sutazai.edge.auth import Gatekeeper
from sutazai.ports.agent import Agent
from sutazai.ports.web import Web
from sutazai.settings.model import Settings
from sutazai.tasks.recurring import Recurring
from sutazai.tasks.submit import Submission
from sutazai.tasks.watch import Watch
from sutazai.tasks.webhooks import Webhooks

Loop = tuple[str, Callable[[], Awaitable[None]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEdge:
    """What the addresses of tasks need, and the loops beside them."""

    submission: Submission
    watch: Watch
    recurring: Recurring
    webhook_secret: str
    loops: Sequence[Loop]


def make_task_edge(
    settings: Settings, stores: Stores, agents: Mapping[str, Agent], web: Web | None, gatekeeper: Gatekeeper
) -> TaskEdge:
    """As the settings say; webhooks are told where there is a secret and a way to the web."""
    secret = settings.webhooks.secret.reveal() if settings.webhooks.secret else ""

    def max_waiting(tenant: str) -> int:
        known = gatekeeper.tenants.get(tenant)
        own = None if known is None else known.waiting_tasks
        return settings.tasks.max_waiting_per_tenant if own is None else own

    submission = Submission(
        stores.tasks, agents, takes_webhooks=bool(secret), max_waiting=max_waiting, wall=stores.wall
    )
    watch = Watch(stores.tasks)
    recurring = Recurring(stores.schedules, submission, wall=stores.wall)
    loops: list[Loop] = [
        ("submit tasks", submission.run),
        ("watch tasks", watch.run),
        ("submit what is due", recurring.run),
    ]
    if secret and web is not None:
        loops.append(("tell webhooks", Webhooks(stores.webhooks, web, stores.marks, secret).run))
    return TaskEdge(submission=submission, watch=watch, recurring=recurring, webhook_secret=secret, loops=loops)
