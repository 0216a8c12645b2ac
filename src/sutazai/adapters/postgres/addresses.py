"""Addresses of several servers, taken apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sutazai.settings.secret import Secret

_PARTS = re.compile(r"(?P<before>\w+://(?:[^/?#]*@)?)(?P<hosts>[^/?#@]*)(?P<after>(?:[/?#].*)?)", re.DOTALL)
_HOST = re.compile(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\])(?::[0-9]+)?")


def one_by_one(urls: Iterable[Secret]) -> Sequence[Secret]:
    """Each server once, in order; `postgresql://me@a,b:5433/name` names two. What makes no sense stays as it is."""
    found: dict[Secret, None] = {}
    for url in urls:
        parts = _PARTS.fullmatch(url.reveal())
        if parts is None:
            found[url] = None
            continue
        for host in parts["hosts"].split(","):
            found[Secret(f"{parts['before']}{host}{parts['after']}")] = None
    return tuple(found)


def server_name(url: Secret) -> str:
    """Host and port in the address of one server; empty where it is not sure that they are no part of a password."""
    parts = _PARTS.fullmatch(url.reveal())
    if parts is None or "@" in parts["after"] or not _HOST.fullmatch(parts["hosts"]):
        return ""
    return parts["hosts"]
