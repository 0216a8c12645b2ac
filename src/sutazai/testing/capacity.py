"""
How many requests a fake server works on, what the others wait for, and which models are in memory.

`Line` is a server whose models are all loaded (vLLM, llama.cpp). `Scheduler` is Ollama: each loaded model
has slots of its own and an endless line, a request that needs a model loaded waits for all loads before it,
and a model that is asked for with other options is loaded anew as soon as nobody uses it.

Source: Ollama's `server/sched.go`, where `OLLAMA_NUM_PARALLEL`, `OLLAMA_MAX_LOADED_MODELS` and
`OLLAMA_MAX_QUEUE` act.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from sutazai.testing.steps import LoadOptions, TakeSlot

PENDING_LIMIT = 512
"""Requests that wait for a load at most: the default of `OLLAMA_MAX_QUEUE`."""


@dataclass(slots=True)
class Tally:
    """How busy a server is."""

    active: int = 0
    waiting: int = 0
    peak_active: int = 0
    loads: int = 0


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's claim to a slot."""

    wish: TakeSlot
    on_slot: Callable[[], None]
    """Called when it has got one, which may be at once."""
    line: Line | None = None
    holds_slot: bool = False


class Capacity(Protocol):
    """Who may work now."""

    def take(self, wish: TakeSlot, on_slot: Callable[[], None]) -> Ticket | None:
        """Claim a slot. None where too many wait already."""

    def leave(self, ticket: Ticket) -> None:
        """Give the slot back, or stop waiting for one."""

    def load(self, model: str, options: LoadOptions) -> None:
        """Put a model into memory at once, unless it is there with these options."""

    def unload(self, model: str) -> None:
        """Drop a model from memory."""

    def loaded(self) -> Mapping[str, int]:
        """Models in memory and the context length (tokens) of each."""

    def forget(self) -> None:
        """Empty the memory: the process died. All slots were given back before."""


class Line:
    """Slots, and those who wait for them in order."""

    def __init__(self, slots: int, tally: Tally) -> None:
        self._slots = slots
        self._tally = tally
        self._running = 0
        self._waiting: deque[Ticket] = deque()

    @property
    def idle(self) -> bool:
        """Nobody works and nobody waits."""
        return self._running == 0 and not self._waiting

    def take(self, wish: TakeSlot, on_slot: Callable[[], None]) -> Ticket:
        """Claim a slot."""
        ticket = Ticket(wish, on_slot)
        self.enter(ticket)
        return ticket

    def enter(self, ticket: Ticket) -> None:
        """Join the line."""
        ticket.line = self
        if self._running < self._slots:
            self._grant(ticket)
        else:
            self._waiting.append(ticket)
            self._tally.waiting += 1

    def leave(self, ticket: Ticket) -> None:
        """Give the slot back, or stop waiting for one."""
        if not ticket.holds_slot:
            self._waiting.remove(ticket)
            self._tally.waiting -= 1
            return
        ticket.holds_slot = False
        self._running -= 1
        self._tally.active -= 1
        if self._waiting:
            self._tally.waiting -= 1
            self._grant(self._waiting.popleft())

    def load(self, model: str, options: LoadOptions) -> None:
        """Nothing to do: every model is in memory."""

    def unload(self, model: str) -> None:
        """Nothing to do: every model stays in memory."""

    def loaded(self) -> Mapping[str, int]:
        """Empty: this kind of server has no such notion."""
        return {}

    def forget(self) -> None:
        """Nothing to do: a new process loads every model before it listens."""

    def _grant(self, ticket: Ticket) -> None:
        ticket.holds_slot = True
        self._running += 1
        self._tally.active += 1
        self._tally.peak_active = max(self._tally.peak_active, self._tally.active)
        ticket.on_slot()


@dataclass(slots=True, eq=False)
class Runner:
    """A model in memory."""

    options: LoadOptions
    line: Line
    leaves_when_idle: bool = False


@dataclass(slots=True, eq=False)
class Scheduler:
    """Ollama's way to share a machine between models."""

    slots: int
    """Of each model."""
    max_loaded: int
    load_s: float
    tally: Tally
    _runners: dict[str, Runner] = field(default_factory=dict)
    """By model; the one that was asked for longest ago comes first."""
    _pending: deque[Ticket] = field(default_factory=deque)
    _loading: asyncio.TimerHandle | None = None

    def take(self, wish: TakeSlot, on_slot: Callable[[], None]) -> Ticket | None:
        """Claim a slot. None where too many wait for a load already."""
        ticket = Ticket(wish, on_slot)
        if self._use_loaded(ticket):
            return ticket
        if len(self._pending) >= PENDING_LIMIT:
            return None
        self._pending.append(ticket)
        self.tally.waiting += 1
        self._load_next()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give the slot back, or stop waiting for one."""
        if ticket.line is None:
            self._pending.remove(ticket)
            self.tally.waiting -= 1
        else:
            ticket.line.leave(ticket)
        runner = self._runners.get(ticket.wish.model)
        if runner is not None and runner.leaves_when_idle and runner.line.idle:
            del self._runners[ticket.wish.model]
        self._load_next()

    def load(self, model: str, options: LoadOptions) -> None:
        """Put a model into memory at once, unless it is there with these options."""
        runner = self._runners.get(model)
        if runner is None or runner.options != options:
            self._runners[model] = Runner(options, Line(self.slots, self.tally))
            self.tally.loads += 1

    def unload(self, model: str) -> None:
        """Drop a model from memory, as soon as nobody uses it."""
        runner = self._runners.get(model)
        if runner is not None:
            runner.leaves_when_idle = True
            if runner.line.idle:
                del self._runners[model]

    def loaded(self) -> Mapping[str, int]:
        """Models in memory and the context length (tokens) of each."""
        return {model: runner.options.context_tokens for model, runner in self._runners.items()}

    def forget(self) -> None:
        """Empty the memory, and end a load under way."""
        if self._loading is not None:
            self._loading.cancel()
            self._loading = None
        self._runners.clear()

    def _use_loaded(self, ticket: Ticket) -> bool:
        """Enter the line of the model, if it is loaded as wished."""
        runner = self._runners.get(ticket.wish.model)
        if runner is None or runner.options != ticket.wish.options:
            return False
        self._runners[ticket.wish.model] = self._runners.pop(ticket.wish.model)
        runner.leaves_when_idle = not ticket.wish.keep_loaded
        runner.line.enter(ticket)
        return True

    def _load_next(self) -> None:
        """Serve those who wait for a load, strictly in order: one that must wait holds up all behind it."""
        while self._pending and self._loading is None:
            ticket = self._pending[0]
            if not self._is_loaded(ticket.wish):
                if not self._make_room(ticket.wish.model):
                    return
                if self.load_s > 0:
                    loop = asyncio.get_running_loop()
                    self._loading = loop.call_later(self.load_s, self._finish_load, ticket.wish)
                    return
                self.load(ticket.wish.model, ticket.wish.options)
            self._pending.popleft()
            self.tally.waiting -= 1
            self._use_loaded(ticket)

    def _is_loaded(self, wish: TakeSlot) -> bool:
        runner = self._runners.get(wish.model)
        return runner is not None and runner.options == wish.options

    def _make_room(self, model: str) -> bool:
        """Drop the same model with other options, else the idle one used longest ago. False: all are busy."""
        if model in self._runners:
            leaving = [model]
        elif len(self._runners) < self.max_loaded:
            return True
        else:
            leaving = list(self._runners)
        for name in leaving:
            if self._runners[name].line.idle:
                del self._runners[name]
                return True
        return False

    def _finish_load(self, wish: TakeSlot) -> None:
        # A load is finished even where its client has left: so does Ollama.
        self._loading = None
        self.load(wish.model, wish.options)
        self._load_next()
