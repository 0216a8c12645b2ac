"""
The stage that chooses the model: by what is asked (`model: "auto"`), and another where the chosen one cannot answer.

A chain of models stands behind a name. The first that has room is taken; where all are busy, the first that is there.
When it fails before anything was said, the next one is asked.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sutazai.core.errors import (
    BadRequest,
    NodeFault,
    NodeRejected,
    NoHealthyNode,
    Overloaded,
    SutazaiError,
    UnknownModel,
)
from sutazai.core.request import Head, Request, Usage
from sutazai.dialects.question import question_of
from sutazai.dialects.renamed import renamed
from sutazai.policy.request_type import Classified, RequestType, Rule, classify
from sutazai.ports.inference import Call, Inference, NoCall, Reply

MAX_REASON = 200
RETRY_S = 5.0
"""When to come back where every node is down: about as soon as the next probe finds one."""


class Readiness(enum.Enum):
    """What the pool could do for a model now."""

    MISSING = "missing"
    """No node has it."""
    DOWN = "down"
    """No node that could have it is up."""
    BUSY = "busy"
    """Its nodes have no room, or are left alone for a while."""
    FREE = "free"


_THERE = frozenset({Readiness.BUSY, Readiness.FREE})


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeRules:
    """What the settings say about choosing models."""

    name: str
    """What clients call the choice; empty where there is none."""
    chains: Mapping[RequestType, Sequence[str]]
    rules: Sequence[Rule]
    fallbacks: Mapping[str, Sequence[str]]
    """By model that clients name."""

    def serves(self, readiness: Callable[[str], Readiness]) -> bool:
        """Whether the choice can come to anything now."""
        models = {model for chain in self.chains.values() for model in chain}
        return bool(self.name) and any(readiness(model) in _THERE for model in models)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Models in the order in which they are asked, and why."""

    models: Sequence[str]
    why: str


def chosen(chain: Sequence[str], readiness: Callable[[str], Readiness], why: str) -> Chosen:
    """The chain as it is worth asking now: those with room first, those that are missing not at all."""
    known = {model: readiness(model) for model in chain}
    free = [model for model in known if known[model] is Readiness.FREE]
    busy = [model for model in known if known[model] is Readiness.BUSY]
    models = [*free, *busy]
    passed = [f"{model} is {known[model].value}" for model in chain[: chain.index(models[0])]] if models else []
    return Chosen(models, "; ".join([why, *passed]))


def explained(classified: Classified) -> str:
    """The kind and what spoke for it."""
    return f"{classified.kind.value}: {', '.join(classified.reasons)}"


class Typed:
    """An `Inference` that asks for other models than the client named, where it may."""

    def __init__(self, inner: Inference, rules: TypeRules, *, readiness: Callable[[str], Readiness]) -> None:
        self._inner = inner
        self.rules = rules
        """May be replaced at any time."""
        self.readiness = readiness
        self.chosen = dict.fromkeys(RequestType, 0)
        """Requests whose model was chosen, by kind."""
        self.fallbacks = 0
        """Requests that were given to the next model of a chain."""

    def start(self, request: Request, reply: Reply) -> Call:
        rules = self.rules
        if request.model == rules.name:
            return self._start_by_type(request, reply)
        chain = rules.fallbacks.get(request.model)
        if chain is None or request.loads_only:  # who wants one model in memory has no use for another
            return self._inner.start(request, reply)
        choice = chosen((request.model, *chain), self.readiness, "as asked")
        if not choice.models:
            return self._inner.start(request, reply)  # which knows best what is wrong with it
        return self._begin(request, reply, choice)

    def choice(self) -> str:
        """The name for which a model is chosen; empty where no model of any chain is there."""
        return self.rules.name if self.rules.serves(self.readiness) else ""

    def _start_by_type(self, request: Request, reply: Reply) -> Call:
        try:
            question = question_of(request.endpoint, request.body)
        except BadRequest as error:
            reply.fail(error)
            return _OVER
        classified = classify(question, self.rules.rules)
        self.chosen[classified.kind] += 1
        chain = self.rules.chains[classified.kind]
        choice = chosen(chain, self.readiness, explained(classified))
        if not choice.models:
            is_down = any(self.readiness(model) is Readiness.DOWN for model in chain)
            reply.fail(_nothing_there(request.model, chain, is_down=is_down))
            return _OVER
        return self._begin(request, reply, choice)

    def _begin(self, request: Request, reply: Reply, choice: Chosen) -> Call:
        hop = Hop(self, request, reply, choice)
        hop.ask()
        return hop

    def ask(self, request: Request, reply: Reply) -> Call:
        """Hand on a request whose model is settled. For `Hop` alone."""
        return self._inner.start(request, reply)


class Hop:
    """One request on its way through a chain: `Call` to the client side, `Reply` to the pool."""

    def __init__(self, typed: Typed, request: Request, reply: Reply, choice: Chosen) -> None:
        self._typed = typed
        self._request = request
        self._reply = reply
        self._models = iter(choice.models)
        self._model = next(self._models)
        self._why = choice.why
        self._call: Call | None = None
        self._said_something = False
        self._is_over = False
        self._paused = False
        self._asking = 0

    def ask(self) -> None:
        """Ask the present model."""
        try:
            request = self._for_model()
        except BadRequest as error:  # for a field whose name is no Unicode, which only a new body brings to light
            self._is_over = True
            self._reply.fail(error)
            return
        self._asking += 1
        asking = self._asking
        call = self._typed.ask(request, self)
        if self._is_over or asking != self._asking:
            call.cancel()  # it ended, or went on to the next, within `start`
            return
        self._call = call
        if self._paused:
            call.pause()

    # Call

    def cancel(self) -> None:
        self._is_over = True
        if self._call is not None:
            self._call.cancel()

    def pause(self) -> None:
        self._paused = True
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        self._paused = False
        if self._call is not None:
            self._call.resume()

    # Reply

    def head(self, head: Head) -> None:
        self._said_something = True
        self._reply.head(self._told(head))

    def chunk(self, data: bytes) -> None:
        self._reply.chunk(data)

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        self._is_over = True
        self._reply.whole(self._told(head), body, usage)

    def end(self, usage: Usage | None) -> None:
        self._is_over = True
        self._reply.end(usage)

    def fail(self, error: SutazaiError) -> None:
        following = None if self._said_something or not _another_may_do(error) else next(self._models, None)
        if self._is_over:
            return
        if following is None:
            self._is_over = True
            self._reply.fail(error)
            return
        self._typed.fallbacks += 1
        self._why += f"; {self._model} failed"
        self._model = following
        self._call = None
        self.ask()

    def _for_model(self) -> Request:
        """The request for the present model. Raises `BadRequest`."""
        model, request = self._model, self._request
        return request if model == request.model else replace(request, model=model, body=renamed(request.body, model))

    def _told(self, head: Head) -> Head:
        """The head with the choice in it."""
        why = f"{self._why}; {head.reason}"[:MAX_REASON]
        head.reason = why.encode("ascii", "replace").decode()
        if self._model != self._request.model:
            head.model = self._request.model = self._model
        return head


_OVER = NoCall()


def _another_may_do(error: SutazaiError) -> bool:
    """Whether another model could answer what this one could not."""
    if isinstance(error, NodeRejected):
        return error.status >= 500 or error.status in {404, 408, 429}
    return isinstance(error, (NodeFault, NoHealthyNode, Overloaded, UnknownModel))


def _nothing_there(name: str, chain: Sequence[str], *, is_down: bool) -> SutazaiError:
    named = f"{name!r} stood for one of {', '.join(chain) or 'no model'}"
    if is_down:
        return NoHealthyNode(f"{named}, and no node that could have one of them is up.", retry_after_s=RETRY_S)
    return BadRequest(
        f"{named}, and none of them is on a node. Pull one, or name yours under [auto] in the settings.", where="model"
    )
