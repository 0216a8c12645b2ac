"""What has to be told to those who left an address, kept from the end of a task until it was told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from sutazai.core.task import Task, TaskStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class DueWebhook:
    """An end of a task that is to be told now."""

    task: Task
    """As it stands; it may have gone on since."""
    version: int
    """That of the end."""
    status: TaskStatus
    """How it ended."""
    attempt: int
    """From 1."""


class WebhookStore(Protocol):
    """
    Ends that were not told yet. A task's end puts its own here, in the same transaction.

    Every method raises `StoreUnavailable` within its time limit.
    """

    async def claim(self, *, limit: int, lease_s: float) -> Sequence[DueWebhook]:
        """Take what is due; whoever takes it has `lease_s`, then it is due again."""

    async def settle(self, webhook: DueWebhook) -> None:
        """It was told, or was given up."""

    async def postpone(self, webhook: DueWebhook, *, pause_s: float) -> None:
        """It is due again after a pause."""

    def due(self) -> AsyncIterator[None]:
        """Whenever some may be due. Never ends; raises only on cancellation."""
