"""
The one way to Redis: every command under one time limit, and every trouble as `StoreUnavailable`.

Redis serves requests here, and must never cost them much. A command that is not answered in time is given up with its
connection, so that nobody is given the answer to somebody else's. After a few failures Redis counts as away: then
commands fail at once, without a wait, while one task looks whether it is back.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from hashlib import sha1
from typing import Any, TypeVar

import structlog
from redis.asyncio import Connection
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    NoScriptError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from sutazai.adapters.redis.address import parse
from sutazai.adapters.redis.servers import MAX_CONNECTIONS, Client, Servers, servers_at
from sutazai.core.errors import StoreUnavailable
from sutazai.settings import model
from sutazai.settings.secret import Secret

log = structlog.get_logger("sutazai.redis")

T = TypeVar("T")

TROUBLE_AWAY = 3.0
"""So many failures in a row, or somewhat more among successes, and Redis counts as away."""
TROUBLE_KEPT = 0.9
"""Of the trouble so far, after a success: where a fifth of all commands fails, Redis counts as away too."""
LOOK_S = 1.0
"""For one look around, which may have to connect to several servers and to ask them for their roles."""
CHECK_EVERY_S = 2.0
"""While all is well: so that mostly a look, and no request, is the first to find Redis gone."""
PAUSE_S = 0.05
"""Before the second look; doubles with each."""
MAX_PAUSE_S = 2.0
STEADY_S = 10.0
"""Only when Redis was well for so long do the pauses begin anew."""
PING_EVERY_S = 1.5
"""On a connection that waits for messages."""
SILENT_S = 4.0
"""A connection that waits for messages and heard nothing for so long, not even the answer to a ping, is dead."""
COMPLAIN_EVERY_S = 60.0
"""A server that refuses commands is named in the log so often."""

TROUBLES = (RedisError, RedisClusterException, OSError, RuntimeError, AttributeError)
"""What the driver raises. The last two where a connection is cut by one task while another uses it."""


class Script:
    """A Lua script, sent once to each server and then named by its digest."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = sha1(source.encode(), usedforsecurity=False).hexdigest()

    async def run(self, client: Client, keys: Sequence[bytes], arguments: Sequence[bytes | str | int | float]) -> Any:
        """Run it as part of a command; `keys` are all of one slot."""
        try:
            return await client.execute_command("EVALSHA", self.digest, len(keys), *keys, *arguments)
        except NoScriptError:
            return await client.execute_command("EVAL", self.source, len(keys), *keys, *arguments)


class RedisLink:
    """Redis, as this process sees it. Made by `open_redis`."""

    def __init__(self, servers: Servers, settings: model.Redis, name: str) -> None:
        self._servers = servers
        self._prefix = settings.prefix.encode()
        self._timeout_s = settings.timeout_s
        self._name = name
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._trouble = 0.0
        self._why = "was not reached yet"
        self._went = asyncio.Event()
        self._complained_at = float("-inf")
        self.is_up = False
        """Whether commands are tried at all."""
        self.asked = 0
        """Commands that were tried."""
        self.failed = 0
        """Of these, how many were not answered in time, or not at all."""
        self.refused = 0
        """Of these, how many the server refused: out of memory, say."""
        self.spared = 0
        """Commands that were not tried, because Redis was away."""
        self.times_lost = 0
        """How often it went away."""

    def __repr__(self) -> str:
        return f"RedisLink({self._name!r}, is_up={self.is_up})"

    def key(self, *parts: str | bytes, slot: str | bytes) -> bytes:
        """A key of ours. All keys of one `slot` are on one server of a Cluster, so one script can use them."""
        named = slot.encode() if isinstance(slot, str) else slot
        if not named or b"}" in named:  # would end the part that is hashed early, or make it the whole key
            named = b"%" + named.hex().encode()
        tail = (part.encode() if isinstance(part, str) else part for part in parts)
        return b":".join((self._prefix, b"{" + named + b"}", *tail))

    def channel(self, name: str) -> bytes:
        """A channel of ours."""
        return self._prefix + b":" + name.encode()

    async def ask(self, command: Callable[[Client], Awaitable[T]], *, within_s: float | None = None) -> T:
        """
        Run one command, or several that belong together, and return what it returned.

        Args:
            within_s: bound on all of it, waiting for a free connection included; None = `redis.timeout_s`. Only for
                work that no request waits for.

        Raises `StoreUnavailable` where it was not answered, refused, or not even tried because Redis is away. After a
        time-out it may have taken place.
        """
        if not self.is_up:
            self.spared += 1
            raise StoreUnavailable(f"Redis at {self._name} {self._why}.")
        self.asked += 1
        limit_s = within_s or self._timeout_s
        try:
            async with asyncio.timeout(limit_s), self._room:
                answer = await command(self._servers.client)
        except TimeoutError as error:
            raise self._failed(f"did not answer within {limit_s * 1000:.0f} ms") from error
        except (ClusterDownError, ReadOnlyError) as error:  # refusals that end with a new master
            raise self._failed(_told(error), is_certain=True) from error
        except ResponseError as error:
            raise self._was_refused(error) from error
        except TROUBLES as error:
            raise self._failed(_told(error), is_certain=self._servers.is_lost_at_once) from error
        self._trouble *= TROUBLE_KEPT
        return answer

    async def run(
        self,
        script: Script,
        keys: Sequence[bytes],
        arguments: Sequence[bytes | str | int | float] = (),
        *,
        within_s: float | None = None,
    ) -> Any:
        """Run a script; `keys` are all of one slot. Raises as `ask` does."""
        return await self.ask(lambda client: script.run(client, keys, arguments), within_s=within_s)

    async def publish(self, channel: bytes, message: bytes) -> None:
        """Tell all that subscribe, in other gateways too; raises as `ask` does."""
        await self.ask(lambda client: client.execute_command("PUBLISH", channel, message))

    async def subscribe(self, channel: bytes) -> AsyncGenerator[bytes | None, None]:
        """
        What is published on a channel from now on, as it comes.

        Yields None after messages may have been missed: whenever it is subscribed again, and at first where that did
        not succeed at once. Never ends; raises only on cancellation. Close it with `aclosing`.
        """
        missed = False
        pauses = Pauses()
        while True:
            with suppress(TimeoutError, *TROUBLES):
                async with self._subscribed(channel) as connection:
                    if missed:
                        yield None
                    async for message in _messages(connection):
                        yield message
            missed = True
            await asyncio.sleep(pauses.next_s())

    @asynccontextmanager
    async def _subscribed(self, channel: bytes) -> AsyncIterator[Connection]:
        connection: Connection | None = None
        try:
            async with asyncio.timeout(LOOK_S):
                connection = await self._servers.own_connection()
                await connection.send_command("SUBSCRIBE", channel)
                await connection.read_response()
            yield connection
        finally:
            if connection is not None:
                await connection.disconnect(nowait=True)

    # what is believed of Redis

    def _failed(self, why: str, *, is_certain: bool = False) -> StoreUnavailable:
        self.failed += 1
        self._trouble = TROUBLE_AWAY if is_certain else self._trouble + 1.0
        if self._trouble >= TROUBLE_AWAY:
            self._lost(why)
        return StoreUnavailable(f"Redis at {self._name} {why}.")

    def _was_refused(self, error: ResponseError) -> StoreUnavailable:
        """It works and says no: to a write when its memory is full, to what an account may not do."""
        self.refused += 1
        now = time.monotonic()
        if now - self._complained_at >= COMPLAIN_EVERY_S:
            self._complained_at = now
            log.warning("redis refused", at=self._name, why=_told(error))
        return StoreUnavailable(f"Redis at {self._name} {_told(error)}.")

    def _lost(self, why: str) -> None:
        self._why = why
        if self.is_up:
            self.is_up = False
            self.times_lost += 1
            self._went.set()
            log.warning("redis lost", at=self._name, why=why)

    def _found(self) -> None:
        self._trouble = 0.0
        self._went.clear()
        if not self.is_up:
            self.is_up = True
            log.info("redis found", at=self._name)

    async def watch(self, looked: asyncio.Event) -> None:
        """Keep `is_up` true to the facts, until cancelled; `looked` is set after the first look. For `open_redis`."""
        pauses = Pauses()
        while True:
            why = await self._look()
            if why is None:
                self._found()
            elif self.is_up:
                # one late answer may be our own fault: so many looks have to fail as commands
                self._failed(why)
            elif why != self._why:
                self._why = why
                log.warning("redis away", at=self._name, why=why)
            looked.set()
            if self.is_up:
                with suppress(TimeoutError):
                    async with asyncio.timeout(CHECK_EVERY_S if why is None else PAUSE_S):
                        await self._went.wait()
            if not self.is_up:
                await asyncio.sleep(pauses.next_s())

    async def _look(self) -> str | None:
        """What is wrong; None where nothing is. A server that answers, but not in time, is no use either."""
        try:
            async with asyncio.timeout(LOOK_S):
                await self._servers.look_around(afresh=not self.is_up)
            async with asyncio.timeout(self._timeout_s):
                await self._servers.client.execute_command("PING")
        except TimeoutError:
            return "did not answer in time"
        except Exception as error:  # one look; the next may be luckier
            return _told(error)
        return None


@asynccontextmanager
async def open_redis(settings: model.Redis) -> AsyncIterator[RedisLink]:
    """
    Redis as the settings name it; `settings.url` is not None.

    Looks once for it, for about a second at most, and goes on without where it is away. Raises `SettingsError` where
    the address was not understood.
    """
    address = parse(settings.url or Secret(""))
    servers = servers_at(address, patience_s=settings.timeout_s)
    link = RedisLink(servers, settings, str(address))
    looked = asyncio.Event()
    watching = asyncio.create_task(link.watch(looked), name="watch redis")
    try:
        await looked.wait()
        yield link
    finally:
        link.is_up = False
        watching.cancel()
        await asyncio.wait([watching])
        with suppress(TimeoutError, *TROUBLES):
            async with asyncio.timeout(LOOK_S):
                await servers.close()


class Pauses:
    """Between attempts: none before the first, then longer and longer ones; anew after ten seconds without any."""

    def __init__(self) -> None:
        self._pause_s = 0.0
        self._since = float("-inf")

    def next_s(self) -> float:
        """The pause to make now."""
        now = time.monotonic()
        is_new = now - self._since > self._pause_s + STEADY_S
        self._pause_s = 0.0 if is_new else min(MAX_PAUSE_S, max(PAUSE_S, 2 * self._pause_s))
        self._since = now
        return self._pause_s * random.uniform(0.5, 1.0)  # noqa: S311


async def _messages(connection: Connection) -> AsyncIterator[bytes]:
    """What comes on a connection that subscribed; raises where it is dead."""
    heard_at = time.monotonic()
    while True:
        said = await connection.read_response(timeout=PING_EVERY_S)
        if said is not None:
            heard_at = time.monotonic()
            if said[0] == b"message":
                yield said[2]
        elif time.monotonic() - heard_at > SILENT_S:
            raise TimeoutError
        else:
            async with asyncio.timeout(PING_EVERY_S):
                await connection.send_command("PING")


def _told(error: Exception) -> str:
    """What happened, without the arguments of commands that drivers and servers like to quote."""
    text = str(error).rstrip(".")
    if isinstance(error, AuthenticationError) or "AuthenticationError" in text:
        return "refused the name or the password; correct `redis.url`"
    if isinstance(error, MasterNotFoundError):
        return "has no master that a Sentinel could name; check the name after the last `/` of `redis.url`"
    if isinstance(error, ReadOnlyError):
        return "was a replica, which takes no writes"
    if isinstance(error, ResponseError):
        return f"refused: {text.partition(', with args')[0][:200]}"
    if isinstance(error, RedisClusterException) and not text.startswith("Redis Cluster cannot be connected"):
        return "was not reached: no server of the Cluster was known to have the keys"
    return f"was not reached: {text[:200] or type(error).__name__}"
