"""Partitions of the tables of tasks, tended as the settings say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

from sutazai.adapters.objects.archive import archive_name, archiving, set_aside
from sutazai.adapters.objects.store import open_objects
from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.partitions import Partitions
from sutazai.adapters.postgres.stores import Stores
from sutazai.settings.model import Settings

MONTH_S = 31 * 86_400.0


async def begin_partitions(
    settings: Settings, stores: Stores, data_dir: Path, begin: Callable[[Callable[[], Awaitable[None]], str], None]
) -> None:
    """Make parts ahead, now and every hour; with `keep_months` write the old ones to the object store."""
    for shard, database in stores.databases.items():
        tended = await partitions(settings, database, data_dir, shard=shard, wall=stores.wall)
        begin(tended.run, "tend partitions")


async def partitions(
    settings: Settings,
    database: Database,
    data_dir: Path,
    *,
    shard: str = "",
    wall: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Partitions:
    """
    Those of the settings. Raises `SettingsError` or `StoreUnavailable` for the object store.

    Args:
        shard: whose database it is; the old parts of each go to a folder of its own.
    """
    period, keep_months = settings.tasks.partition, settings.tasks.keep_months
    if keep_months == 0:
        return Partitions(database, period=period, wall=wall)
    objects = await asyncio.to_thread(open_objects, settings.objects, data_dir)
    return Partitions(
        database,
        period=period,
        keep_s=keep_months * MONTH_S,
        archive=lambda name: archiving(objects, archive_name(shard, name)),
        set_aside=lambda part, names: set_aside(objects, archive_name(shard, part), names),
        wall=wall,
    )
