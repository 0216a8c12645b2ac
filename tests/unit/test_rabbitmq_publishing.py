"""When a publisher is given up: a channel that says no again and again, one that ends, one that says nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

from sutazai.adapters.rabbitmq.address import parse
from sutazai.adapters.rabbitmq.frames import Returned, Settled
from sutazai.adapters.rabbitmq.link import RabbitLink, Wire
from sutazai.adapters.rabbitmq.publishing import MAX_NACKS, Outcome, Parcel, Publisher
from sutazai.settings.model import Rabbitmq
from sutazai.settings.secret import Secret

PARCEL = Parcel("task_processing", b"{}")


class FakeWire:
    """A connection, its channel and its lane in one, which answers as it is told."""

    is_closed = False

    def __init__(self, answer: Callable[[FakeWire, int], None]) -> None:
        self.answer = answer
        self.was_closed = asyncio.Event()
        self.closing = asyncio.get_running_loop().create_future()
        self.published = 0
        self.on_settled: Callable[[Settled], object] = lambda _: None
        self.on_returned: Callable[[Returned], object] = lambda _: None

    def publish(self, messages: Sequence[tuple[str, bytes, int]]) -> range:
        """As a lane does, with answers that come a moment later."""
        numbers = range(self.published + 1, self.published + len(messages) + 1)
        self.published += len(messages)
        for number in numbers:
            asyncio.get_running_loop().call_soon(self.answer, self, number)
        return numbers

    async def close(self) -> None:
        """As a connection."""
        self.was_closed.set()


def yes(wire: FakeWire, number: int) -> None:
    """A confirm."""
    wire.on_settled(Settled(number, has_kept=True, is_multiple=False))


def no(wire: FakeWire, number: int) -> None:
    """A refusal."""
    wire.on_settled(Settled(number, has_kept=False, is_multiple=False))


def nowhere(wire: FakeWire, number: int) -> None:
    """It is returned, and confirmed after that."""
    wire.on_returned(Returned(PARCEL.queue, PARCEL.body))
    yes(wire, number)


def cut(wire: FakeWire, _: int) -> None:
    """The connection ends."""
    if not wire.closing.done():
        wire.closing.set_exception(ConnectionError())
        wire.closing.exception()


def nothing(_: FakeWire, __: int) -> None:
    """Silence."""


def publisher_on(wire: FakeWire, *, confirm_timeout_s: float = 5.0) -> Publisher:
    link = RabbitLink(parse(Secret("amqp://broker")), Rabbitmq(confirm_timeout_s=confirm_timeout_s))
    either = cast("Any", wire)
    return Publisher(link, Wire("broker", either, either, either))


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


async def test_a_connection_that_ends_leaves_what_was_on_its_way_unknown() -> None:
    wire = FakeWire(cut)
    publisher = publisher_on(wire)

    assert await publisher.publish([PARCEL] * 2) == [Outcome.UNKNOWN] * 2
    assert not publisher.is_usable


async def test_a_transport_that_is_closed_leaves_all_unknown() -> None:
    class Closed(FakeWire):
        def publish(self, messages: Sequence[tuple[str, bytes, int]]) -> range:
            raise RuntimeError("the handler is closed")

    assert await publisher_on(Closed(nothing)).publish([PARCEL]) == [Outcome.UNKNOWN]


async def test_one_confirm_may_speak_for_all_before_it() -> None:
    def all_at_the_third(wire: FakeWire, number: int) -> None:
        if number == 3:
            wire.on_settled(Settled(3, has_kept=True, is_multiple=True))
        if number > 3:
            no(wire, number)

    outcomes = await publisher_on(FakeWire(all_at_the_third)).publish([PARCEL] * 4)

    assert outcomes == [Outcome.KEPT] * 3 + [Outcome.REFUSED]


async def test_what_was_returned_is_not_taken_for_kept() -> None:
    def first_alone(wire: FakeWire, number: int) -> None:
        (nowhere if number == 1 else yes)(wire, number)

    outcomes = await publisher_on(FakeWire(first_alone)).publish([PARCEL, PARCEL])

    assert outcomes == [Outcome.UNROUTABLE, Outcome.KEPT]


async def test_bursts_beside_each_other_are_told_apart() -> None:
    def every_second(wire: FakeWire, number: int) -> None:
        (yes if number % 2 else no)(wire, number)

    publisher = publisher_on(FakeWire(every_second))

    outcomes = await asyncio.gather(*(publisher.publish([PARCEL]) for _ in range(4)))

    assert outcomes == [[Outcome.KEPT], [Outcome.REFUSED]] * 2


async def test_one_who_retires_stays_until_what_is_on_its_way_was_answered() -> None:
    wire = FakeWire(nothing)
    publisher = publisher_on(wire)
    publishing = asyncio.create_task(publisher.publish([PARCEL]))
    await asyncio.sleep(0)

    publisher.retire()
    assert not publisher.is_usable
    assert not wire.was_closed.is_set()
    yes(wire, 1)

    assert await publishing == [Outcome.KEPT]
    await asyncio.wait_for(wire.was_closed.wait(), 5.0)


async def test_whoever_is_cancelled_leaves_the_publisher_retired() -> None:
    wire = FakeWire(nothing)
    publisher = publisher_on(wire)
    publishing = asyncio.create_task(publisher.publish([PARCEL]))
    await asyncio.sleep(0)

    publishing.cancel()
    await asyncio.wait({publishing})

    assert publishing.cancelled()
    assert not publisher.is_usable
    yes(wire, 1)  # too late, and nobody minds
