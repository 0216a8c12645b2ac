"""Where conversations are kept."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from sutazai.core.mark import Mark
from sutazai.core.session import Message, Session


class SessionStore(Protocol):
    """
    Sessions and their messages, tenant by tenant.

    A store has no clock: whether a session is past its time is for the caller to see, but `page` and `create` are
    told. Every method raises `StoreUnavailable` within its time limit when the store is away.
    """

    async def create(self, session: Session, *, at_most: int) -> bool:
        """Keep a new one. False where its tenant has `at_most` that live past `session.created_at`."""

    async def get(self, tenant: str, session_id: str) -> Session | None:
        """One session; None also for one of another tenant. Always the newest version."""

    async def page(
        self, tenant: str, *, now: datetime, before: str, limit: int, seen: Mark | None = None
    ) -> Sequence[Session]:
        """
        Those that live past `now`, newest first: the ones made before id `before`, or all where it is empty.

        `seen` is as in `ports/marks.py`.
        """

    async def history(self, session: Session) -> Sequence[Message]:
        """
        Its messages, oldest first, as of `session.version`.

        Where a turn was added meanwhile, some may be missing; `append` will then raise `Conflict`.
        """

    async def append(self, session: Session, kept: Sequence[Message], news: Sequence[Message]) -> None:
        """
        Add a turn, all or nothing: the messages are `kept` and then `news` from now on.

        Args:
            session: as it is to be: one version on, its new count of messages and time to live.
            kept: what stays of the messages, all of them already there.

        Raises `Conflict` where another turn was added meanwhile, and `NotFound` where the session is gone.
        """

    async def delete(self, tenant: str, session_id: str) -> bool:
        """Forget one and its messages; False where it was not there."""

    async def sweep(self, now: datetime, *, limit: int) -> int:
        """Forget at most so many whose time was over by `now`; how many they were."""
