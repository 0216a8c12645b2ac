"""
The web, for agents and webhooks: every connection goes to an address that was checked.

A name is resolved by the connection itself, once: the addresses that come out are checked and the very same are
connected to, so that a name which means something else a moment later gains nothing. Of a name with a closed address
among open ones nothing is reached. Proxies of the environment are not used, cookies not kept.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NoReturn
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from sutazai.adapters.http.resolve import resolve as by_system
from sutazai.core.errors import BadRequest, Forbidden, NodeTimeout, NodeUnreachable, TooLarge
from sutazai.policy.web_addresses import Guard, Target, parsed
from sutazai.ports.web import Page

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

MOST_REDIRECTS = 3
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_HEADER_BYTES = 16_384
MAX_BODY_BYTES = 2 * 1024 * 1024
"""Of what is posted."""
AGENT = "SutazAI"


class GuardedWeb:
    """`Web` over aiohttp. Made by `open_web`."""

    def __init__(self, session: aiohttp.ClientSession, guard: Guard, *, max_bytes: int) -> None:
        self._session = session
        self._guard = guard
        self._max_bytes = max_bytes

    async def get(self, url: str) -> Page:
        target = self._guard.target(url)
        for _ in range(MOST_REDIRECTS + 1):
            with _Failures(target):
                async with self._session.get(target.url, allow_redirects=False) as answer:
                    location = answer.headers.get("location", "")
                    if answer.status not in REDIRECTS or not location:
                        return await self._page(answer, target)
            target = self._guard.target(_joined(target.url, location))
        raise NodeUnreachable(
            f"{target.host} redirected more than {MOST_REDIRECTS} times. Ask for the last address.", node=target.host
        )

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        if len(body) > MAX_BODY_BYTES:
            raise TooLarge(f"The body was larger than {MAX_BODY_BYTES} bytes.")
        target = self._guard.target(url)
        with _Failures(target):
            async with self._session.post(target.url, data=body, headers=headers, allow_redirects=False) as answer:
                return answer.status
        raise AssertionError("not reached")

    async def _page(self, answer: aiohttp.ClientResponse, target: Target) -> Page:
        body = bytearray()
        async for part in answer.content.iter_any():
            body += part
            if len(body) > self._max_bytes:
                break
        charset = answer.charset or "utf-8"
        try:
            text = bytes(body[: self._max_bytes]).decode(charset, "replace")
        except (LookupError, ValueError):  # a charset that nobody knows, or that is no text
            text = bytes(body[: self._max_bytes]).decode("utf-8", "replace")
        return Page(
            url=target.url,
            status=answer.status,
            content_type=answer.content_type.lower(),
            text=text,
            is_cut=len(body) > self._max_bytes,
        )


def _joined(url: str, location: str) -> str:
    """Where a redirect leads. Raises `BadRequest`."""
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise BadRequest(f"The server redirected to no URL: {error}.", where="url") from error


@asynccontextmanager
async def open_web(
    *,
    allowed: tuple[str, ...] = (),
    limit_s: float = 15.0,
    max_bytes: int = 1024 * 1024,
    connections: int = 32,
    resolve: Resolve = by_system,
) -> AsyncIterator[GuardedWeb]:
    """
    The guarded web.

    Args:
        allowed: as in `Guard`.
        limit_s: of one request, from the name to the last byte.
        max_bytes: what is read of a page, after decompression.
        connections: at once; further requests wait, which counts as well.
        resolve: names to addresses.
    """
    guard = Guard(allowed)
    connector = aiohttp.TCPConnector(
        resolver=_CheckedResolver(guard, resolve),
        use_dns_cache=False,
        limit=connections,
        force_close=True,  # a connection kept would outlive the check of its address
    )
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=limit_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"user-agent": AGENT},
        trust_env=False,
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
        raise_for_status=False,
    ) as session:
        yield GuardedWeb(session, guard, max_bytes=max_bytes)


class _CheckedResolver(AbstractResolver):
    """The only way from a name to a connection."""

    def __init__(self, guard: Guard, resolve: Resolve) -> None:
        self._guard = guard
        self._resolve = resolve

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        plain = host.lower().removesuffix(".")
        addresses = [parsed(one) for one in await self._resolve(plain, port)]
        if not addresses:
            raise OSError(f"{plain} has no address")
        for address in addresses:
            self._guard.check(plain, port, address)
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        return


class _Failures:
    """Turns what aiohttp raises into our errors."""

    def __init__(self, target: Target) -> None:
        self._host = target.host

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self._raise(error)

    def _raise(self, error: Exception) -> NoReturn:
        cause: BaseException | None = error
        while cause is not None:  # what the resolver raised is wrapped by aiohttp
            if isinstance(cause, Forbidden):
                raise cause
            cause = cause.__cause__
        if isinstance(error, TimeoutError):
            raise NodeTimeout(f"{self._host} did not answer in time. Try again later.", node=self._host) from error
        if isinstance(error, aiohttp.ClientError | OSError | ValueError):
            raise NodeUnreachable(
                f"{self._host} did not answer: {type(error).__name__}. See whether it is there.", node=self._host
            ) from error
        raise error
