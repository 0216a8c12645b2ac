"""
The servers behind an address: one alone, a master that Sentinels name, or a Cluster.

Each arrangement offers the driver's client for commands, a look around (who is master now, do they answer), and a
connection of one's own for subscriptions. Time limits are the caller's, so nothing here retries.
"""

from __future__ import annotations

import asyncio
import random
import socket
from typing import Any, ClassVar, Protocol, TypeAlias

from redis.asyncio import Connection, ConnectionPool, Redis, RedisCluster, Sentinel, SSLConnection
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool, SentinelManagedConnection, SentinelManagedSSLConnection
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, ReadOnlyError
from redis.exceptions import TimeoutError as RedisTimeout

from sutazai.adapters.redis.address import Address, Arranged

MAX_CONNECTIONS = 50
"""To one server."""
CONNECT_S = 0.5
"""For one connection, unless requests may take longer: mostly their own limit bounds them more tightly."""
ANSWER_S = 0.5
"""For a Sentinel to be reached, and to answer: then the next one is asked."""
KEEP_ALIVE = {socket.TCP_KEEPIDLE: 1, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 5}
"""Seconds, seconds and tries: a peer that vanished is noticed within six seconds where nothing else notices."""

Client: TypeAlias = "Redis | RedisCluster"


class Servers(Protocol):
    """One arrangement of servers."""

    @property
    def client(self) -> Client:
        """For commands. Each connects when it is first needed."""

    is_lost_at_once: ClassVar[bool]
    """A connection that breaks leaves the client without a layout: it has to look around afresh before it is used."""

    async def look_around(self, *, afresh: bool) -> None:
        """
        Find out who is master and that every master answers; raises what the driver raises where one does not.

        `afresh` forgets what was known of the layout, which takes a Cluster's client some milliseconds to learn.
        """

    async def own_connection(self) -> Connection:
        """A connection to a master outside of the pool, open; the caller disconnects it."""

    async def close(self) -> None:
        """Drop all connections."""


def servers_at(address: Address, *, patience_s: float) -> Servers:
    """The servers of an address, for requests that wait so long; nothing is sent to them yet."""
    kwargs = _connection(address, connect_s=max(CONNECT_S, patience_s))
    match address.arranged:
        case Arranged.ALONE:
            return Alone(address, kwargs)
        case Arranged.SENTINEL:
            return Watched(address, kwargs)
        case Arranged.CLUSTER:
            return Sharded(address, kwargs)


class Alone:
    """One server."""

    is_lost_at_once: ClassVar[bool] = False

    def __init__(self, address: Address, kwargs: dict[str, Any]) -> None:
        host, port = address.hosts[0]
        self._pool = ConnectionPool(
            connection_class=SSLConnection if address.is_tls else Connection,
            max_connections=MAX_CONNECTIONS,
            host=host,
            port=port,
            db=address.db,
            retry=_never_again(),
            retry_on_error=[],
            **kwargs,
        )
        self.client = Redis.from_pool(self._pool)

    async def look_around(self, *, afresh: bool) -> None:
        await _check_is_master(self.client)

    async def own_connection(self) -> Connection:
        return await _opened(self._pool.make_connection())  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        await self.client.aclose()


class Watched:
    """A master that Sentinels watch, and replace."""

    is_lost_at_once: ClassVar[bool] = False

    def __init__(self, address: Address, kwargs: dict[str, Any]) -> None:
        self._sentinel = Sentinel([])  # type: ignore[no-untyped-call]
        self._sentinel.sentinels = [_sentinel(address, host, port) for host, port in address.hosts]
        self._pool = SentinelConnectionPool(  # type: ignore[no-untyped-call]
            address.master,
            self._sentinel,
            connection_class=SentinelManagedSSLConnection if address.is_tls else SentinelManagedConnection,
            max_connections=MAX_CONNECTIONS,
            db=address.db,
            retry=_never_again(),
            retry_on_error=[],
            **kwargs,
        )
        self.client = Redis.from_pool(self._pool)

    async def look_around(self, *, afresh: bool) -> None:
        # drops idle connections to a server that is master no more
        await self._pool.get_master_address()  # type: ignore[no-untyped-call]
        await _check_is_master(self.client)

    async def own_connection(self) -> Connection:
        return await _opened(self._pool.make_connection())  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        await self.client.aclose()
        await self._sentinel.aclose()


class Sharded:
    """A Cluster: each master has a part of the keys."""

    is_lost_at_once: ClassVar[bool] = True

    def __init__(self, address: Address, kwargs: dict[str, Any]) -> None:
        self._kwargs = kwargs
        self._connection_class = SSLConnection if address.is_tls else Connection
        self.client = RedisCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in address.hosts],
            require_full_coverage=False,
            reinitialize_steps=0,
            retry=_never_again(),
            max_connections=MAX_CONNECTIONS,
            ssl=address.is_tls,
            **self._kwargs,
        )

    async def look_around(self, *, afresh: bool) -> None:
        if afresh:
            await self.client.nodes_manager.initialize()
        await self.client.initialize()
        for node in self.client.get_primaries():
            await _check_is_master(node)

    async def own_connection(self) -> Connection:
        known = self.client.get_primaries() or list(self.client.startup_nodes)
        # any will do, for they pass on what is published; another each time, for one may be away
        node = random.choice(known)  # noqa: S311
        return await _opened(
            self._connection_class(host=node.host, port=node.port, retry=_never_again(), **self._kwargs)
        )

    async def close(self) -> None:
        await self.client.aclose()


class _ToSentinel(Connection):
    """To a Sentinel, which often has no password where the servers have one."""

    async def connect(self) -> None:
        try:
            await super().connect()  # type: ignore[no-untyped-call]
        except AuthenticationError as error:
            if "without any password" not in str(error):
                raise
            self.username = self.password = None
            await super().connect()  # type: ignore[no-untyped-call]

    async def read_response(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await super().read_response(*arguments, **keywords)
        except TimeoutError as error:
            raise RedisTimeout("The Sentinel did not answer") from error


class _ToSentinelTLS(_ToSentinel, SSLConnection):
    pass


def _sentinel(address: Address, host: str, port: int) -> Redis:
    pool = ConnectionPool(
        connection_class=_ToSentinelTLS if address.is_tls else _ToSentinel,
        max_connections=MAX_CONNECTIONS,
        host=host,
        port=port,
        retry=_never_again(),
        retry_on_error=[],
        **_connection(address, connect_s=ANSWER_S),
    )
    return Redis.from_pool(pool)


def _connection(address: Address, *, connect_s: float) -> dict[str, Any]:
    return {
        "username": address.username,
        "password": address.password.reveal() if address.password is not None else None,
        # The limit on a request is ours. The driver's own uses `wait_for`, which on Python 3.11 makes a task of each
        # command, and may lose a cancellation: then a request would wait for ever.
        "socket_timeout": None,
        "socket_connect_timeout": connect_s,
        "socket_keepalive": True,
        "socket_keepalive_options": KEEP_ALIVE,
        "client_name": "sutazai",
        "driver_info": None,
        # the third protocol costs a trip for each connection and brings nothing that we use
        "protocol": 2,
    }


def _never_again() -> Retry:
    return Retry(NoBackoff(), 0)


async def _opened(connection: Any) -> Connection:
    try:
        await connection.connect()
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    opened: Connection = connection
    return opened


async def _check_is_master(server: Redis | ClusterNode) -> None:
    try:
        role = await server.execute_command("ROLE")
    except NoPermissionError:
        return  # it answers; an account that may not ask its role has to be trusted to write
    if role[0] != b"master":
        raise ReadOnlyError("The server was a replica")
