"""Ends tasks that were not started by their deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime

import structlog

from sutazai.core.errors import StoreUnavailable
from sutazai.ports.tasks import TaskStore

log = structlog.get_logger("sutazai.tasks")

PAUSE_S = 1.0
AT_ONCE = 500


async def sweep(store: TaskStore, wall: Callable[[], datetime]) -> None:
    """Look again and again, until cancelled. Several processes may: a task ends once."""
    while True:
        try:
            while await store.expire(wall(), limit=AT_ONCE) == AT_ONCE:
                pass
        except StoreUnavailable as error:
            log.warning("deadlines of tasks were not looked at", why=error.message)
        except Exception:  # the border of one turn
            log.exception("deadlines of tasks were not looked at")
        await asyncio.sleep(PAUSE_S)
