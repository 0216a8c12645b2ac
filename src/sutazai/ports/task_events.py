"""
Events of tasks as they are kept: a kind, a schema number, and JSON.

What was once written stays as it is. Where an event changes its form, its schema number grows and an upcaster makes
the new form of an old one while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from sutazai.core import task as words
from sutazai.core.errors import StoreUnavailable
from sutazai.core.task import Event

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]

KINDS: Mapping[str, type[Event]] = {
    "task.submitted": words.Submitted,
    "task.released": words.Released,
    "task.started": words.Started,
    "task.progressed": words.Progressed,
    "task.checkpointed": words.Checkpointed,
    "task.suspended": words.Suspended,
    "task.handed_back": words.HandedBack,
    "task.lost": words.Lost,
    "task.retried": words.Retried,
    "task.completed": words.Completed,
    "task.failed": words.Failed,
    "task.cancel_asked": words.CancelAsked,
    "task.cancelled": words.Cancelled,
    "task.requeued": words.Requeued,
}
"""The name of each kind; names are never given again."""

UPCASTERS: Mapping[tuple[str, int], Upcaster] = {}
"""By kind and schema: what makes the next schema of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptEvent:
    """An event in its place."""

    position: int
    """Among all events of its shard; grows, with gaps."""
    task: str
    version: int
    """Among the events of its task, from 1 without gaps."""
    tenant: str
    kind: str
    schema: int
    at: datetime
    data: str
    """JSON."""

    @property
    def event(self) -> Event:
        """What happened. Raises `StoreUnavailable` where this program does not know the kind or its form."""
        return decode(self.kind, self.schema, self.data)


class Codec:
    """Encodes and decodes; with upcasters of its own for tests."""

    def __init__(self, upcasters: Mapping[tuple[str, int], Upcaster] = UPCASTERS) -> None:
        self._upcasters = upcasters
        self._schema = {kind: 1 + sum(known == kind for known, _ in upcasters) for kind in KINDS}
        self._names = {made: kind for kind, made in KINDS.items()}
        self._decoders = {kind: msgspec.json.Decoder(made) for kind, made in KINDS.items()}
        self._encoder = msgspec.json.Encoder()

    def form_of(self, made: type[Event]) -> tuple[str, int]:
        """Kind and schema of what is written today."""
        kind = self._names[made]
        return kind, self._schema[kind]

    def encode(self, event: Event) -> tuple[str, int, str]:
        """Kind, schema and data."""
        return *self.form_of(type(event)), self._encoder.encode(event).decode()

    def decode(self, kind: str, schema: int, data: str) -> Event:
        """The event. Raises `StoreUnavailable`."""
        newest = self._schema.get(kind, 0)
        if not 1 <= schema <= newest:
            raise StoreUnavailable(
                f"An event of the kind {kind!r} and schema {schema} is not known to this program. "
                "A newer sutazai wrote it; start that one."
            )
        try:
            if schema == newest:
                return self._decoders[kind].decode(data)
            fields: dict[str, Any] = msgspec.json.decode(data)
            for number in range(schema, newest):
                fields = self._upcasters[kind, number](fields)
            return msgspec.convert(fields, KINDS[kind])
        except (msgspec.MsgspecError, LookupError, TypeError, ValueError) as error:
            raise StoreUnavailable(
                f"An event of the kind {kind!r} did not have its form: {error}. `sutazai events verify` finds all such."
            ) from error


_codec = Codec()
form_of = _codec.form_of
encode = _codec.encode
decode = _codec.decode
