"""
Which answers may be given to others who ask the same, for how long, and what the client has to say about it.

Pure: the caller brings the decoded request and the time. How two requests are found to be equal is decided in
`dialects/canonical.py`; the table for users is in `docs/explanation/caching.md`, and a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sutazai.core.errors import NodeFault, NodeRejected, NoHealthyNode, Overloaded, SutazaiError
from sutazai.core.request import Operation

STATEFUL_FIELDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "background": "the answer is only a promise of one",
        "context": "the client continues what the node remembers",
        "conversation": "the answer depends on what was said before",
        "id_slot": "the answer depends on what a slot of the node remembers",
        "keep_alive": "the node is to keep or drop the model, which an answer from the cache would not do",
        "previous_response_id": "the answer depends on what was said before",
        "slot_id": "the answer depends on what a slot of the node remembers",
        "store": "the node is to keep the answer",
    }
)
"""Fields that make a request more than a question, and why. Null and false count as left out."""

IDLE_FIELDS: Final = frozenset({"metadata", "safety_identifier", "user"})
"""Fields that no node looks at when it answers; requests that differ in them alone are equal."""

RANDOM_SEEDS: Final = (-1, 2**32 - 1)
"""Seeds by which Ollama, llama.cpp and vLLM mean "another one each time"."""

RENEWED_FROM: Final = 0.8
"""The share of an answer's time after which one that is often asked for is made anew."""

SERVER_ERROR: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRules:
    """How long answers are kept, in seconds, and which."""

    memory_ttl_s: float
    chat_ttl_s: float
    """Chats and completions."""
    embedding_ttl_s: float
    max_answer_bytes: int
    refresh_from_hits: int
    """0 = never."""
    stale_if_error_s: float

    def fresh_s(self, operation: Operation) -> float:
        """How long an answer may be given without a second thought."""
        return self.embedding_ttl_s if operation is Operation.EMBEDDING else self.chat_ttl_s

    def may_keep(self, *, status: int, size_bytes: int, is_complete: bool) -> bool:
        """Whether an answer may be given to others: never an error, a part of one, or one that is too large."""
        return status == 200 and is_complete and size_bytes <= self.max_answer_bytes


@dataclass(frozen=True, slots=True)
class Directives:
    """What a client's `Cache-Control` asks for; what it does not name is left to us."""

    may_be_kept: bool = True
    """False for `no-store`: nothing is looked up, kept or shared."""
    may_be_old: bool = True
    """False for `no-cache` and `max-age=0`: a node is asked, and its answer is kept."""
    max_age_s: float = math.inf
    """An older answer is of no use."""

    @property
    def may_be_shared(self) -> bool:
        """Whether an answer that is being made for another will do."""
        return self.may_be_kept and self.may_be_old


def directives_in(cache_control: bytes) -> Directives:
    """Read the header, in lower case; unknown words are skipped, and an age that is no number means "no cache"."""
    may_be_kept, max_age_s = True, math.inf
    for part in cache_control.split(b","):
        name, _, value = part.strip().partition(b"=")
        if name == b"no-store":
            may_be_kept = False
        elif name == b"no-cache":
            max_age_s = 0.0
        elif name == b"max-age":
            digits = value.strip(b' "')
            max_age_s = min(max_age_s, float(digits) if digits.isdigit() and len(digits) < 12 else 0.0)
    return Directives(may_be_kept, max_age_s > 0, max_age_s)


def why_not_shared(fields: Mapping[str, object], sampling: Mapping[str, object]) -> str:
    """
    Why the answer to a deterministic request may be given to nobody else; empty where it may.

    Args:
        fields: the whole body.
        sampling: where `temperature` and `seed` stand in it.
    """
    for name in STATEFUL_FIELDS.keys() & fields.keys():
        if fields[name] is not None and fields[name] is not False:
            return f"{name}: {STATEFUL_FIELDS[name]}"
    if sampling.get("temperature") != 0 and sampling.get("seed") in RANDOM_SEEDS:
        return "seed: it means another one each time"
    return ""


def may_be_replaced(error: SutazaiError) -> bool:
    """Whether an answer past its time is better than this error: the pool's own faults, not the client's."""
    if isinstance(error, NodeRejected):
        return error.status >= SERVER_ERROR or error.status == 429
    return isinstance(error, NodeFault | NoHealthyNode | Overloaded)
