"""
The way to RabbitMQ: wires to whichever node answers, queues that are declared, and every trouble as `QueueUnavailable`.

A wire is one connection with one channel. What a wire promised goes with it, so nobody repairs one: whoever used it
opens another, to the next node, and does again what was not confirmed. Everything that the driver does is run in a
task of its own, because it cancels whoever waits for a connection that ends, and that must not be taken for a
cancellation of ours.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import aio_pika
import structlog
from aio_pika.abc import AbstractConnection, ConnectionParameter
from aiormq.abc import AbstractChannel
from aiormq.channel import Channel
from aiormq.exceptions import (
    AMQPError,
    AuthenticationError,
    ChannelAccessRefused,
    ChannelPreconditionFailed,
    ConnectionNotAllowed,
    ProbableAuthenticationError,
)
from yarl import URL

from sutazai.adapters.rabbitmq.address import Address, Node
from sutazai.adapters.rabbitmq.express import Express, Lane
from sutazai.adapters.rabbitmq.topology import DEAD_LETTERS, Declaration, declaration_of
from sutazai.core.errors import QueueUnavailable
from sutazai.settings import model

log = structlog.get_logger("sutazai.rabbitmq")

T = TypeVar("T")

TROUBLES = (AMQPError, OSError, RuntimeError, EOFError, AttributeError, TimeoutError)
"""What the driver raises. `AttributeError` where a connection is cut while another task uses it."""
REFUSALS = (AuthenticationError, ProbableAuthenticationError, ConnectionNotAllowed, ChannelAccessRefused)
"""Another node, or another time, would say the same."""
PAUSE_S = 0.05
"""After all nodes failed; doubles each time."""
MAX_PAUSE_S = 1.0
CLOSE_S = 3.0
"""For the goodbye to a node; one that stalls gets none."""


@dataclass(frozen=True, slots=True, eq=False)
class Wire:
    """A connection to one node, and a channel on it."""

    node: str
    connection: AbstractConnection
    channel: Channel
    lane: Lane
    """For what comes and goes on the channel by the thousand."""

    @property
    def is_open(self) -> bool:
        """Whether it was not seen to end."""
        return not self.channel.is_closed and not self.connection.is_closed


@dataclass(slots=True)
class Figures:
    """What this process has seen of the cluster since it began."""

    wires_opened: int = 0
    """More than a few tell of trouble."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Messages that were published, by what became of them."""
    replaced: int = 0
    """Publishers that were given up: told no too often, or their connection ended."""


class _Connection(aio_pika.Connection):
    """One that may be given its transport."""

    PARAMETERS = (
        *aio_pika.Connection.PARAMETERS,
        ConnectionParameter(name="transport_factory", parser=lambda factory: factory, is_kwarg=True),
    )


class RabbitLink:
    """The cluster, as this process sees it."""

    def __init__(self, address: Address, settings: model.Rabbitmq) -> None:
        self.settings = settings
        self._address = address
        self._next = random.randrange(len(address.nodes))  # noqa: S311 - spreads processes over the nodes
        self._declared: set[str] = set()
        self._declaring: dict[tuple[Wire, str], asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[Any]] = set()
        """Goodbyes, and what was given up and is about to notice."""
        self._wires: set[Wire] = set()
        self.figures = Figures()

    def __repr__(self) -> str:
        return f"RabbitLink({str(self._address)!r})"

    @property
    def wires(self) -> int:
        """Those that are open."""
        return sum(wire.is_open for wire in self._wires)

    def deadline(self) -> float:
        """The time of the loop until which a call that begins now may go on."""
        return asyncio.get_running_loop().time() + self.settings.timeout_s

    async def answered(
        self,
        work: Coroutine[Any, Any, T],
        within_s: float,
        *,
        unwanted: Callable[[T], object] | None = None,
        is_finished: bool = False,
    ) -> T:
        """
        Run something of the driver's, for so long at most.

        Args:
            unwanted: given the result where nobody waits for it any more.
            is_finished: it goes on when whoever waits is cancelled.

        Raises one of `TROUBLES`; a cancellation is always our own.
        """
        task = asyncio.create_task(work, name="RabbitMQ is asked")
        try:
            done, _ = await asyncio.wait({task}, timeout=within_s)
        except asyncio.CancelledError:
            self._give_up(task, unwanted, is_finished=is_finished)
            raise
        if not done:
            self._give_up(task, unwanted)
            raise TimeoutError(f"no answer within {within_s:.3g} s")
        if task.cancelled():
            raise ConnectionError("the connection ended")
        if type(error := task.exception()) is Exception:  # what the driver tells who waits where it knows no reason
            raise ConnectionError("the connection ended") from error
        return task.result()

    def _give_up(
        self, task: asyncio.Task[T], unwanted: Callable[[T], object] | None, *, is_finished: bool = False
    ) -> None:
        """End it without a wait: a driver that connects to a node that stalls takes seconds to notice."""

        def ended(ended_task: asyncio.Task[T]) -> None:
            self._ending.discard(ended_task)
            if not ended_task.cancelled() and ended_task.exception() is None and unwanted is not None:
                unwanted(ended_task.result())

        self._ending.add(task)
        task.add_done_callback(ended)
        if not is_finished:
            task.cancel()

    async def open_wire(self, deadline: float) -> Wire:
        """A wire to the next node that answers. Raises `QueueUnavailable` when none did until `deadline`."""
        pause_s, tried, why = PAUSE_S, 0, "no time was left"
        while (left_s := deadline - asyncio.get_running_loop().time()) > 0:
            node = self._address.nodes[self._next % len(self._address.nodes)]
            self._next += 1
            try:
                return await self._open(node, min(left_s, self.settings.connect_timeout_s))
            except REFUSALS as error:
                raise self.unavailable(f"{node.name} refused us ({explained(error)})") from None
            except TROUBLES as error:
                why = f"{node.name}: {explained(error)}"
            tried += 1
            if tried % len(self._address.nodes) == 0:
                await asyncio.sleep(min(pause_s, left_s))
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        raise self.unavailable(f"no node answered within {self.settings.timeout_s:g} s ({why})")

    async def _open(self, node: Node, within_s: float) -> Wire:
        async def opened() -> Wire:
            express = Express()
            connection = _Connection(URL(node.url.reveal()), transport_factory=express)
            await connection.connect()
            try:
                opened_channel = await connection.channel(publisher_confirms=True)
                channel = cast("Channel", await opened_channel.get_underlay_channel())
                return Wire(node.name, connection, channel, express.lane(channel))
            except BaseException:
                self._close_soon(connection)
                raise

        wire = await self.answered(opened(), within_s, unwanted=self.drop)
        self._wires = {each for each in self._wires if each.is_open} | {wire}
        self.figures.wires_opened += 1
        log.debug("a connection to RabbitMQ was opened", node=node.name)
        return wire

    async def declare(self, wire: Wire, name: str) -> None:
        """Make sure of a queue, once for all who ask meanwhile. Raises one of `TROUBLES`."""
        if name in self._declared:
            return
        task = self._declaring.get((wire, name))
        if task is None:
            task = asyncio.create_task(self._declare(wire, name), name=f"declare {name}")
            self._declaring[wire, name] = task
            task.add_done_callback(lambda _: self._declaring.pop((wire, name)))
        await asyncio.wait({task})
        task.result()

    async def _declare(self, wire: Wire, name: str) -> None:
        declaration = declaration_of(name, self.settings)
        if declaration.has_dead_letters:
            await self.declare(wire, DEAD_LETTERS)
        if name == DEAD_LETTERS:
            await self._on_channel(wire, lambda channel: _declare_exchange(channel, declaration.name))
        await self._declare_queue(wire, declaration)
        if name == DEAD_LETTERS:
            await self._on_channel(
                wire, lambda channel: channel.queue_bind(declaration.name, declaration.name, declaration.name)
            )
        self._declared.add(name)

    def forget(self, name: str) -> None:
        """Declare a queue again when it is used next: somebody deleted it."""
        self._declared.discard(name)

    async def waiting(self, wire: Wire, name: str) -> int:
        """Messages of a queue that are with no consumer. Raises one of `TROUBLES`."""
        return (await self.counts(wire, name))[0]

    async def counts(self, wire: Wire, name: str) -> tuple[int, int]:
        """Messages of a queue that are with no consumer, and its consumers. Raises one of `TROUBLES`."""
        full_name = declaration_of(name, self.settings).name
        told = await self._on_channel(wire, lambda channel: channel.queue_declare(full_name, passive=True))
        return int(told.message_count or 0), int(told.consumer_count or 0)

    async def is_as_declared(self, wire: Wire, name: str) -> bool:
        """Whether a queue that is there is what the settings say. Raises one of `TROUBLES`."""
        declaration = declaration_of(name, self.settings)
        try:
            await self._on_channel(
                wire,
                lambda channel: channel.queue_declare(
                    declaration.name, durable=True, arguments=dict(declaration.arguments)
                ),
            )
        except ChannelPreconditionFailed:
            return False
        return True

    async def _declare_queue(self, wire: Wire, declaration: Declaration) -> None:
        try:
            await self._on_channel(
                wire,
                lambda channel: channel.queue_declare(
                    declaration.name, durable=True, arguments=dict(declaration.arguments)
                ),
            )
        except ChannelPreconditionFailed as error:
            # A setting was changed since, or somebody imported other definitions: no reason to stand still.
            log.warning(
                "a queue is used as it was declared before, which is not what the settings say;"
                " delete it when it is empty, and it is declared anew",
                queue=declaration.name,
                reason=explained(error),
            )

    async def _on_channel(self, wire: Wire, ask: Callable[[AbstractChannel], Coroutine[Any, Any, T]]) -> T:
        """Ask on a channel that may be lost: the broker ends the channel of whoever asked something wrong."""

        async def asked() -> T:
            channel = await (await wire.connection.channel(publisher_confirms=False)).get_underlay_channel()
            try:
                return await ask(channel)
            finally:
                if not channel.is_closed:
                    await channel.close()

        return await self.answered(asked(), self.settings.confirm_timeout_s)

    def drop(self, wire: Wire) -> None:
        """Be done with a wire: what it held is handed back. Returns at once."""
        self._close_soon(wire.connection)

    async def close(self, wire: Wire) -> None:
        """Be done with a wire, and return when the node knows, or does not answer."""
        await asyncio.wait({self._close_soon(wire.connection)})

    async def closed(self) -> None:
        """Wait for the goodbyes under way."""
        ending = self._ending | set(self._declaring.values())
        if ending:
            _, late = await asyncio.wait(ending, timeout=2 * CLOSE_S)
            for task in late:
                task.cancel()

    def _close_soon(self, connection: AbstractConnection) -> asyncio.Task[None]:
        closing = asyncio.create_task(_close(connection), name="goodbye to RabbitMQ")
        self._ending.add(closing)
        closing.add_done_callback(self._ending.discard)
        return closing

    def unavailable(self, why: str) -> QueueUnavailable:
        """The error to raise."""
        return QueueUnavailable(
            f"RabbitMQ at {self._address} was not available: {why}. See that a majority of its nodes run"
            " (`rabbitmqctl cluster_status`) and that `rabbitmq.url` names them; no task is lost."
        )


def quiet_the_driver() -> None:
    """It logs each end of a connection with its traceback; what matters of it is in our errors."""
    for name in ("aiormq", "aio_pika"):
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())
        logger.propagate = False


async def _declare_exchange(channel: AbstractChannel, name: str) -> None:
    await channel.exchange_declare(name, exchange_type="direct", durable=True)


async def _close(connection: AbstractConnection) -> None:
    closing = asyncio.create_task(connection.close(), name="goodbye to RabbitMQ")
    done, _ = await asyncio.wait({closing}, timeout=CLOSE_S)
    if not done:
        closing.cancel()
        await asyncio.wait({closing}, timeout=CLOSE_S)
    elif not closing.cancelled():
        closing.exception()  # it is gone either way


def explained(error: BaseException) -> str:
    """An error of the driver's in a few words."""
    text = str(error).replace("\n", " ").strip()
    return text[:200] or type(error).__name__
