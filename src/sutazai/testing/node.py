"""
A fake model server: a real one as far as a client can tell, that does what a script says.

It listens on loopback, speaks HTTP/1.1, and behaves as an Ollama, a vLLM or a llama.cpp server: their
shapes, how they let requests wait, and how they treat connections. Everything runs on the caller's event
loop, without tasks.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from sutazai.core.node import NodeKind
from sutazai.testing.capacity import Capacity, Line, Scheduler, Tally
from sutazai.testing.machine import Api, Machine
from sutazai.testing.ollama_api import OllamaApi
from sutazai.testing.openai_api import OpenAiApi
from sutazai.testing.openai_forms import LLAMACPP, OLLAMA, VLLM
from sutazai.testing.received import Received
from sutazai.testing.script import Answer, Fault, Outcome, Planned
from sutazai.testing.server import Server
from sutazai.testing.status_api import LlamaCppStatus, VllmStatus
from sutazai.testing.steps import LoadOptions
from sutazai.testing.wire import Connection


class FakeNode:
    """
    A fake model server on a loopback port.

    Inference requests take the next outcome of `script`, and `default` when it is empty. Both may hold
    functions of the request. All other requests (probes, lists, pulls) are answered truthfully unless
    `probe_fault` is set.

    An error that a function of the script raises resets its connection, and is raised when the node is
    closed.
    """

    def __init__(
        self,
        kind: NodeKind = NodeKind.OLLAMA,
        models: Sequence[str] = ("llama3",),
        *,
        slots: int = 4,
        context_tokens: int = 4096,
        load_s: float = 0.0,
        max_loaded: int = 3,
        pull_s: float = 0.0,
        registry: Sequence[str] | None = None,
        api_key: str | None = None,
        port: int = 0,
    ) -> None:
        """
        Describe a server that is not yet started.

        Args:
            slots: requests worked on at once; of each loaded model, for an Ollama.
            context_tokens: what models are loaded with when the client does not say.
            load_s: how long an Ollama takes to load a model.
            max_loaded: models that an Ollama holds in memory at once.
            pull_s: how long a pull takes.
            registry: models that can be pulled; None = any.
            port: 0 takes a free one.
        """
        self.script: deque[Planned] = deque()
        self.default: Planned = Answer()
        self.probe_fault: Fault | None = None
        self._port = port
        tally = Tally()
        is_ollama = kind is NodeKind.OLLAMA
        capacity: Capacity = Scheduler(slots, max_loaded, load_s, tally) if is_ollama else Line(slots, tally)
        self._machine = Machine(
            kind=kind,
            models=[],
            slots=slots,
            context_tokens=context_tokens,
            pull_s=pull_s,
            registry=None if registry is None else tuple(registry),
            capacity=capacity,
            tally=tally,
        )
        for model in models:
            self._machine.add(model)
        self._server = Server(self._machine, _apis(self._machine), self._outcome, api_key=api_key)
        self._listener: asyncio.Server | None = None
        self._reserved: socket.socket | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """The base address, without a trailing slash."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        """The TCP port; it stays the same through `stop` and `start`."""
        return self._port

    @property
    def kind(self) -> NodeKind:
        """The server that it plays."""
        return self._machine.kind

    @property
    def models(self) -> tuple[str, ...]:
        """What it has, as its API names them: an Ollama's models always carry a tag (`llama3:latest`)."""
        return tuple(self._machine.models)

    @property
    def requests(self) -> list[Received]:
        """Every request in the order of arrival, probes too."""
        return self._server.requests

    @property
    def inferences(self) -> list[Received]:
        """The requests for a model, without probes, lists and pulls."""
        return [received for received in self.requests if received.is_inference]

    @property
    def active(self) -> int:
        """Requests that hold a slot."""
        return self._machine.tally.active

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot or for a model to be loaded."""
        return self._machine.tally.waiting

    @property
    def peak_active(self) -> int:
        """Most requests that held a slot at once."""
        return self._machine.tally.peak_active

    @property
    def in_flight(self) -> int:
        """Inference requests that have not ended: at work, waiting, stalled."""
        return self._server.in_flight

    @property
    def peak_in_flight(self) -> int:
        """Most inference requests at once."""
        return self._server.peak_in_flight

    @property
    def connections(self) -> int:
        """Connections of clients now, idle ones too."""
        return len(self._server.connections)

    @property
    def connections_made(self) -> int:
        """Connections of clients so far."""
        return self._server.connections_made

    @property
    def loaded(self) -> Mapping[str, int]:
        """An Ollama's models in memory by full name, and the context length (tokens) of each."""
        return self._machine.capacity.loaded()

    @property
    def loads(self) -> int:
        """Models that an Ollama has loaded so far, reloads too."""
        return self._machine.tally.loads

    def load(self, model: str, context_tokens: int | None = None) -> None:
        """Put a model into an Ollama's memory at once."""
        options = LoadOptions(context_tokens or self._machine.context_tokens)
        self._machine.capacity.load(self._machine.wire_name(model), options)

    def unload(self, model: str) -> None:
        """Drop a model from an Ollama's memory as soon as nobody uses it."""
        self._machine.capacity.unload(self._machine.wire_name(model))

    def add_model(self, model: str) -> None:
        """Have a model from now on, as if it had been pulled."""
        self._machine.add(model)

    def remove_model(self, model: str) -> None:
        """Have a model no more."""
        self._machine.remove(model)

    async def start(self) -> None:
        """Listen; on the port of the last time, if there was one. Raises `OSError` when it is taken."""
        if self._reserved is None:
            self._reserved = _bound(self._port)
            self._port = self._reserved.getsockname()[1]
        loop = asyncio.get_running_loop()
        listening = _bound(self._port)
        self._listener = await loop.create_server(lambda: Connection(self._server), sock=listening, backlog=4096)

    async def stop(self) -> None:
        """Die: connections are reset, new ones are refused, the memory is empty. The port stays ours."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        seen: set[Connection] = set()

        def are_gone() -> bool:
            """One that was let in before the end may come after it."""
            for connection in self._server.connections - seen:
                seen.add(connection)
                connection.reset()
            return not self._server.connections

        await self.until(are_gone)
        self._machine.capacity.forget()
        self._server.frozen = False

    async def close(self) -> None:
        """Stop for good. Raises an `ExceptionGroup` of what functions of the script had raised."""
        await self.stop()
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        if self._server.mistakes:
            mistakes, self._server.mistakes = self._server.mistakes, []
            raise ExceptionGroup("The script of a fake node failed; see its functions.", mistakes)

    def freeze(self) -> None:
        """Go on accepting and reading, and send nothing any more, not even to probes."""
        self._server.frozen = True

    def thaw(self) -> None:
        """Go on where it froze."""
        self._server.frozen = False
        for connection in tuple(self._server.connections):
            connection.advance()

    async def until(self, holds: Callable[[], bool], *, within_s: float = 5.0) -> None:
        """Wait until something holds of this node. Raises `TimeoutError`, telling what the node was doing."""
        await self._server.until(holds, within_s)

    async def wait_for(self, requests: int, *, within_s: float = 5.0) -> None:
        """Wait until so many inference requests have come in all. Raises `TimeoutError`."""
        await self.until(lambda: len(self.inferences) >= requests, within_s=within_s)

    async def wait_idle(self, *, within_s: float = 5.0) -> None:
        """Wait until no inference request is under way. Raises `TimeoutError`."""
        await self.until(lambda: self.in_flight == 0, within_s=within_s)

    def _outcome(self, received: Received) -> Outcome:
        if not received.is_inference:
            return self.probe_fault or Answer()
        planned = self.script.popleft() if self.script else self.default
        return planned if isinstance(planned, Answer | Fault) else planned(received)


def _apis(machine: Machine) -> tuple[Api, ...]:
    match machine.kind:
        case NodeKind.OLLAMA:
            return OllamaApi(machine), OpenAiApi(machine, OLLAMA)
        case NodeKind.OPENAI:
            return OpenAiApi(machine, VLLM), VllmStatus(machine)
        case NodeKind.LLAMACPP:
            return OpenAiApi(machine, LLAMACPP), LlamaCppStatus(machine)


def _bound(port: int) -> socket.socket:
    """
    A socket on that loopback port, bound and not yet listening.

    While one such socket is open nobody else gets the port, and connections to it are refused: that is how
    a node that died keeps its address.
    """
    # Without the protocol's number asyncio leaves Nagle's algorithm on, and each answer waits 40 ms for an ACK.
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(("127.0.0.1", port))
    except OSError:
        bound.close()
        raise
    return bound
