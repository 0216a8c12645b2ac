"""Where a node listens, taken apart once."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import cache
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Address:
    """A base URL as a connection needs it."""

    host: str
    port: int
    secure: bool
    base_path: str
    """What precedes every path, without a trailing slash; mostly empty."""

    @property
    def host_header(self) -> str:
        """The value of `Host`: the port is left out where it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def parse_address(url: str) -> Address:
    """Take `http://host:port/base` apart. Raises `ValueError` where it is no such URL."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{url!r} is not an http:// or https:// address")
    secure = parts.scheme == "https"
    port = parts.port if parts.port is not None else (443 if secure else 80)
    return Address(parts.hostname, port, secure, parts.path.rstrip("/"))


@cache
def tls_context() -> ssl.SSLContext:
    """The system's trust, made once: loading it takes milliseconds."""
    return ssl.create_default_context()
