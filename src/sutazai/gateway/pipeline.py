"""
The stages in their order, outermost first:

    limited     what the key and its tenant may take
    typed       the model, where it is to be chosen; another, where that one fails
    cached      answers that are there already
    coalesced   equal questions at once: one answer for all of them
    batched     embeddings and completions that share a call
    hedged      slow embeddings, asked twice
    admitted    the line: fair, bounded, told of
    routed      a node, and another when it fails

Each is an `Inference` around the next and can stand alone. Batches are made before the line, so that one of them waits
as one request: ADR 10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sutazai.core.node import Health, NodeKind
from sutazai.core.request import Endpoint, Operation, Request
from sutazai.gateway.admitted import Admitted
from sutazai.gateway.answers_in_memory import AnswersInMemory
from sutazai.gateway.batched import Batched, Timer
from sutazai.gateway.cached import Cached
from sutazai.gateway.coalesced import Coalesced
from sutazai.gateway.counts import Counts
from sutazai.gateway.fingerprints import Fingerprints
from sutazai.gateway.fleet import Fleet
from sutazai.gateway.hedged import Hedged
from sutazai.gateway.limited import Limited
from sutazai.gateway.routed import Routed
from sutazai.gateway.typed import Readiness, Typed, TypeRules
from sutazai.policy.admission import AdmissionRules
from sutazai.policy.batching import BatchRules
from sutazai.policy.cacheability import CacheRules
from sutazai.policy.hedging import HedgeRules
from sutazai.policy.routing import Room
from sutazai.ports.cache import AnswerStore
from sutazai.ports.inference import Call, Inference, Reply
from sutazai.ports.limits import LimitStore

ARRAYS_OF_PROMPTS = frozenset({NodeKind.OPENAI, NodeKind.LLAMACPP})
"""Nodes that answer several prompts of a completion in one call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRules:
    """What the settings say, for each stage that has a say in it."""

    types: TypeRules
    cache: CacheRules | None
    """None: nothing is kept."""
    cache_memory_bytes: int
    cache_store_limit_s: float
    """What a request may wait for the second tier, all in all."""
    batches: BatchRules
    hedges: HedgeRules
    admission: AdmissionRules


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What the stages ask about models and tenants, as of now."""

    price: Callable[[str], tuple[float, float]]
    """Money for a million input and a million output tokens of a model."""
    is_public: Callable[[str], bool]
    """Whether all tenants may share a model's answers."""
    weight: Callable[[str], float]
    """A tenant's share of the pool, relative to others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """Time, as the stages see it."""

    clock: Callable[[], float]
    """Monotonic seconds."""
    wall: Callable[[], float]
    """Unix seconds."""
    later: Callable[[float, Callable[[], None]], Timer]
    """Calls after so many seconds."""


class Pipeline:
    """All stages; an `Inference` itself."""

    def __init__(
        self,
        routed: Routed,
        rules: StageRules,
        knowledge: Knowledge,
        clocks: Clocks,
        *,
        answers: AnswerStore | None = None,
        limits: LimitStore | None = None,
    ) -> None:
        """
        Build them.

        Args:
            answers: the second tier of the cache; None where this gateway shares with nobody.
            limits: counts that all gateways share; None where this one is alone.
        """
        self.routed = routed
        self._fleet = fleet = routed.fleet
        self.admitted = Admitted(routed, rules.admission, weight=knowledge.weight)
        self.hedged = Hedged(
            self.admitted,
            routed.try_start,
            rules.hedges,
            node_of=self._node_of,
            later=clocks.later,
            clock=clocks.clock,
        )
        self.batched = Batched(
            self.hedged,
            rules.batches,
            takes_arrays=lambda model, endpoint: takes_arrays(fleet, model, endpoint),
            has_idle_node=lambda model: has_idle_node(fleet, model),
            later=clocks.later,
            clock=clocks.clock,
        )
        self.coalesced = Coalesced(self.batched)
        self.cached: Cached | None = None
        below: Inference = self.coalesced
        if rules.cache is not None:
            below = self.cached = Cached(
                self.coalesced,
                memory=AnswersInMemory(rules.cache_memory_bytes),
                store=answers,
                rules=rules.cache,
                is_public=knowledge.is_public,
                clock=clocks.clock,
                wall=clocks.wall,
                store_limit_s=rules.cache_store_limit_s,
            )
        self.typed = Typed(
            Marked(below, Fingerprints(knowledge.is_public)),
            rules.types,
            readiness=lambda model: readiness(fleet, model),
        )
        self.limited = Limited(
            self.typed,
            local=Counts(clock=clocks.clock, wall_s=clocks.wall),
            shared=limits,
            price=knowledge.price,
        )

    def start(self, request: Request, reply: Reply) -> Call:
        return self.limited.start(request, reply)

    def adopt(self, rules: StageRules) -> None:
        """New settings, for requests that begin from now on."""
        self.typed.rules = rules.types
        self.batched.adopt(rules.batches)
        self.hedged.adopt(rules.hedges)
        self.admitted.adopt(rules.admission)

    def _node_of(self, request_id: str) -> str:
        return next((run.node for run in self.routed.runs if run.request.id == request_id), "")


class Marked:
    """Gives requests that may share an answer the mark by which they find each other."""

    def __init__(self, inner: Inference, fingerprints: Fingerprints) -> None:
        self._inner = inner
        self._fingerprints = fingerprints

    def start(self, request: Request, reply: Reply) -> Call:
        if request.is_deterministic:
            request.fingerprint = self._fingerprints.of(request)
        return self._inner.start(request, reply)


def readiness(fleet: Fleet, model: str) -> Readiness:
    """What the pool could do for a model now."""
    candidates = fleet.candidates(model)
    if any(state.health is Health.UP for state in candidates):
        return Readiness.BUSY if fleet.room(model) is Room.NONE else Readiness.FREE
    # with nobody up, nobody knows what there is
    return Readiness.DOWN if candidates or not fleet.is_up else Readiness.MISSING


def takes_arrays(fleet: Fleet, model: str, endpoint: Endpoint) -> bool:
    """Whether every node with the model answers several inputs in one call."""
    if endpoint.operation is Operation.EMBEDDING:
        return True
    return all(state.node.kind in ARRAYS_OF_PROMPTS for state in fleet.candidates(model))


def has_idle_node(fleet: Fleet, model: str) -> bool:
    """Whether a node with the model works on nothing at all."""
    return any(
        state.health is Health.UP and not state.in_flight and not state.foreign for state in fleet.candidates(model)
    )
