"""
The command line's side of a gateway: where it is, which key to show, and how its errors are told.

A command hands `run` a coroutine that gets a `GatewayClient`. Whatever goes wrong becomes one sentence on standard
error and an exit code; nobody sees a traceback.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Annotated, TypeVar, cast

import cyclopts
import msgspec
import uvloop

from sutazai.adapters.http.address import parse_address
from sutazai.adapters.http.client import Answer, HttpClient
from sutazai.adapters.http.connection import ConnectionPool
from sutazai.cli.printing import complain
from sutazai.core.errors import (
    BadRequest,
    Forbidden,
    NodeFault,
    NodeRejected,
    NodeUnreachable,
    SettingsError,
    SutazaiError,
    Unauthorized,
)
from sutazai.core.mark import WRITTEN
from sutazai.dialects.errors import error_message
from sutazai.settings.check import node_address
from sutazai.settings.load import find, load
from sutazai.settings.model import Server
from sutazai.settings.secret import Secret

T = TypeVar("T")

TOLD = f": {WRITTEN} ".encode()
"""How a stream of events tells a mark at its end."""

CONNECT_S = 5.0
ANSWER_S = 20.0
"""For answers that are complete at once; the gateway's own limits are below it."""

REFUSED = 1
MISTAKES = 2
"""The exit code for settings that hold mistakes, as in `sutazai config`."""
INTERRUPTED = 130

Url = Annotated[
    str | None,
    cyclopts.Parameter(
        name="--url",
        negative="",
        help="The gateway's address. Left out: `$SUTAZAI_URL`, else the one in the settings.",
    ),
]
"""The option that every command has."""


def run(work: Callable[[GatewayClient], Awaitable[int]], url: str | None) -> int:
    """
    Do a command's work and give its exit code.

    Errors are told and become 1, or 2 where the settings hold mistakes; Ctrl-C becomes 130.
    """

    async def opened() -> int:
        key = os.environ.get("SUTAZAI_KEY", "").strip()
        client = GatewayClient(gateway_url(url, os.environ, Path.cwd()), Secret(key) if key else None)
        try:
            return await work(client)
        finally:
            client.close()

    return guarded(lambda: uvloop.run(opened()))


def guarded(work: Callable[[], int]) -> int:
    """The border of a command: what it returns, or the exit code for what it raised."""
    try:
        code = work()
        sys.stdout.flush()
    except SettingsError as error:
        for mistake in error.mistakes:
            complain(mistake)
        return MISTAKES
    except SutazaiError as error:
        complain(error.message)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # the interpreter flushes once more when it ends, and would complain then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return REFUSED
    return code


def gateway_url(given: str | None, environ: Mapping[str, str], cwd: Path) -> str:
    """
    The gateway's base address: as given, else `SUTAZAI_URL`, else where the settings let it listen.

    A missing `http://` is added, a trailing `/v1` dropped. Raises `BadRequest` or `SettingsError`.
    """
    text = given or environ.get("SUTAZAI_URL")
    if not text:
        text = listening_url(load(find(environ, cwd), environ).server)
    try:
        return node_address(text if "://" in text else f"http://{text}")[0]
    except ValueError as error:
        raise BadRequest(f"The gateway's address {error}.") from error


def listening_url(server: Server) -> str:
    """How this machine reaches the gateway of these settings. Raises `BadRequest` where its port is any free one."""
    if server.port == 0:
        raise BadRequest("`server.port` was 0, so nobody knows the port. Give the address with `--url`.")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
    return f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"


class GatewayClient:
    """One gateway. Every call is bounded in time and raises `SutazaiError` with a sentence for the user."""

    def __init__(self, url: str, key: Secret | None) -> None:
        """Make the client, inside a running event loop; `url` as `gateway_url` gives it."""
        self.url = url
        self._has_key = key is not None
        self._pool = ConnectionPool(url, parse_address(url), connect_s=CONNECT_S)
        self._http = HttpClient(self._pool, bearer=_bearer(key))
        self._mark: bytes | None = None
        """Of what this command wrote or was told: another gateway behind the same address is to know of it."""

    async def ask(
        self, method: str, path: str, value: object = None, *, shape: type[T], within_s: float = ANSWER_S
    ) -> T:
        """An answer of that shape."""
        body = await self.fetch(method, path, value, within_s=within_s)
        try:
            return msgspec.json.decode(body, type=shape)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise NodeRejected(self._strange(200), node=self.url, status=200) from error

    async def fetch(self, method: str, path: str, value: object = None, *, within_s: float = ANSWER_S) -> bytes:
        """The body of a good answer."""
        body = b"" if value is None else msgspec.json.encode(value)
        with self._told(within_s):
            await self._reach()
            async with asyncio.timeout(within_s):
                answer = await self._http.fetch(method, path, body, self._marks())
            self._check(answer)
            self._mark = answer.headers.get(WRITTEN.encode(), self._mark)
        return answer.body

    async def lines(
        self, path: str, value: object, *, idle_s: float, method: str = "POST", headers: Sequence[bytes] = ()
    ) -> AsyncGenerator[bytes, None]:
        """
        The lines of a streamed answer.

        Close it to end the request; the gateway then frees the node at once.
        """
        with self._told(idle_s):
            await self._reach()
            stream = self._http.lines(method, path, value, idle_s=idle_s, headers=[*headers, *self._marks()])
            async with aclosing(cast("AsyncGenerator[bytes, None]", stream)) as lines:
                async for line in lines:
                    if line.startswith(TOLD):
                        self._mark = line.removeprefix(TOLD)
                    yield line

    def close(self) -> None:
        """Drop the connections."""
        self._pool.close()

    def _marks(self) -> Sequence[bytes]:
        return () if self._mark is None else (b"%b: %b" % (WRITTEN.encode(), self._mark),)

    async def _reach(self) -> None:
        """Have a connection first: a gateway that is not there must be told from one that breaks off."""
        try:
            self._pool.keep(self._pool.take_idle() or await self._pool.connect())
        except NodeFault as error:
            message = f"No gateway answered at {self.url}. Start one with `sutazai up`."
            raise NoGateway(message, node=self.url) from error

    @contextmanager
    def _told(self, limit_s: float) -> Iterator[None]:
        """Errors as the user can understand them."""
        try:
            yield
        except NoGateway:
            raise
        except NodeRejected as error:
            raise self._refusal(error) from error
        except TimeoutError as error:
            raise NodeUnreachable(
                f"The gateway at {self.url} did not answer within {limit_s:g} s. Its log may tell why.",
                node=self.url,
            ) from error
        except NodeFault as error:
            raise NodeUnreachable(
                f"The gateway at {self.url} broke off. Ask again; its log may tell why.", node=self.url
            ) from error

    def _check(self, answer: Answer) -> None:
        if not 200 <= answer.status < 300:
            raise NodeRejected(error_message(answer.body), node=self.url, status=answer.status, body=answer.body)

    def _refusal(self, error: NodeRejected) -> SutazaiError:
        """The gateway's own sentence, except where the user's next step is another one."""
        if error.status == 401 and self._has_key:
            return Unauthorized(
                f"The gateway at {self.url} did not know the key in SUTAZAI_KEY. "
                "`sutazai keys list` shows the names of those that it knows."
            )
        if error.status == 401:
            return Unauthorized(
                f"The gateway at {self.url} asked for a key. Set SUTAZAI_KEY; `sutazai keys create NAME` makes one."
            )
        if error.status == 403:
            return Forbidden(error.message)
        if error.status == 404 and b'"error"' not in error.body:
            return NodeRejected(self._strange(error.status), node=self.url, status=error.status)
        return error

    def _strange(self, status: int) -> str:
        return f"{self.url} answered ({status}), but not as a gateway does. Check the address."


class NoGateway(NodeUnreachable):
    """Nobody accepted a connection at the gateway's address."""


def _bearer(key: Secret | None) -> str | None:
    """The key for the header. Raises `Unauthorized` where it could not stand there."""
    if key is None:
        return None
    text = key.reveal()
    if not (text.isascii() and text.isprintable() and " " not in text):
        raise Unauthorized("SUTAZAI_KEY held a space or a character beyond ASCII. Set it to the key alone.")
    return text
