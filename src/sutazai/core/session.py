"""
A conversation that the platform keeps, and its messages.

A session belongs to one tenant. Its version is the number of its last turn: whoever adds a turn says which version it
was answered on, so that of two turns at once only one counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What is known of a conversation beside what was said."""

    id: str
    """`sess_` and 32 hexadecimal digits: the time in milliseconds, then 80 random bits. Sorts by age."""
    tenant: str
    model: str
    system: str
    """Instructions before all messages; empty where there are none."""
    metadata: Mapping[str, str]
    """What the client wants to remember of it."""
    ttl_s: float
    """It is forgotten so long after its last turn."""
    created_at: datetime
    expires_at: datetime
    version: int = 0
    """Turns so far."""
    messages: int = 0
    """How many are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message, in the form of OpenAI's chat completions."""

    number: int
    """Place in its session, from 1; those of dropped messages are not given again."""
    role: str
    tokens: int
    """An estimate: see `policy.trimming`."""
    body: bytes
    """A JSON object, as the client or the model wrote it."""
