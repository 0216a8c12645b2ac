"""
Which queues there are at the broker, and with what promises: pure data, declared by `link` and exported as a file.

Each queue of tasks is kept on a majority of `replicas` nodes, refuses what is past its length rather than drop the
oldest, and moves what was delivered too often to `dead_letters`, at least once: a dead letter leaves its queue only
when it is safe in the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from sutazai.adapters.rabbitmq.address import parse
from sutazai.settings import model

DEAD_LETTERS = "dead_letters"
"""Queue, exchange and routing key."""
STREAM = "agent_coordination"
LLM = "llm_inference"
KNOWN = ("task_processing", LLM, DEAD_LETTERS)
SEGMENT_BYTES = 20_000_000
"""A stream forgets whole segments; with the 500 MB that are usual, little would ever be forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """A queue as the broker is to have it."""

    name: str
    """With the prefix."""
    arguments: dict[str, Any] = field(hash=False)
    has_dead_letters: bool
    """What it gives up goes to `dead_letters`."""


def full_name(name: str, settings: model.Rabbitmq) -> str:
    """What a queue is called at the broker."""
    return f"{settings.prefix}.{name}" if settings.prefix else name


def declaration_of(name: str, settings: model.Rabbitmq) -> Declaration:
    """How a queue is declared; any name that is not known is a queue of tasks."""
    if name == STREAM:
        arguments = _stream(settings)
    elif name == DEAD_LETTERS:
        arguments = _quorum(settings)
    elif name == LLM and settings.llm_inference == "classic":
        arguments = {"x-queue-type": "classic", **_bound(settings), **_dead_letters(settings)}
    else:
        arguments = {
            **_quorum(settings),
            **_dead_letters(settings),
            "x-delivery-limit": settings.delivery_limit,
            "x-dead-letter-strategy": "at-least-once",
        }
    return Declaration(
        name=full_name(name, settings),
        arguments=arguments,
        has_dead_letters="x-dead-letter-exchange" in arguments,
    )


def definitions(settings: model.Rabbitmq) -> bytes:
    """
    All queues as JSON for `rabbitmqctl import_definitions`, or the setting `definitions.import_backend` of a node.

    Users and permissions are not in it: it holds no secret. Without `url` they are for the virtual host `/`.
    """
    vhost = parse(settings.url).vhost if settings.url else "/"
    dead_letters = full_name(DEAD_LETTERS, settings)
    queues = [
        {"name": each.name, "vhost": vhost, "durable": True, "auto_delete": False, "arguments": each.arguments}
        for each in (declaration_of(name, settings) for name in (*KNOWN, STREAM))
    ]
    exchange = {
        "name": dead_letters,
        "vhost": vhost,
        "type": "direct",
        "durable": True,
        "auto_delete": False,
        "internal": False,
        "arguments": {},
    }
    binding = {
        "source": dead_letters,
        "vhost": vhost,
        "destination": dead_letters,
        "destination_type": "queue",
        "routing_key": dead_letters,
        "arguments": {},
    }
    whole = {"vhosts": [{"name": vhost}], "queues": queues, "exchanges": [exchange], "bindings": [binding]}
    return msgspec.json.format(msgspec.json.encode(whole), indent=2) + b"\n"


def _quorum(settings: model.Rabbitmq) -> dict[str, Any]:
    return {"x-queue-type": "quorum", "x-quorum-initial-group-size": settings.replicas, **_bound(settings)}


def _bound(settings: model.Rabbitmq) -> dict[str, Any]:
    return {"x-max-length": settings.max_length, "x-overflow": "reject-publish"}


def _dead_letters(settings: model.Rabbitmq) -> dict[str, Any]:
    name = full_name(DEAD_LETTERS, settings)
    return {"x-dead-letter-exchange": name, "x-dead-letter-routing-key": name}


def _stream(settings: model.Rabbitmq) -> dict[str, Any]:
    return {
        "x-queue-type": "stream",
        "x-max-age": f"{settings.stream_days}D",
        "x-stream-max-segment-size-bytes": SEGMENT_BYTES,
        "x-initial-cluster-size": settings.replicas,
    }
