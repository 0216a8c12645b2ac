"""
The settings of a running process: loads them again when their file changed, and hands on what may change.

A change is taken up once the file stood still for a look, so that a file being written is not read half way.
What cannot be read, or holds mistakes, is told and changes nothing.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from sutazai.core.errors import SettingsError
from sutazai.settings.load import load
from sutazai.settings.model import Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

LIVE = (
    "nodes",
    "discovery",
    "models",
    "routing",
    "queue",
    "auto",
    "batching",
    "hedging",
    "limits",
    "breaker",
    "health",
    "retry",
    "timeouts",
)
"""Groups that a running process takes up; changes of the others wait for a restart."""

LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What tells one state of a file from another. Editors replace files, so the inode counts too."""

    modified_ns: int
    inode: int
    size_bytes: int


_UNSEEN = _Stamp(-1, -1, -1)
_MISSING = _Stamp(0, 0, 0)


class SettingsWatch:
    """
    Notices changes of the settings file, each second, and calls back on the event loop.

    Args:
        path: the file; None where there is none, and only `poke` does something.
        environ: read with the file each time; it wins over it.
        settings: what the process runs with now.
        applied: gets the new settings and the names of the groups that changed in them, all in `LIVE`.
            Where it raises, the watch keeps the old settings and tells `refused`.
        needs_restart: gets the names of changed groups that were not applied.
        refused: gets the mistakes for which the old settings stay.
        sleep: `asyncio.sleep`, or a clock of a test.
    """

    def __init__(
        self,
        *,
        path: Path | None,
        environ: Mapping[str, str],
        settings: Settings,
        applied: Callable[[Settings, tuple[str, ...]], None],
        needs_restart: Callable[[list[str]], None],
        refused: Callable[[SettingsError], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._path = path
        self._environ = environ
        self._settings = settings
        self._applied = applied
        self._needs_restart = needs_restart
        self._refused = refused
        self._sleep = sleep
        self._poked = False
        self._seen = _UNSEEN
        """At the last look."""
        self._known = _UNSEEN
        """Loaded or refused. Unseen at first, so that a change before the first look is not missed."""

    @property
    def settings(self) -> Settings:
        """What the process runs with: the first settings, and the live groups applied since."""
        return self._settings

    def poke(self) -> None:
        """Load at the next look, changed or not. Safe in a signal handler of the event loop."""
        self._poked = True

    async def run(self) -> None:
        """Look each second until cancelled."""
        while True:
            await self._sleep(LOOK_EVERY_S)
            await self.look()

    async def look(self) -> None:
        """One turn: load and hand on if there is a reason to. Raises nothing but cancellation."""
        try:
            if await self._is_due():
                self._take_up(await asyncio.to_thread(load, self._path, self._environ))
        except SettingsError as error:
            self._refused(error)
        except Exception as error:
            name = type(error).__name__
            refusal = SettingsError([f"The new settings could not be applied ({name}); the old ones stay."])
            refusal.__cause__ = error
            self._refused(refusal)

    async def _is_due(self) -> bool:
        """Whether to load now. Raises `SettingsError` once when the file went away."""
        poked, self._poked = self._poked, False
        stamp = await asyncio.to_thread(_stamp, self._path) if self._path else self._known
        stands_still, self._seen = stamp == self._seen, stamp
        if not poked and (stamp == self._known or not stands_still):
            return False
        self._known = stamp
        if stamp == _MISSING:
            raise SettingsError([f"{self._path} was not there any more; the old settings stay until it comes back."])
        return True

    def _take_up(self, loaded: Settings) -> None:
        changed = [
            name for name in Settings.__struct_fields__ if getattr(loaded, name) != getattr(self._settings, name)
        ]
        live = {name: getattr(loaded, name) for name in changed if name in LIVE}
        if live:
            settings = msgspec.structs.replace(self._settings, **live)
            self._applied(settings, tuple(live))
            self._settings = settings
        if waiting := [name for name in changed if name not in LIVE]:
            self._needs_restart(waiting)


def _stamp(path: Path) -> _Stamp:
    """The file's state now, through links. Any failure to see it counts as missing."""
    try:
        status = os.stat(path)
    except OSError:
        return _MISSING
    return _Stamp(status.st_mtime_ns, status.st_ino, status.st_size)
