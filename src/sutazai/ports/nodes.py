"""What a node offers beside inference: a probe, and on those that keep models, their keeping."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from sutazai.core.node import Node, NodeReport
from sutazai.ports.inference import Inference


class NodeClient(Inference, Protocol):
    """One node as the gateway talks to it."""

    node: Node

    async def probe(self) -> NodeReport:
        """Ask what it has and how busy it is. Raises `NodeFault`; the caller owns the time limit."""

    async def show(self, model: str) -> Mapping[str, object]:
        """What the node knows of a model, in the form of Ollama's `/api/show`. Raises `NodeFault`."""

    async def close(self) -> None:
        """Drop idle connections; calls under way are cancelled."""


class ModelKeeper(Protocol):
    """A node whose models can be fetched and removed from afar (Ollama)."""

    def pull(self, model: str, *, insecure: bool) -> AsyncIterator[Mapping[str, object]]:
        """Fetch a model; yields Ollama's progress records. Raises `NodeFault`. Closing it stops the pull."""

    async def delete(self, model: str) -> None:
        """Remove a model. Raises `NodeRejected` with status 404 where it is not there."""

    async def copy(self, source: str, destination: str) -> None:
        """Give a model a second name."""
