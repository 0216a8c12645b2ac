"""When a publisher is given up: a channel that says no again and again, one that ends, one that says nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from aiormq.exceptions import ChannelInvalidStateError, DeliveryError
from pamqp.commands import Basic

from sutazai.adapters.rabbitmq.address import parse
from sutazai.adapters.rabbitmq.link import RabbitLink, Wire
from sutazai.adapters.rabbitmq.publishing import MAX_NACKS, Outcome, Parcel, Publisher
from sutazai.settings.model import Rabbitmq
from sutazai.settings.secret import Secret

PARCEL = Parcel("task_processing", b"{}")


class FakeWire:
    """A connection and its channel in one, which answers as it is told."""

    is_closed = False

    def __init__(self, answer: Callable[[], Awaitable[None]]) -> None:
        self.answer = answer
        self.was_closed = asyncio.Event()

    async def basic_publish(self, *_: object, **__: object) -> None:
        await self.answer()

    async def close(self) -> None:
        self.was_closed.set()


async def yes() -> None:
    """A confirm."""


async def no() -> None:
    raise DeliveryError(None, Basic.Nack(1))


async def gone() -> None:
    raise ChannelInvalidStateError


async def cut() -> None:
    raise asyncio.CancelledError  # as the driver does to whoever waits for a connection that ends


async def nothing() -> None:
    await asyncio.Event().wait()


def publisher_on(wire: FakeWire, *, confirm_timeout_s: float = 5.0) -> Publisher:
    link = RabbitLink(parse(Secret("amqp://broker")), Rabbitmq(confirm_timeout_s=confirm_timeout_s))
    either = cast("Any", wire)
    return Publisher(link, Wire("broker", either, either))


async def test_twenty_refusals_in_a_row_are_enough() -> None:
    wire = FakeWire(no)
    publisher = publisher_on(wire)

    assert await publisher.publish([PARCEL] * (MAX_NACKS - 1)) == [Outcome.REFUSED] * (MAX_NACKS - 1)
    assert publisher.is_usable
    await publisher.publish([PARCEL])
    assert not publisher.is_usable


async def test_a_confirm_in_between_begins_the_count_anew() -> None:
    wire = FakeWire(no)
    publisher = publisher_on(wire)

    await publisher.publish([PARCEL] * (MAX_NACKS - 1))
    wire.answer = yes
    assert await publisher.publish([PARCEL]) == [Outcome.KEPT]
    wire.answer = no
    await publisher.publish([PARCEL])

    assert publisher.is_usable


async def test_refusals_of_a_full_queue_are_forgiven() -> None:
    publisher = publisher_on(FakeWire(no))

    await publisher.publish([PARCEL] * MAX_NACKS)
    publisher.forgive()

    assert publisher.is_usable


async def test_a_node_that_says_nothing_is_left_and_what_it_held_is_unknown() -> None:
    wire = FakeWire(nothing)
    publisher = publisher_on(wire, confirm_timeout_s=0.01)

    assert await publisher.publish([PARCEL] * 300) == [Outcome.UNKNOWN] * 300

    assert not publisher.is_usable
    await asyncio.wait_for(wire.was_closed.wait(), 5.0)


async def test_a_connection_that_ends_is_no_cancellation_of_ours() -> None:
    for answer in (gone, cut):
        assert await publisher_on(FakeWire(answer)).publish([PARCEL]) == [Outcome.UNKNOWN]


async def test_one_who_retires_stays_until_what_is_on_its_way_was_answered() -> None:
    answered = asyncio.Event()

    async def later() -> None:
        await answered.wait()

    wire = FakeWire(later)
    publisher = publisher_on(wire)
    publishing = asyncio.create_task(publisher.publish([PARCEL]))
    await asyncio.sleep(0)

    publisher.retire()
    assert not publisher.is_usable
    assert not wire.was_closed.is_set()
    answered.set()

    assert await publishing == [Outcome.KEPT]
    await asyncio.wait_for(wire.was_closed.wait(), 5.0)
