"""
What is asked and what is answered, in words that no dialect owns.

`Request`, `Head` and `Usage` are built for every request, so they are plain slotted classes: a frozen dataclass
costs about two microseconds to make. Nobody changes one after it was handed on.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


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


@dataclass(slots=True)
class Request:
    """One inference request, parsed once; `body` is what the client sent, byte for byte."""

    id: str
    endpoint: Endpoint
    model: str
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
