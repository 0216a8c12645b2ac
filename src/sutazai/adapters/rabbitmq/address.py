"""
What `rabbitmq.url` says: which nodes of one cluster, and who we are to them.

    amqp://user:password@host:5672,host:5672/vhost

`amqps` speaks TLS. A name, a password and a virtual host may hold `%40` for an `@` and `%2F` for a `/`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from sutazai.core.errors import SettingsError
from sutazai.settings.secret import Secret

FORM = re.compile(
    r"""
    amqp (?P<tls>s?) ://
    (?: (?P<username>[^:@/?]*) (?: : (?P<password>[^@/?]*) )? @ )?
    (?P<hosts>[^@/?]+)
    (?: / (?P<vhost>[^/?]*) )?
    """,
    re.VERBOSE,
)
HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::(?P<port>\d{1,5}))?")
REMEDY = "write amqp://user:password@host:5672,host:5672/vhost, and %40 for an @ in the password (its value is hidden)"


@dataclass(frozen=True, slots=True)
class Node:
    """One server of the cluster."""

    name: str
    """Host and port, for logs and errors."""
    url: Secret
    """What the driver takes; the heartbeat is in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An address that was understood."""

    nodes: tuple[Node, ...]
    """Never empty."""
    vhost: str

    def __str__(self) -> str:
        """The hosts, for logs and errors."""
        return ",".join(node.name for node in self.nodes)


def parse(url: Secret, *, heartbeat_s: int = 10) -> Address:
    """Raises `SettingsError`, without a word of the address, where it has no form that is known."""
    found = FORM.fullmatch(url.reveal())
    if found is None:
        raise _wrong("was no RabbitMQ address")
    vhost = unquote(found["vhost"] or "") or "/"
    username = unquote(found["username"] or "") or "guest"
    password = unquote(found["password"] or "") or "guest"
    who = f"{quote(username, safe='')}:{quote(password, safe='')}"
    nodes = []
    for each in found["hosts"].split(","):
        host, port = _host(each, 5671 if found["tls"] else 5672)
        to = f"amqp{found['tls']}://{who}@{host}:{port}/{quote(vhost, safe='')}?heartbeat={heartbeat_s}"
        nodes.append(Node(f"{host}:{port}", Secret(to)))
    return Address(nodes=tuple(nodes), vhost=vhost)


def _host(text: str, default_port: int) -> tuple[str, int]:
    found = HOST.fullmatch(text)
    port = int(found["port"] or default_port) if found else 0
    if found is None or not 0 < port < 65536:
        raise _wrong("named a host that was not understood")
    return found["host"], port


def _wrong(what: str) -> SettingsError:
    return SettingsError([f"`rabbitmq.url` {what}; {REMEDY}."])
