"""Requests to addresses that a stranger named: a model, a page, whoever wants a webhook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What an address answered."""

    url: str
    """The one that answered, after redirects."""
    status: int
    content_type: str
    """Without parameters, in lower case."""
    text: str
    """Decoded; bytes that are no text are replaced."""
    is_cut: bool = False
    """It was longer than is read."""


class Web(Protocol):
    """
    Reaches public servers alone: an address within our own networks is refused before anything is sent.

    Both raise `Forbidden` for an address that may not be reached, `BadRequest` for what is no such address, and
    `NodeUnreachable` or `NodeTimeout` for a server that did not answer.
    """

    async def get(self, url: str) -> Page:
        """Read a page; redirects are followed a few times, and each is checked as the first address was."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Send a body; the status of the answer, which is not read. Redirects are not followed."""
