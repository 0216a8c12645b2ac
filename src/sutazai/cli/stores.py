"""The command line's side of the database: opened by the settings, with whoever types as the actor."""

from __future__ import annotations

import asyncio
import os
import pwd
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sutazai.adapters.objects.store import open_objects
from sutazai.adapters.postgres import migrate as migrations
from sutazai.adapters.postgres.database import Database
from sutazai.adapters.postgres.sharded.directory import Directory
from sutazai.adapters.postgres.sharded.shards import Shards
from sutazai.adapters.postgres.stores import Stores, open_bare, open_shards, open_stores
from sutazai.core.errors import BadRequest, Conflict, Misdirected, NotFound, SettingsError, StoreUnavailable
from sutazai.ports.audit import Actor
from sutazai.ports.objects import ObjectStore
from sutazai.settings import load as settings
from sutazai.settings.model import Database as DatabaseSettings
from sutazai.settings.model import Settings

REFUSED = 1
"""The exit code where the request made no sense, or the database was away."""
MOVE_S = 30.0
"""For a statement about shards: whole slots are looked at."""
MISTAKES = 2
"""The exit code for settings that hold mistakes, as in `sutazai config`."""


def with_stores(work: Callable[[Stores], Awaitable[int]]) -> int:
    """Do a command's work on the stores and give its exit code; what goes wrong is told in a sentence."""

    async def run() -> int:
        loaded, data_dir = _loaded()
        async with open_stores(loaded.database, data_dir, shards=loaded.shards) as stores:
            return await work(stores)

    return _told(run)


def with_settings(work: Callable[[Settings, Path], Awaitable[int]]) -> int:
    """The same with the settings and the folder for data, and nothing opened."""

    async def run() -> int:
        return await work(*_loaded())

    return _told(run)


def with_database(work: Callable[[Database], Awaitable[int]]) -> int:
    """The same on the database as it is, whatever tables it has."""

    async def run() -> int:
        async with open_bare(*_settings()) as database:
            return await work(database)

    return _told(run)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """The directory and the shards of this region, as they are."""

    database: Database
    shards: Shards
    directory: Directory


def with_shards(work: Callable[[Sharding], Awaitable[int]]) -> int:
    """The same on the shards of the settings."""

    async def run() -> int:
        loaded, data_dir = _loaded()
        if not loaded.shards:
            return refuse("The settings name no shards, so `[database]` keeps all data. Add `[[shards]]` to spread it.")
        patient = msgspec.structs.replace(loaded.database, timeout_s=max(MOVE_S, loaded.database.timeout_s))
        async with open_bare(patient, data_dir) as database:
            await migrations.migrate(database, migrations.read())
            async with open_shards(database, patient, loaded.shards) as shards:
                return await work(Sharding(database=database, shards=shards, directory=Directory(database, shards)))

    return _told(run)


def with_archive(shard: str, work: Callable[[Database, ObjectStore], Awaitable[int]]) -> int:
    """The same on the database of a shard, or the only one, with the store of objects beside it."""

    async def run() -> int:
        loaded, data_dir = _loaded()
        objects = await asyncio.to_thread(open_objects, loaded.objects, data_dir)
        async with (
            open_bare(loaded.database, data_dir) as database,
            open_shards(database, loaded.database, loaded.shards) as shards,
        ):
            databases = shards.databases or {"": database}
            if shard not in databases:
                known = ", ".join(shards.databases) or "none"
                return refuse(f"Each shard has parts of its own. Name one with --shard; there are: {known}.")
            return await work(databases[shard], objects)

    return _told(run)


def _told(run: Callable[[], Coroutine[Any, Any, int]]) -> int:
    try:
        return asyncio.run(run())
    except SettingsError as error:
        sys.stderr.write("".join(f"{mistake}\n" for mistake in error.mistakes))
        return MISTAKES
    except (BadRequest, Conflict, Misdirected, NotFound, StoreUnavailable) as error:
        return refuse(error.message)


def refuse(sentence: str) -> int:
    """Say why not."""
    sys.stderr.write(f"{sentence}\n")
    return REFUSED


def who() -> Actor:
    """The user of the machine who runs the command; its number where it has no name, as in some containers."""
    number = os.geteuid()  # not the environment's word for it, which anybody can set
    try:
        name = pwd.getpwuid(number).pw_name
    except KeyError:
        name = str(number)
    return Actor(id=f"cli:{name}")


def _settings() -> tuple[DatabaseSettings, Path]:
    loaded, data_dir = _loaded()
    return loaded.database, data_dir


def _loaded() -> tuple[Settings, Path]:
    loaded = settings.load(settings.find(os.environ, Path.cwd()), os.environ)
    return loaded, settings.data_dir(loaded, os.environ, is_root=os.geteuid() == 0)
