"""
What `redis.url` says: which servers, arranged how, and who we are to them.

    redis://:password@host:6379/0
    redis+sentinel://:password@host:26379,host:26379/main?db=0
    redis+cluster://:password@host:6379,host:6379

`rediss` in place of `redis` speaks TLS. A name and a password may hold `%40` for an `@`.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from urllib.parse import unquote

from sutazai.core.errors import SettingsError
from sutazai.settings.secret import Secret

FORM = re.compile(
    r"""
    redis (?P<tls>s?) (?P<arranged>\+sentinel|\+cluster)? ://
    (?: (?P<username>[^:@/?]*) (?: : (?P<password>[^/?]*) )? @ )?
    (?P<hosts>[^@/?]+)
    (?: / (?P<path>[^/?]*) )?
    (?: \? db=(?P<db>\d{1,5}) )?
    """,
    re.VERBOSE,
)
HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::(?P<port>\d{1,5}))?")
REMEDY = (
    "write redis://:password@host:6379/0, redis+sentinel://:password@host:26379,host:26379/main or"
    " redis+cluster://:password@host:6379,host:6379, and %40 for an @ in the password (its value is hidden)"
)


class Arranged(enum.Enum):
    """How the servers belong together."""

    ALONE = ""
    SENTINEL = "+sentinel"
    """The hosts are Sentinels; they know which server is the master."""
    CLUSTER = "+cluster"
    """The hosts are some servers of a Cluster; they know the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An address that was understood. Its `repr` hides the password."""

    arranged: Arranged
    hosts: tuple[tuple[str, int], ...]
    """Never empty; exactly one for a server that is alone."""
    is_tls: bool
    username: str | None
    password: Secret | None
    db: int
    """Always 0 in a Cluster."""
    master: str
    """What the Sentinels call it; empty elsewhere."""

    def __str__(self) -> str:
        """The hosts, for logs and errors."""
        return ",".join(f"{host}:{port}" for host, port in self.hosts)


def parse(url: Secret) -> Address:
    """Raises `SettingsError`, without a word of the address, where it has no form that is known."""
    found = FORM.fullmatch(url.reveal())
    if found is None:
        raise _wrong("was no Redis address")
    arranged = Arranged(found["arranged"] or "")
    path = unquote(found["path"] or "")
    if arranged is Arranged.SENTINEL and not path:
        raise _wrong("did not name the master that the Sentinels watch")
    if arranged is Arranged.CLUSTER and (path.strip("0") or int(found["db"] or 0)):
        raise _wrong("named a database, and a Cluster has none but 0")
    if arranged is Arranged.ALONE and (not re.fullmatch(r"\d{0,5}", path) or "," in found["hosts"]):
        raise _wrong("was no address of one Redis server")
    db = found["db"] or (path if arranged is Arranged.ALONE else "") or 0
    return Address(
        arranged=arranged,
        hosts=tuple(
            _host(each, 26379 if arranged is Arranged.SENTINEL else 6379) for each in found["hosts"].split(",")
        ),
        is_tls=bool(found["tls"]),
        username=unquote(found["username"] or "") or None,
        password=Secret(unquote(found["password"])) if found["password"] else None,
        db=int(db),
        master=path if arranged is Arranged.SENTINEL else "",
    )


def _host(text: str, default_port: int) -> tuple[str, int]:
    found = HOST.fullmatch(text)
    port = int(found["port"] or default_port) if found else 0
    if found is None or not 0 < port < 65536:
        raise _wrong("named a host that was not understood")
    return found["host"].strip("[]"), port


def _wrong(what: str) -> SettingsError:
    return SettingsError([f"`redis.url` {what}; {REMEDY}."])
