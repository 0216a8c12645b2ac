"""
The context lengths that models are loaded with on one node, as far as can be known between two probes.

A load takes up to minutes, and whoever asks for another length meanwhile makes Ollama load again. So what was asked
for counts as loaded from then on, until it is seen or fails.
"""

from __future__ import annotations

from collections.abc import Mapping

from sutazai.core.errors import SutazaiError
from sutazai.core.node import LoadedModel
from sutazai.core.request import Head, Usage
from sutazai.ports.inference import Reply


class Contexts:
    """Lengths in tokens, by model; `llama3` and `llama3:latest` are one."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._coming: dict[str, int] = {}
        """Asked for, and neither seen nor failed yet."""
        self._unasked: set[str] = set()
        """Requested without a length while not loaded."""
        self._defaults: dict[str, int] = {}
        self.turn = 0
        """Grows with each length that came; a probe remembers the turn in which it asked."""
        self._came_in: dict[str, int] = {}
        """The turn in which the length of a model came."""

    def present(self, model: str) -> int:
        """What it has, or will have once the load under way is done; 0 where it is not loaded."""
        name = _short(model)
        return self._coming.get(name) or self._seen.get(name, 0)

    def default(self, model: str) -> int:
        """What the node loads it with when nobody asks; 0 until that was seen."""
        return self._defaults.get(_short(model), 0)

    def ask(self, model: str, context: int | None) -> bool:
        """A request asks for this length, or for none; returns whether its outcome will tell something."""
        name = _short(model)
        if context is None:
            self._unasked.add(name)
            return False
        if context == self._seen.get(name):
            return False
        self._coming[name] = context
        return True

    def came(self, model: str, context: int) -> None:
        """A request with this length is being answered."""
        name = _short(model)
        self.turn += 1
        self._seen[name], self._came_in[name] = context, self.turn
        self._forget(name, context)

    def failed(self, model: str, context: int) -> None:
        """A request with this length failed: perhaps the node cannot load so much, so nobody else shall ask for it."""
        self._forget(_short(model), context)

    def learn(self, loaded: Mapping[str, LoadedModel], *, asked_in: int) -> None:
        """
        What a probe saw that asked in this turn; what came since then is newer.

        A model that is there without anybody having asked here shows the default.
        """
        seen = {_short(name): entry.context_tokens for name, entry in loaded.items()}
        seen |= {name: self._seen[name] for name, turn in self._came_in.items() if turn > asked_in}
        for name, context in seen.items():
            if name in self._unasked and name not in self._seen and name not in self._coming:
                self._defaults[name] = context
            if context >= self._coming.get(name, 0):
                self._coming.pop(name, None)
        self._unasked -= seen.keys()
        self._seen = seen
        self._came_in = {name: turn for name, turn in self._came_in.items() if turn > asked_in}

    def _forget(self, name: str, context: int) -> None:
        if self._coming.get(name) == context:
            del self._coming[name]


class LoadWatch:
    """A `Reply` that tells the lengths how the request with a new one went, and passes everything on."""

    def __init__(self, contexts: Contexts, model: str, context: int, reply: Reply) -> None:
        self._contexts = contexts
        self._model = model
        self._context = context
        self._reply = reply

    def head(self, head: Head) -> None:
        self._contexts.came(self._model, self._context)
        self._reply.head(head)

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        self._contexts.came(self._model, self._context)
        self._reply.whole(head, body, usage)

    def chunk(self, data: bytes) -> None:
        self._reply.chunk(data)

    def end(self, usage: Usage | None) -> None:
        self._reply.end(usage)

    def fail(self, error: SutazaiError) -> None:
        self._contexts.failed(self._model, self._context)
        self._reply.fail(error)


def _short(model: str) -> str:
    return model.removesuffix(":latest")
