"""The `Consumer` port: deliveries made of what a `Reader` reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import msgspec

from sutazai.adapters.rabbitmq.frames import Arrival
from sutazai.adapters.rabbitmq.reading import Reader, Tag, acknowledged, handed_back
from sutazai.core.task import is_task_id
from sutazai.ports.queue import Delivery, Message

COUNT_HEADER = "x-delivery-count"


class RabbitConsumer(Reader):
    """A `Consumer` of one queue."""

    async def take(self, at_most: int) -> Sequence[Delivery]:
        return [self._delivery(message) for message in await self.raw(at_most)]

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        self.settle(map(_tag, deliveries), acknowledged)

    async def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        self.settle(map(_tag, deliveries), handed_back)

    def _delivery(self, message: Arrival) -> Delivery:
        count = message.headers.get(COUNT_HEADER, 0)
        return Delivery(
            message=self._read(message.body),
            tag=self.tag_of(message),
            is_redelivered=message.is_redelivered or bool(count),
            count=count if isinstance(count, int) else 0,
        )

    def _read(self, body: bytes) -> Message:
        try:
            message = msgspec.json.decode(body, type=Message)
        except (msgspec.MsgspecError, ValueError):
            message = None
        if message is None or not is_task_id(message.task):
            return Message(task="", queue=self.queue, tenant="", agent="")
        return message


def _tag(delivery: Delivery) -> Tag:
    return cast("Tag", delivery.tag)
