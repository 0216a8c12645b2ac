"""
Files in one folder, for a model: nothing outside of it is read, written or even seen.

Every part of a path is opened from the folder before it without following links, so that a link that is put there
between a check and its use leads nowhere. Only plain files are opened: no device, pipe or socket.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sutazai.core.errors import BadRequest, Forbidden, NotFound, TooLarge

MAX_DEPTH = 16
MAX_NAME_BYTES = 255
MAX_LISTED = 1000

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe would block for ever


class Sandbox:
    """One folder. Its methods block for as long as the disk does."""

    def __init__(self, root: Path, *, max_file_bytes: int = 1_000_000, max_total_bytes: int = 50_000_000) -> None:
        """Make it, and the folder where there is none; what it is a link to is what counts."""
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root = root.resolve()
        self._max_file_bytes = max_file_bytes
        self._max_total_bytes = max_total_bytes

    def read(self, path: str) -> str:
        """The text of a file. Raises `NotFound`, `Forbidden`, `BadRequest` or `TooLarge`."""
        with self._folder_of(path) as (folder, name), _told(path):
            file = os.open(name, os.O_RDONLY | _FILE, dir_fd=folder)
            with os.fdopen(file, "rb") as opened:
                _check_plain(file, path)
                data = opened.read(self._max_file_bytes + 1)
        if len(data) > self._max_file_bytes:
            raise TooLarge(f"The file {path!r} was larger than {self._max_file_bytes} bytes.")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise BadRequest(f"The file {path!r} was no text in UTF-8.") from error

    def write(self, path: str, text: str) -> int:
        """Write a whole file, and the folders it is in; its size in bytes. Raises as `read` does."""
        data = text.encode("utf-8", "replace")
        if len(data) > self._max_file_bytes:
            raise TooLarge(f"The text was larger than {self._max_file_bytes} bytes, the most that a file may have.")
        with _told(path):
            used_bytes = self._used_bytes()
        if used_bytes + len(data) > self._max_total_bytes:
            raise TooLarge(f"The folder would hold more than {self._max_total_bytes} bytes. Write less.")
        with self._folder_of(path, make=True) as (folder, name), _told(path):
            # not truncated before it is known to be a plain file with one name
            file = os.open(name, os.O_WRONLY | os.O_CREAT | _FILE, 0o600, dir_fd=folder)
            with os.fdopen(file, "wb") as opened:
                _check_plain(file, path)
                opened.truncate(0)
                opened.write(data)
        return len(data)

    def listed(self, path: str = "") -> list[str]:
        """Names in a folder, in order, those of folders with `/` behind; links and devices are left out."""
        parts = _parts(path) if path not in {"", ".", "/"} else []
        with self._open(parts, path, make=False) as folder, _told(path), os.scandir(folder) as found:
            entries = [
                one.name + ("/" if one.is_dir(follow_symlinks=False) else "")
                for one in found
                if one.is_dir(follow_symlinks=False) or one.is_file(follow_symlinks=False)
            ]
        return sorted(entries)[:MAX_LISTED]

    @contextmanager
    def _folder_of(self, path: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """The open folder that a file is in, and the file's name."""
        *folders, name = _parts(path)
        with self._open(folders, path, make=make) as folder:
            yield folder, name

    @contextmanager
    def _open(self, folders: list[str], path: str, *, make: bool) -> Iterator[int]:
        with _told(path):
            at = os.open(self._root, _FOLDER)
        try:
            for name in folders:
                with _told(path):
                    at = _step(at, name, make=make)
            yield at
        finally:
            os.close(at)

    def _used_bytes(self) -> int:
        return sum(
            os.stat(name, dir_fd=folder, follow_symlinks=False).st_size
            for _, _, files, folder in os.fwalk(self._root, follow_symlinks=False)
            for name in files
        )


def _step(at: int, name: str, *, make: bool) -> int:
    """One folder further down; the one before is closed once that is open."""
    if make:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=at)
    further = os.open(name, _FOLDER, dir_fd=at)
    os.close(at)
    return further


def _parts(path: str) -> list[str]:
    """The names in a path within the folder. Raises `Forbidden` for one that leads out."""
    if path.startswith(("/", "~")) or "\\" in path or "\0" in path or (len(path) > 1 and path[1] == ":"):
        raise Forbidden(f"The path {path[:200]!r} did not begin in the folder. Write it like `notes/today.md`.")
    parts = [part for part in path.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise Forbidden(f"The path {path[:200]!r} led out of the folder. Leave out `..`.")
    if not parts:
        raise BadRequest("The path named no file.")
    if len(parts) > MAX_DEPTH or any(len(part.encode("utf-8", "replace")) > MAX_NAME_BYTES for part in parts):
        raise BadRequest(f"The path was longer than {MAX_DEPTH} names of {MAX_NAME_BYTES} bytes.")
    if not all(part.isprintable() for part in parts):
        raise BadRequest("The path had characters that names of files do not have here.")
    return parts


def _check_plain(file: int, path: str) -> None:
    """A plain file with one name: a second one (hard link) may be that of a file outside."""
    about = os.fstat(file)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        raise Forbidden(f"{path!r} was no plain file of this folder.")


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Turns what the system raises into our errors."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"No file {path[:200]!r} was in the folder.") from error
    except OSError as error:  # a link (ELOOP), a folder in place of a file, no room, no right
        raise Forbidden(f"{path[:200]!r} could not be used: {error.strerror}.") from error
