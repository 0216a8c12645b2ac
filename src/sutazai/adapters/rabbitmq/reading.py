"""
Reading from a queue or stream: a reader that finds its way to another node, and says much in one frame.

A delivery belongs to the line that it came on. When that ends, the broker gives what was held to somebody else, and
what this reader still says about it is passed over.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import structlog
from aiormq.abc import DeliveredMessage

from sutazai.adapters.rabbitmq.link import PAUSE_S, TROUBLES, Line, RabbitLink, explained
from sutazai.adapters.rabbitmq.topology import full_name

log = structlog.get_logger("sutazai.rabbitmq")

Tag = tuple[int, int]
"""The number of a line, and the number of a delivery on it."""
Say = Callable[[Line, int, bool], Awaitable[Any]]
"""Says something about one delivery, or, where the last is true, about all up to it."""

_lines = itertools.count(1)


async def acknowledged(line: Line, tag: int, multiple: bool) -> None:
    """They are dealt with."""
    await line.channel.basic_ack(tag, multiple=multiple)


async def handed_back(line: Line, tag: int, multiple: bool) -> None:
    """Somebody else is to have them."""
    await line.channel.basic_nack(tag, multiple=multiple, requeue=True)


class Reader:
    """What comes from one queue, on a line of its own."""

    def __init__(self, link: RabbitLink, queue: str, *, prefetch: int) -> None:
        self._link = link
        self.queue = queue
        self._full_name = full_name(queue, link.settings)
        self._prefetch = prefetch
        self._line: Line | None = None
        self._line_number = 0
        self._arrived: deque[DeliveredMessage] = deque()
        self._unsettled: dict[int, None] = {}
        """Tags that were neither acknowledged nor handed back, in their order."""
        self._stirred = asyncio.Event()

    async def raw(self, at_most: int) -> list[DeliveredMessage]:
        """Wait for at least one message; from whichever node has it. Raises `QueueUnavailable`."""
        while True:
            if self._line is None or not self._line.is_open:
                await self.open()
            if self._arrived:
                return [self._arrived.popleft() for _ in range(min(max(at_most, 1), len(self._arrived)))]
            await self._wait()

    async def close(self) -> None:
        """Hand back all that is held; on return the node knows, if it answers."""
        line, self._line = self._line, None
        self._let_go()
        if line is not None:
            await self._link.close(line)

    def arguments(self) -> dict[str, Any]:
        """How the broker is to deliver; asked for anew with each line."""
        return {}

    async def open(self) -> None:
        """Begin to read, or go on with another node. Raises `QueueUnavailable`."""
        deadline = self._link.deadline()
        while True:
            self._hang_up()
            line = await self._link.open_line(deadline)
            try:
                await self._begin(line)
            except TROUBLES as error:
                self._link.drop(line)
                log.debug("a queue could not be read", queue=self.queue, node=line.node, reason=explained(error))
                if asyncio.get_running_loop().time() >= deadline:
                    raise self._link.unavailable(f"{self.queue} could not be read ({explained(error)})") from None
                self._link.forget(self.queue)
                await asyncio.sleep(PAUSE_S)
            except BaseException:
                self._link.drop(line)
                raise
            else:
                return

    async def _begin(self, line: Line) -> None:
        limit_s = self._link.settings.confirm_timeout_s
        await self._link.declare(line, self.queue)
        await self._link.answered(line.channel.basic_qos(prefetch_count=self._prefetch), limit_s)
        number = next(_lines)

        def arrived(message: DeliveredMessage) -> None:
            if number == self._line_number and message.delivery_tag is not None:
                self._unsettled[message.delivery_tag] = None
                self._arrived.append(message)
                self._stirred.set()

        def cancelled(_: object) -> None:
            if number == self._line_number:
                self._hang_up()

        self._line, self._line_number = line, number
        line.channel.on_consumer_cancel_callbacks.add(cancelled)
        line.channel.closing.add_done_callback(lambda _: self._stirred.set())
        try:
            await self._link.answered(
                line.channel.basic_consume(self._full_name, arrived, arguments=self.arguments()),  # type: ignore[arg-type]
                limit_s,
            )
        except BaseException:
            self._line = None
            self._let_go()
            raise

    async def _wait(self) -> None:
        """Until something came, or the line ended; a line that is silent is asked whether it is there."""
        self._stirred.clear()
        line = self._line
        if self._arrived or line is None or not line.is_open:
            return
        try:
            async with asyncio.timeout(self._link.settings.heartbeat_s):
                await self._stirred.wait()
        except TimeoutError:
            try:
                await self._link.answered(
                    line.channel.basic_qos(prefetch_count=self._prefetch), self._link.settings.confirm_timeout_s
                )
            except TROUBLES as error:
                log.warning("a node of RabbitMQ fell silent", node=line.node, reason=explained(error))
                self._hang_up()

    async def settle(self, which: Iterable[Tag], say: Say) -> None:
        """Say something about deliveries, in as few frames as can be: about one, or all up to it."""
        line = self._line
        if line is None or not line.is_open:
            return
        tags = {tag for number, tag in which if number == self._line_number}
        tags &= self._unsettled.keys()
        up_to = max(itertools.takewhile(tags.__contains__, self._unsettled), default=0)
        if not tags:
            return
        for tag in tags:
            del self._unsettled[tag]

        async def said() -> None:
            for tag in sorted(tags):
                if tag >= up_to:
                    await say(line, tag, tag == up_to)

        try:
            await self._link.answered(said(), self._link.settings.confirm_timeout_s, is_finished=True)
        except TROUBLES as error:
            log.debug("what was held went to others", queue=self.queue, node=line.node, reason=explained(error))
            self._hang_up()

    def tag_of(self, message: DeliveredMessage) -> Tag:
        """What to call a message by that `raw` gave a moment ago."""
        return self._line_number, message.delivery_tag or 0

    def _hang_up(self) -> None:
        line, self._line = self._line, None
        self._let_go()
        if line is not None:
            self._link.drop(line)

    def _let_go(self) -> None:
        self._line_number = 0
        self._arrived.clear()
        self._unsettled.clear()
        self._stirred.set()
