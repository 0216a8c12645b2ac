"""
Which addresses a stranger may make us reach: the public internet, and what the operator allows.

Whatever the registries do not call global is refused: loopback, private, link-local (where clouds keep their
metadata), shared (CGNAT), documentation, multicast, reserved. IPv6 addresses that carry one of IPv4 (mapped,
compatible, 6to4, Teredo, NAT64, ISATAP) are judged by that one as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import SplitResult, urlsplit

from sutazai.core.errors import BadRequest, Forbidden

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL_CHARACTERS = 4096
PORTS = {"http": 80, "https": 443}
MOST_NUMBERS = 4

_NUMBER = re.compile(r"0[xX][0-9a-fA-F]*|[0-9]+")
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")
_NAT64 = ip_network("64:ff9b::/96")
_CLOSED: tuple[Network, ...] = tuple(
    map(
        ip_network,
        (
            "0.0.0.0/8",
            "100.64.0.0/10",
            "168.63.129.16/32",  # the metadata of Azure: public by its number, private by its use
            "192.0.0.0/24",
            "192.88.99.0/24",
            "198.18.0.0/15",
            "240.0.0.0/4",
            "64:ff9b:1::/48",
            "100::/64",
            "2001::/23",
            "2002::/16",
            "3fff::/20",
            "5f00::/16",
            "fec0::/10",
        ),
    )
)
"""Said again, because what Python calls global has changed from one release to the next."""


@dataclass(frozen=True, slots=True)
class Target:
    """An address that was read and may be asked for."""

    url: str
    host: str
    """In lower case, without a last dot; an IP address in its plain form."""
    port: int


class Guard:
    """Judges addresses."""

    def __init__(self, allowed: tuple[str, ...] = ()) -> None:
        """
        Make it.

        Args:
            allowed: names, `name:port`, IP addresses and networks that may be reached though they are not public.

        Raises `ValueError` for one that is none of these.
        """
        self._networks: list[Network] = []
        self._names: set[str] = set()
        for one in allowed:
            try:
                self._networks.append(ip_network(one, strict=False))
            except ValueError:
                name, _, port = one.lower().partition(":")
                if not _NAME.fullmatch(name) or (port and not port.isdigit()):
                    raise ValueError(f"{one!r} was no name, address or network.") from None
                self._names.add(one.lower())

    def target(self, url: str) -> Target:
        """Read an address. Raises `BadRequest`, and `Forbidden` where it names an IP address that is closed."""
        parts = _split(url)
        port = PORTS[parts.scheme] if parts.port is None else parts.port
        host = _host(parts.hostname or "")
        literal = _literal(host)
        if literal is not None:
            self.check(host, port, literal)
            host = str(literal)
        shown = f"[{host}]" if ":" in host else host
        rebuilt = parts._replace(netloc=shown if parts.port is None else f"{shown}:{port}", fragment="")
        return Target(rebuilt.geturl(), host, port)

    def check(self, host: str, port: int, address: Address) -> None:
        """Raise `Forbidden` where this address of the host may not be reached."""
        if host in self._names or f"{host}:{port}" in self._names:
            return
        if any(address.version == network.version and address in network for network in self._networks):
            return
        if not all(map(_is_public, _meant(address))):
            raise Forbidden(
                f"The address {host[:253]!r} leads into a network that is not public. Name a public server, or have "
                "the operator allow this one."
            )


def parsed(address: str) -> Address:
    """An address as a resolver gives it; what stands behind `%` names an interface of ours and is dropped."""
    return ip_address(address.partition("%")[0])


def _split(url: str) -> SplitResult:
    if len(url) > MAX_URL_CHARACTERS:
        raise BadRequest(f"The URL had more than {MAX_URL_CHARACTERS} characters.", where="url")
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise BadRequest("The URL had characters that must be written with % in it.", where="url")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadRequest(f"The URL was not understood: {error}.", where="url") from error
    if parts.scheme not in PORTS:
        raise BadRequest("The URL must begin with http:// or https://.", where="url")
    if "@" in parts.netloc:
        raise BadRequest("The URL held a user or a password; leave them out.", where="url")
    if not parts.hostname or port == 0:
        raise BadRequest("The URL named no server.", where="url")
    return parts


def _host(written: str) -> str:
    host = written.lower().removesuffix(".")
    if ":" in host:
        if "%" in host:
            raise BadRequest("The URL named an interface; leave out what stands behind %.", where="url")
        return host
    if not _NAME.fullmatch(host):
        raise BadRequest("The URL named no server that can be.", where="url")
    return host


def _literal(host: str) -> Address | None:
    """The IP address that a host is, in any of the ways that programs read: 127.1, 0x7f000001, 017700000001."""
    if ":" in host:
        try:
            return IPv6Address(host)
        except ValueError as error:
            raise BadRequest("The URL held an IPv6 address that is none.", where="url") from error
    parts = host.split(".")
    if not _NUMBER.fullmatch(parts[-1]):
        return None  # a name: the last label of one is no number
    numbers = [_number(part) for part in parts]
    *first, last = numbers
    if len(numbers) > MOST_NUMBERS or any(part > 255 for part in first) or last >= 256 ** (5 - len(numbers)):
        raise BadRequest("The URL held an IPv4 address that is none.", where="url")
    value = last + sum(part << 8 * (3 - place) for place, part in enumerate(first))
    return IPv4Address(value)


def _number(part: str) -> int:
    try:
        if not _NUMBER.fullmatch(part):
            raise ValueError(part)
        if part[:2] in {"0x", "0X"}:
            return int(part[2:] or "0", 16)
        return int(part, 8) if part[0] == "0" and len(part) > 1 else int(part)
    except ValueError:
        raise BadRequest("The URL held an IPv4 address that is none.", where="url") from None


def _meant(address: Address) -> Iterator[Address]:
    """The address, and those of IPv4 that it leads to."""
    yield address
    if isinstance(address, IPv4Address):
        return
    low = IPv4Address(int(address) & 0xFFFFFFFF)
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    is_isatap = int(address) >> 32 & 0xFDFFFFFF == 0x5EFE
    if address in _NAT64 or is_isatap or int(address) >> 32 == 0:
        yield low


def _is_public(address: Address) -> bool:
    if address in _NAT64:  # a way to IPv4, judged by where it leads
        return True
    return (
        address.is_global
        and not (address.is_multicast or address.is_reserved or address.is_link_local or address.is_unspecified)
        and not any(address.version == network.version and address in network for network in _CLOSED)
    )
