"""
Who may come in.

Where keys are needed, the key decides. Where none is (loopback), anybody on the machine may ask, but not a web page
in somebody's browser: a page of another site carries an `Origin`, and a page that points its own name at 127.0.0.1
carries that name as `Host`.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from sutazai.core.errors import Forbidden, Unauthorized
from sutazai.core.identity import ApiKey, Role

LOCAL_SUFFIXES = (".localhost", ".local", ".internal")
REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks."""

    key_id: str
    tenant: str
    role: Role


ANONYMOUS = Caller("", "local", Role.ADMIN)
"""On loopback without keys, whoever asks owns the machine."""


class Gatekeeper:
    """Decides on every request, from memory alone."""

    def __init__(
        self, *, required: bool, allowed_hosts: Iterable[str] = (), allowed_origins: Iterable[str] = ()
    ) -> None:
        self.required = required
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._origins = frozenset(origin.rstrip("/").lower() for origin in allowed_origins)
        self._callers: dict[bytes, Caller] = {}
        self._good_hosts: set[bytes] = set()
        self.generation = 0
        """Changes whenever what was admitted before might not be now."""

    def learn(self, keys: Iterable[ApiKey]) -> None:
        """The keys that count from now on; revoked ones do not."""
        self.generation += 1
        self._callers = {key.digest: Caller(key.id, key.tenant, key.role) for key in keys if key.revoked_at is None}

    @property
    def keys(self) -> int:
        """How many keys open the door."""
        return len(self._callers)

    def admit(self, headers: Mapping[bytes, bytes]) -> Caller:
        """
        Who asks, by the headers (names in lower case).

        Raises `Unauthorized` or `Forbidden`.
        """
        caller = self._by_key(headers)
        if caller is not None:
            return caller
        if self.required:
            raise Unauthorized(_NO_KEY if not _has_key(headers) else _UNKNOWN_KEY)
        host = headers.get(b"host", b"")
        if host not in self._good_hosts:
            self._check_host(host)
        self.check_page(headers)
        return ANONYMOUS

    def check_page(self, headers: Mapping[bytes, bytes]) -> None:
        """Whether a page may call, should one ask: browsers do so without a key. Raises `Forbidden`."""
        origin = headers.get(b"origin")
        if origin is not None:
            self._check_origin(origin)

    def allows_origin(self, origin: bytes) -> bool:
        """Whether scripts of this page may call."""
        name = origin.decode("latin-1").rstrip("/").lower()
        return "*" in self._origins or name in self._origins or is_loopback(_host_of(name))

    def _by_key(self, headers: Mapping[bytes, bytes]) -> Caller | None:
        value = headers.get(b"authorization")
        if value is None:
            value = headers.get(b"x-api-key")
        elif value[:7].lower() == b"bearer ":
            value = value[7:].strip()
        return self._callers.get(hashlib.sha256(value).digest()) if value and self._callers else None

    def _check_host(self, host: bytes) -> None:
        name = _without_port(host.decode("latin-1").lower())
        if not ("." not in name or name.endswith(LOCAL_SUFFIXES) or name in self._hosts or _is_address(name)):
            raise Forbidden(
                f"The host name {name[:100]!r} is not one this gateway answers to without keys. "
                "Add it to `server.allowed_hosts`, or ask for keys with `auth.required = true`."
            )
        if len(self._good_hosts) < REMEMBERED:
            self._good_hosts.add(host)

    def _check_origin(self, origin: bytes) -> None:
        if not self.allows_origin(origin):
            raise Forbidden(
                f"The web page {origin[:100].decode('latin-1')!r} may not call this gateway. "
                "Add it to `server.allowed_origins` if it should."
            )


_NO_KEY = "No API key was sent. Send one as `Authorization: Bearer …`; `sutazai keys create NAME` makes one."
_UNKNOWN_KEY = "The API key is not known here, or was revoked. `sutazai keys list` shows those that are."


def _has_key(headers: Mapping[bytes, bytes]) -> bool:
    return b"authorization" in headers or b"x-api-key" in headers


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _host_of(origin: str) -> str:
    """The host of a page's address; empty where it is none."""
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    """An address in `Host` cannot be a rebound name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
