"""What one node of RabbitMQ tells over AMQP, for whoever looks whether all is well."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import msgspec
from aiormq.exceptions import ChannelNotFoundEntity

from sutazai.adapters.rabbitmq.address import Address, Node
from sutazai.adapters.rabbitmq.link import TROUBLES, RabbitLink, Wire, explained, quiet_the_driver
from sutazai.adapters.rabbitmq.publishing import Outcome, Parcel, Publisher
from sutazai.settings import model


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLook:
    """A node that answered."""

    version: str
    """As it says; empty where it does not."""
    takes_messages: bool
    """It does not while memory or disk are short on any node of its cluster."""
    other_queues: Sequence[str]
    """Those that are there and not what the settings say."""
    lost_queues: Sequence[str]
    """Those that did not answer: too few of their nodes are there."""


async def look_at(node: Node, vhost: str, settings: model.Rabbitmq, queues: Collection[str]) -> NodeLook:
    """
    Ask one node, and change nothing.

    Raises `QueueUnavailable` where it does not answer within the limits of the settings.
    """
    quiet_the_driver()
    brief = msgspec.structs.replace(settings, timeout_s=settings.connect_timeout_s)
    link = RabbitLink(Address(nodes=(node,), vhost=vhost), brief)
    wire = await link.open_wire(link.deadline())
    try:
        # To a queue that is not there: the node says so. With an alarm it reads no more after the first message.
        publisher, nowhere = Publisher(link, wire), Parcel(f"sutazai.doctor.{uuid.uuid4().hex}", b"")
        outcomes = [outcome for _ in range(2) for outcome in await publisher.publish([nowhere])]
        if Outcome.UNKNOWN in outcomes:
            return NodeLook(version=_version(wire), takes_messages=False, other_queues=(), lost_queues=())
        other, lost = [], []
        for queue in sorted(queues):
            try:
                await link.counts(wire, queue)
                if not await link.is_as_declared(wire, queue):
                    other.append(queue)
            except ChannelNotFoundEntity:
                continue
            except TROUBLES as error:
                lost.append(f"{queue} ({explained(error)})")
        return NodeLook(version=_version(wire), takes_messages=True, other_queues=other, lost_queues=lost)
    finally:
        await link.close(wire)
        await link.closed()


def _version(wire: Wire) -> str:
    told = wire.channel.connection.server_properties
    return " ".join(str(told[name]) for name in ("product", "version") if name in told)
