"""
Reading a queue: a consumer that finds its way to another node, and acknowledges many messages in one frame.

A delivery belongs to the line that it came on. When that ends, the broker gives what was held to somebody else, and
what this consumer still says about it is passed over.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import msgspec
import structlog
from aiormq.abc import DeliveredMessage

from sutazai.adapters.rabbitmq.link import TROUBLES, Line, RabbitLink, explained
from sutazai.adapters.rabbitmq.topology import full_name
from sutazai.ports.queue import Delivery, Message

log = structlog.get_logger("sutazai.rabbitmq")

COUNT_HEADER = "x-delivery-count"
Say = Callable[[Line, int, bool], Awaitable[Any]]
"""Says something about the delivery with a tag, or, where the last is true, about all up to it."""

_lines = itertools.count(1)


class RabbitConsumer:
    """A `Consumer` of one queue, on a line of its own."""

    def __init__(self, link: RabbitLink, queue: str, *, prefetch: int) -> None:
        self._link = link
        self._queue = queue
        self._full_name = full_name(queue, link.settings)
        self._prefetch = prefetch
        self._line: Line | None = None
        self._line_number = 0
        self._arrived: deque[DeliveredMessage] = deque()
        self._unsettled: dict[int, None] = {}
        """Tags that were neither acknowledged nor handed back, in their order."""
        self._stirred = asyncio.Event()

    async def take(self, at_most: int) -> Sequence[Delivery]:
        while True:
            if self._line is None or not self._line.is_open:
                await self._open()
            if self._arrived:
                number = min(max(at_most, 1), len(self._arrived))
                return [self._delivery(self._arrived.popleft()) for _ in range(number)]
            await self._wait()

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        await self._settle(deliveries, lambda line, tag, multiple: line.channel.basic_ack(tag, multiple=multiple))

    async def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        await self._settle(
            deliveries, lambda line, tag, multiple: line.channel.basic_nack(tag, multiple=multiple, requeue=True)
        )

    async def close(self) -> None:
        """Hand back all that is held; on return the node knows, if it answers."""
        line, self._line = self._line, None
        self._let_go()
        if line is not None:
            await self._link.close(line)

    async def open(self) -> None:
        """Begin to read. Raises `QueueUnavailable`."""
        await self._open()

    async def _open(self) -> None:
        deadline = self._link.deadline()
        while True:
            self._hang_up()
            line = await self._link.open_line(deadline)
            try:
                await self._begin(line)
            except TROUBLES as error:
                self._link.drop(line)
                log.debug("a queue could not be read", queue=self._queue, node=line.node, reason=explained(error))
                if asyncio.get_running_loop().time() >= deadline:
                    raise self._link.unavailable(f"{self._queue} could not be read ({explained(error)})") from None
                self._link.forget(self._queue)
            except BaseException:
                self._link.drop(line)
                raise
            else:
                return

    async def _begin(self, line: Line) -> None:
        limit_s = self._link.settings.confirm_timeout_s
        await self._link.declare(line, self._queue)
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
            await self._link.answered(line.channel.basic_consume(self._full_name, arrived), limit_s)  # type: ignore[arg-type]
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

    async def _settle(self, deliveries: Sequence[Delivery], say: Say) -> None:
        """Say something about deliveries, in as few frames as can be: about one, or all up to it."""
        line = self._line
        if line is None or not line.is_open:
            return
        tags = {tag for number, tag in (_tag(each) for each in deliveries) if number == self._line_number}
        tags &= self._unsettled.keys()
        up_to = max(itertools.takewhile(tags.__contains__, self._unsettled), default=0)
        for tag in tags:
            del self._unsettled[tag]

        async def said() -> None:
            for tag in sorted(tags):
                if tag >= up_to:
                    await say(line, tag, tag == up_to)

        try:
            await self._link.answered(said(), self._link.settings.confirm_timeout_s)
        except TROUBLES as error:
            log.debug("what was held went to others", queue=self._queue, node=line.node, reason=explained(error))
            self._hang_up()

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

    def _delivery(self, message: DeliveredMessage) -> Delivery:
        headers = message.header.properties.headers or {}
        count = headers.get(COUNT_HEADER, 0)
        return Delivery(
            message=self._read(message.body),
            tag=(self._line_number, message.delivery_tag),
            is_redelivered=bool(getattr(message.delivery, "redelivered", False)) or bool(count),
            count=count if isinstance(count, int) else 0,
        )

    def _read(self, body: bytes) -> Message:
        try:
            return msgspec.json.decode(body, type=Message)
        except (msgspec.MsgspecError, ValueError):
            return Message(task="", queue=self._queue, tenant="", agent="")


def _tag(delivery: Delivery) -> tuple[int, int]:
    """The number of the line that it came on, and the tag that it has there."""
    return cast("tuple[int, int]", delivery.tag)
