"""
A node: a model server of the pool, what it is and what is known of it.

`Node` is what the settings say and never changes. `NodeReport` is what one probe saw. `NodeState` is the one
mutable record of the core: the counters that routing reads and the fleet keeps, in memory, thousands of times a second.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class NodeKind(enum.Enum):
    """The API a node speaks, and with it how it is probed and fed."""

    OLLAMA = "ollama"
    OPENAI = "openai"
    """vLLM, LM Studio, and whatever else answers `/v1/models`."""
    LLAMACPP = "llamacpp"
    """llama.cpp's own server: OpenAI's API, and a connection that closes after every stream."""


class Health(enum.Enum):
    """What the fleet believes of a node."""

    UNKNOWN = "unknown"
    """Not probed yet: takes no requests."""
    UP = "up"
    DOWN = "down"
    """Failed three times in a row: takes no requests until a probe succeeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One model server, as the settings or a discovery named it."""

    name: str
    kind: NodeKind
    url: str
    """Base address without a trailing slash, such as `http://10.0.0.5:11434`."""
    slots: int | None = None
    """Requests it works on at once; None = ask the node, or its kind's default."""
    is_adaptive: bool = False
    """Find out how many it can work on, by how fast it begins to answer."""
    models: tuple[str, ...] = ()
    """Models to offer from it; empty = all that it has."""
    source: str = "settings"
    """Where it came from: `settings`, `dns:NAME`, `found`, `embedded`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model as a node describes it; empty where the node does not say."""

    name: str
    size_bytes: int = 0
    digest: str = ""
    modified_at: str = ""
    """RFC 3339, as the node gave it."""
    family: str = ""
    parameter_size: str = ""
    quantization: str = ""
    context_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that a node holds in memory."""

    name: str
    context_tokens: int = 0
    """Context length it was loaded with; 0 where the node does not say."""
    size_bytes: int = 0
    vram_bytes: int = 0
    expires_at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What one probe saw."""

    models: Mapping[str, ModelInfo]
    loaded: Mapping[str, LoadedModel] | None
    """None where the node has no such notion: everything it lists is warm."""
    slots: int | None = None
    running: int | None = None
    """Requests the node says it works on, from all its clients."""
    waiting: int | None = None
    version: str = ""


@dataclass(slots=True)
class Pace:
    """How soon a node begins to answer with one model, in seconds; loads are left out."""

    recent_s: float
    """Mean of about the last ten."""
    usual_s: float
    """Mean of about the last two hundred."""
    count: int = 1


@dataclass(slots=True, kw_only=True)
class NodeState:
    """What routing knows of one node now. Kept by `gateway.fleet` alone."""

    node: Node
    slots: int
    """Requests it works on at once."""
    in_flight: int = 0
    """Leases held. Never negative, never left behind."""
    health: Health = Health.UNKNOWN
    failures: int = 0
    """Consecutive, of probes and of requests."""
    up_since: float = 0.0
    """Monotonic seconds at which it last came back: the start of its slow start."""
    penalty: float = 0.0
    """Failed requests counted as if still in flight, as of `penalty_at`; decays with time."""
    penalty_at: float = 0.0
    models: Mapping[str, ModelInfo] = field(default_factory=dict)
    loaded: Mapping[str, LoadedModel] | None = None
    running: int | None = None
    waiting: int | None = None
    foreign: int = 0
    """Requests of other clients, as of the last probe: what it said it works on, less our own."""
    version: str = ""
    last_error: str = ""
    probed_at: float = 0.0
    loading: str = ""
    """The model it was asked for that it did not have in memory, until it answered; one at a time."""
    paces: dict[str, Pace] = field(default_factory=dict)
    """By model, as requests name it."""
    draining: bool = False
    """Left the settings: finishes what it has, takes nothing new."""
