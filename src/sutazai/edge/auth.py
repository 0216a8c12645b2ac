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
from dataclasses import dataclass, fields, replace
from urllib.parse import urlsplit

from sutazai.core.errors import BadRequest, Forbidden, Unauthorized
from sutazai.core.identity import Allowance, ApiKey, Limits, Role, Scope, Tenant
from sutazai.core.request import NORMAL, Priority

LOCAL_SUFFIXES = (".localhost", ".local", ".internal")
REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks."""

    key_id: str
    tenant: str
    role: Role
    scopes: frozenset[Scope] = frozenset(Scope)
    priority: Priority = NORMAL
    """What its requests have. They may ask for less, and those of admins for more."""
    allowance: Allowance | None = None
    """The limits that its requests must fit into; None where there are none."""

    def needs(self, scope: Scope) -> None:
        """Raises `Forbidden` where the key was not made for this."""
        if scope not in self.scopes:
            raise Forbidden(
                f"This needs a key with the scope `{scope.value}`, and yours has only: {_listed(self.scopes)}. "
                f"`sutazai keys create NAME --scope {scope.value}` makes one."
            )

    @property
    def is_admin(self) -> bool:
        """Whether it may do what only admins may: that takes the role and the scope."""
        return self.role is Role.ADMIN and Scope.ADMIN in self.scopes

    def needs_admin(self) -> None:
        """Raises `Forbidden` for keys of users, and for those of admins without the scope for it."""
        if not self.is_admin:
            raise Forbidden(
                "This needs an admin key with the scope `admin`. `sutazai keys create NAME --admin` makes one."
            )


LOCAL = "local"
"""The tenant of those who need no key."""
ANONYMOUS = Caller("", LOCAL, Role.ADMIN)
"""On loopback without keys, whoever asks owns the machine."""
NO_LIMITS = Limits()
TENANT = b"x-sutazai-tenant"
USER = b"x-sutazai-user"
MAX_NAME_CHARACTERS = 64
SPOKEN_SCOPES = frozenset({Scope.INFERENCE})
"""What may be asked for in another's name."""


class Gatekeeper:
    """Decides on every request, from memory alone."""

    def __init__(
        self, *, required: bool, allowed_hosts: Iterable[str] = (), allowed_origins: Iterable[str] = ()
    ) -> None:
        self.required = required
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._origins = frozenset(origin.rstrip("/").lower() for origin in allowed_origins)
        self._keys: tuple[ApiKey, ...] = ()
        self._callers: dict[bytes, Caller] = {}
        self._anonymous = ANONYMOUS
        self._default_limits = NO_LIMITS
        self.tenants: Mapping[str, Tenant] = {}
        """Those that somebody defined, by name; all others have the defaults."""
        self._good_hosts: set[bytes] = set()
        self.generation = 0
        """Changes whenever what was admitted before might not be now."""

    def learn(self, keys: Iterable[ApiKey], tenants: Iterable[Tenant] = (), default_limits: Limits = NO_LIMITS) -> None:
        """
        The keys and tenants that count from now on; revoked keys do not.

        Args:
            default_limits: what a tenant may take where it has no limit of its own.
        """
        self._keys = tuple(key for key in keys if key.revoked_at is None)
        self.tenants = {tenant.name: tenant for tenant in tenants}
        self.limit_by(default_limits)

    def limit_by(self, default_limits: Limits) -> None:
        """The limits of tenants that have none of their own, from now on."""
        self.generation += 1
        self._default_limits = default_limits
        limits = {name: limits_of(tenant.limits, default_limits) for name, tenant in self.tenants.items()}
        self._callers = {
            key.digest: _caller(key, self.tenants.get(key.tenant), limits.get(key.tenant, default_limits))
            for key in self._keys
        }
        local = self.tenants.get(LOCAL)
        self._anonymous = replace(
            ANONYMOUS,
            priority=NORMAL if local is None else local.priority,
            allowance=_allowance(LOCAL, "", limits.get(LOCAL, default_limits), NO_LIMITS),
        )

    @property
    def keys(self) -> int:
        """How many keys open the door."""
        return len(self._callers)

    def admit(self, headers: Mapping[bytes, bytes]) -> Caller:
        """
        Who asks, by the headers (names in lower case).

        Raises `Unauthorized` or `Forbidden`.
        """
        return self._by_key(headers) or self._without_key(headers)

    def asks_for(self, caller: Caller, headers: Mapping[bytes, bytes]) -> Caller:
        """
        In whose name a model is asked.

        An admin may speak for another tenant (`x-sutazai-tenant`), as workers do for the tenants of their tasks; from
        others the header means nothing. Raises `BadRequest`.
        """
        tenant = headers.get(TENANT)
        if tenant is None or not caller.is_admin:
            return caller
        return self._spoken_for(tenant, headers.get(USER, b""))

    def _without_key(self, headers: Mapping[bytes, bytes]) -> Caller:
        if self.required:
            raise Unauthorized(_NO_KEY if not _has_key(headers) else _UNKNOWN_KEY)
        host = headers.get(b"host", b"")
        if host not in self._good_hosts:
            self._check_host(host)
        self.check_page(headers)
        return self._anonymous

    def _spoken_for(self, tenant: bytes, user: bytes) -> Caller:
        """The one whom an admin speaks for: what is asked counts against that tenant's limits, and its key's."""
        name = tenant.decode("latin-1")
        if not (name.strip() and name.isprintable() and len(name) <= MAX_NAME_CHARACTERS):
            raise BadRequest("The header `x-sutazai-tenant` named no tenant; send 1 to 64 printable characters.")
        return self.caller_for(name, user.decode("latin-1"))

    def caller_for(self, name: str, key_id: str) -> Caller:
        """Whoever asks models in the name of a tenant, by one of its keys where that still opens the door."""
        for key in self._keys:
            if key.id == key_id and key.tenant == name:
                return replace(self._callers[key.digest], role=Role.USER, scopes=SPOKEN_SCOPES)
        known = self.tenants.get(name)
        of_tenant = self._default_limits if known is None else limits_of(known.limits, self._default_limits)
        return Caller(
            "",
            name,
            Role.USER,
            SPOKEN_SCOPES,
            NORMAL if known is None else known.priority,
            _allowance(name, "", of_tenant, NO_LIMITS),
        )

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


def limits_of(own: Limits, default: Limits) -> Limits:
    """What a tenant may take: its own limits, and where it has none, the default one."""
    if own.is_unlimited:
        return default
    filled = {name: value for name in _LIMITED if (value := getattr(own, name)) is not None}
    return replace(default, burst_s=own.burst_s, **filled)


_LIMITED = tuple(one.name for one in fields(Limits) if one.name != "burst_s")


def _caller(key: ApiKey, tenant: Tenant | None, of_tenant: Limits) -> Caller:
    """Whoever shows this key. Of two priorities the lower one is the highest."""
    highest = NORMAL if tenant is None else tenant.priority
    return Caller(
        key.id,
        key.tenant,
        key.role,
        key.scopes,
        highest if key.priority is None else max(highest, key.priority),
        _allowance(key.tenant, key.id, of_tenant, key.limits),
    )


def _allowance(tenant: str, key_id: str, of_tenant: Limits, of_key: Limits) -> Allowance | None:
    if of_tenant.is_unlimited and of_key.is_unlimited:
        return None
    return Allowance(tenant=tenant, key_id=key_id, of_tenant=of_tenant, of_key=of_key)


def _listed(scopes: Iterable[Scope]) -> str:
    return ", ".join(sorted(scope.value for scope in scopes))


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
