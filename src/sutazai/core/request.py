"""
What is asked and what is answered, in words that no dialect owns.

`Request`, `Head` and `Usage` are built for every request, so they are plain slotted classes: a frozen dataclass
costs about two microseconds to make. Nobody changes one after it was handed on.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sutazai.core.identity import Allowance


class Priority(enum.IntEnum):
    """Who goes first where several wait; the lowest number."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


NORMAL = Priority.NORMAL


class Dialect(enum.Enum):
    """The API a client or a node speaks."""

    OPENAI = "openai"
    OLLAMA = "ollama"


class Operation(enum.Enum):
    """What is asked of a model."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"


class Endpoint(enum.Enum):
    """One inference address of one dialect."""

    OPENAI_CHAT = ("/v1/chat/completions", Dialect.OPENAI, Operation.CHAT)
    OPENAI_COMPLETION = ("/v1/completions", Dialect.OPENAI, Operation.COMPLETION)
    OPENAI_EMBEDDING = ("/v1/embeddings", Dialect.OPENAI, Operation.EMBEDDING)
    OLLAMA_CHAT = ("/api/chat", Dialect.OLLAMA, Operation.CHAT)
    OLLAMA_GENERATE = ("/api/generate", Dialect.OLLAMA, Operation.COMPLETION)
    OLLAMA_EMBED = ("/api/embed", Dialect.OLLAMA, Operation.EMBEDDING)
    OLLAMA_EMBEDDINGS = ("/api/embeddings", Dialect.OLLAMA, Operation.EMBEDDING)
    """The older form of `/api/embed`: one prompt in, one vector out."""

    def __init__(self, path: str, dialect: Dialect, operation: Operation) -> None:
        self.path = path
        self.dialect = dialect
        self.operation = operation


@dataclass(slots=True)
class Usage:
    """Tokens that one request took."""

    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """How a request that waits stands in line."""

    position: int
    """From 1."""
    eta_s: float | None
    """Until its turn, as things go; None where nothing is known yet."""

    @property
    def header_lines(self) -> bytes:
        """For `Head.extra`."""
        lines = b"x-sutazai-queue-position: %d\r\n" % self.position
        return lines if self.eta_s is None else lines + b"x-sutazai-queue-eta-seconds: %d\r\n" % round(self.eta_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, and what is known beside it."""

    text: str
    """The last message of the user, or the prompt."""
    turns: int = 1
    """Messages of the conversation."""
    tools: int = 0
    """Tools the model may call."""
    images: int = 0


@dataclass(slots=True)
class Request:
    """One inference request, parsed once; `body` is what the client sent, byte for byte."""

    id: str
    endpoint: Endpoint
    model: str
    """What the client named; from the beginning of the answer on, what answers."""
    stream: bool
    body: bytes
    tenant: str
    """Who pays for it: the key's tenant, or `local` where no key is needed."""
    key_id: str
    """The id of the key, empty where none was needed."""
    arrived_at: float
    """Monotonic seconds."""
    context_tokens: int = 0
    """The context length that an Ollama client asked for (`num_ctx`); 0 where it did not ask."""
    has_load_options: bool = False
    """An Ollama client sent options that would reload the model."""
    loads_only: bool = False
    """Ollama's way to load a model: nothing is asked of it."""
    is_deterministic: bool = False
    """The same request again would be answered the same: temperature 0 or a seed, or an embedding."""
    fingerprint: bytes = b""
    """Equal for requests that may share one answer; empty where none may. Holds the tenant, or none where the model
    is public."""
    cache_control: bytes = b""
    """What the client said in `Cache-Control`."""
    priority: Priority = NORMAL
    deadline_at: float = 0.0
    """Monotonic seconds after which the client has no use for an answer; 0.0 where it did not say."""
    conversation: bytes = b""
    """What the client calls its conversation; empty where it did not say."""
    allowance: Allowance | None = None
    """The limits it must fit into; None where there are none."""
    store_wait_s: float = 0.0
    """What it has waited for the store that gateways share: all stages together have one limit."""
    avoid: str = ""
    """A node that is not to get it, because it has the same question already."""


@dataclass(slots=True)
class Head:
    """The beginning of an answer."""

    status: int
    content_type: bytes
    length: int | None
    """Bytes to come where that is known; a stream does not know."""
    node: str
    reason: str
    """Why this node: told to the client in `x-sutazai-reason`."""
    cache: bytes = b"bypass"
    """Where the answer is from, for `x-sutazai-cache`: `hit-l1`, `hit-l2`, `coalesced`, `stale`, `miss`, `bypass`."""
    extra: bytes = b""
    """Further header lines for the client, each with its line end."""
    model: str = ""
    """Which model answers, where it is another than the client named."""
