"""
Reading from a queue or stream: a reader that finds its way to another node, and says much in one frame.

A delivery belongs to the wire that it came on. When that ends, the broker gives what was held to somebody else, and
what this reader still says about it is passed over.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import structlog

from sutazai.adapters.rabbitmq.frames import Arrival
from sutazai.adapters.rabbitmq.link import PAUSE_S, TROUBLES, RabbitLink, Wire, explained
from sutazai.adapters.rabbitmq.topology import full_name

log = structlog.get_logger("sutazai.rabbitmq")

Tag = tuple[int, int]
"""The number of a wire, and the number of a delivery on it."""
Say = Callable[[Wire, Sequence[tuple[int, bool]]], None]
"""Says something about deliveries, and where the second is true, about all up to that one."""

_wires = itertools.count(1)


def acknowledged(wire: Wire, tags: Sequence[tuple[int, bool]]) -> None:
    """They are dealt with."""
    wire.lane.acknowledge(tags)


def handed_back(wire: Wire, tags: Sequence[tuple[int, bool]]) -> None:
    """Somebody else is to have them."""
    wire.lane.hand_back(tags)


class Reader:
    """What comes from one queue, on a wire of its own."""

    def __init__(self, link: RabbitLink, queue: str, *, prefetch: int) -> None:
        self._link = link
        self.queue = queue
        self._full_name = full_name(queue, link.settings)
        self._prefetch = prefetch
        self._wire: Wire | None = None
        self._wire_number = 0
        self._arrived: deque[Arrival] = deque()
        self._unsettled: dict[int, None] = {}
        """Tags that were neither acknowledged nor handed back, in their order."""
        self._stirred = asyncio.Event()
        self._holding = asyncio.Lock()
        self._consumer = ""
        """The broker's name for what brings messages on this wire; empty where nothing does."""
        self._asked = 0
        """How many it may bring without having any back."""
        self._before = 0
        """The last delivery that was brought before that one was there."""
        self._arrive: Callable[[Arrival], None] = self._arrived.append

    async def raw(self, at_most: int) -> list[Arrival]:
        """Wait for at least one message; from whichever node has it. Raises `QueueUnavailable`."""
        while True:
            if self._wire is None or not self._wire.is_open:
                await self.open()
            if self._arrived:
                return [self._arrived.popleft() for _ in range(min(max(at_most, 1), len(self._arrived)))]
            await self._wait()

    async def close(self) -> None:
        """Hand back all that is held; on return the node knows, if it answers."""
        wire, self._wire = self._wire, None
        self._let_go()
        if wire is not None:
            await self._link.close(wire)

    async def hold(self, prefetch: int) -> None:
        """As the `Consumer` port says. The broker takes another measure only from a consumer that begins."""
        async with self._holding:
            self._prefetch = prefetch
            wire = self._wire
            before = sum(tag <= self._before for tag in self._unsettled)
            if wire is None or not wire.is_open or max(0, prefetch - before) == self._asked:
                return
            try:
                await self._link.answered(self._hold(wire), self._link.settings.confirm_timeout_s, is_finished=True)
            except TROUBLES as error:
                log.debug("a queue is read anew", queue=self.queue, node=wire.node, reason=explained(error))
                if self._wire is wire:
                    self._hang_up()

    async def _hold(self, wire: Wire) -> None:
        consumer, self._consumer = self._consumer, ""
        if consumer:
            await wire.channel.basic_cancel(consumer)
        if self._wire is not wire:
            return
        surplus = min(max(0, len(self._unsettled) - self._prefetch), len(self._arrived))
        self.settle([self.tag_of(self._arrived.pop()) for _ in range(surplus)], handed_back)
        self._before = max(self._unsettled, default=self._before)
        self._asked = max(0, self._prefetch - len(self._unsettled))
        if self._asked:
            await self._consume(wire)

    async def _consume(self, wire: Wire) -> None:
        await wire.channel.basic_qos(prefetch_count=self._asked)
        told = await wire.channel.basic_consume(self._full_name, self._arrive, arguments=self.arguments())  # type: ignore[arg-type]
        self._consumer = told.consumer_tag or ""

    def arguments(self) -> dict[str, Any]:
        """How the broker is to deliver; asked for anew with each wire."""
        return {}

    async def open(self) -> None:
        """Begin to read, or go on with another node. Raises `QueueUnavailable`."""
        deadline = self._link.deadline()
        while True:
            self._hang_up()
            wire = await self._link.open_wire(deadline)
            try:
                await self._begin(wire)
            except TROUBLES as error:
                self._link.drop(wire)
                log.debug("a queue could not be read", queue=self.queue, node=wire.node, reason=explained(error))
                if asyncio.get_running_loop().time() >= deadline:
                    raise self._link.unavailable(f"{self.queue} could not be read ({explained(error)})") from None
                self._link.forget(self.queue)
                await asyncio.sleep(PAUSE_S)
            except BaseException:
                self._link.drop(wire)
                raise
            else:
                return

    async def _begin(self, wire: Wire) -> None:
        limit_s = self._link.settings.confirm_timeout_s
        await self._link.declare(wire, self.queue)
        number = next(_wires)

        def arrived(message: Arrival) -> None:
            if number == self._wire_number:
                self._unsettled[message.tag] = None
                self._arrived.append(message)
                self._stirred.set()

        def cancelled(_: object) -> None:
            if number == self._wire_number:
                self._hang_up()

        self._wire, self._wire_number = wire, number
        self._arrive, self._asked, self._before = arrived, self._prefetch, 0
        wire.lane.on_arrival = arrived
        wire.channel.on_consumer_cancel_callbacks.add(cancelled)
        wire.channel.closing.add_done_callback(lambda _: self._stirred.set())
        try:
            await self._link.answered(self._consume(wire), limit_s)
        except BaseException:
            self._wire = None
            self._let_go()
            raise

    async def _wait(self) -> None:
        """Until something came, or the wire ended; a wire that is silent is asked whether it is there."""
        self._stirred.clear()
        wire = self._wire
        if self._arrived or wire is None or not wire.is_open:
            return
        try:
            async with asyncio.timeout(self._link.settings.heartbeat_s):
                await self._stirred.wait()
        except TimeoutError:
            try:
                await self._link.answered(
                    wire.channel.basic_qos(prefetch_count=self._asked), self._link.settings.confirm_timeout_s
                )
            except TROUBLES as error:
                log.warning("a node of RabbitMQ fell silent", node=wire.node, reason=explained(error))
                self._hang_up()

    def settle(self, which: Iterable[Tag], say: Say) -> None:
        """
        Say something about deliveries, in as few frames as can be: about one, or all up to it.

        The broker answers nothing to that; where the wire ends meanwhile, the deliveries go to others.
        """
        wire = self._wire
        if wire is None or not wire.is_open:
            return
        tags = {tag for number, tag in which if number == self._wire_number}
        tags &= self._unsettled.keys()
        up_to = max(itertools.takewhile(tags.__contains__, self._unsettled), default=0)
        if not tags:
            return
        for tag in tags:
            del self._unsettled[tag]
        try:
            say(wire, [(tag, tag == up_to) for tag in sorted(tags) if tag >= up_to])
        except TROUBLES as error:
            log.debug("what was held went to others", queue=self.queue, node=wire.node, reason=explained(error))
            self._hang_up()

    def tag_of(self, message: Arrival) -> Tag:
        """What to call a message by that `raw` gave a moment ago."""
        return self._wire_number, message.tag

    def _hang_up(self) -> None:
        wire, self._wire = self._wire, None
        self._let_go()
        if wire is not None:
            self._link.drop(wire)

    def _let_go(self) -> None:
        self._wire_number = 0
        self._arrived.clear()
        self._unsettled.clear()
        self._stirred.set()
