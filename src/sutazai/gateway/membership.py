"""
Who is in the pool: nodes come from the settings, from names in the DNS, from an Ollama on this machine and from the
embedded engine; each is probed until it leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from sutazai.core.errors import NodeTimeout, SutazaiError
from sutazai.core.node import Health, Node, NodeKind, NodeState
from sutazai.gateway.fleet import Fleet
from sutazai.ports.nodes import NodeClient

log = structlog.get_logger("sutazai.membership")

DEFAULT_SLOTS = {NodeKind.OLLAMA: 1, NodeKind.OPENAI: 64, NodeKind.LLAMACPP: 1}
"""Ollama: `OLLAMA_NUM_PARALLEL` is 1 unless set. vLLM batches up to 256; a quarter of that keeps latency sane."""
DEPARTURE_S = 1800.0
"""A node that left may finish what it has for at most this long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A node that should be in the pool, with what is needed to talk to it."""

    node: Node
    api_key: str | None

    def __repr__(self) -> str:
        return f"Wanted({self.node.name})"


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsName:
    """A name whose addresses are nodes."""

    name: str
    port: int
    kind: NodeKind
    slots: int | None
    api_key: str | None

    def __repr__(self) -> str:
        return f"DnsName({self.name}:{self.port})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where nodes come from."""

    listed: Sequence[Wanted]
    dns: Sequence[DnsName]
    ollama: str | None
    """Address at which an Ollama may be found; None not to look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """How often, in seconds."""

    probe_s: float
    probe_limit_s: float
    refresh_s: float


class Membership:
    """Keeps the fleet equal to its sources, and probes it."""

    def __init__(
        self,
        fleet: Fleet,
        sources: Sources,
        rhythm: Rhythm,
        *,
        connect: Callable[[Node, str | None], NodeClient],
        resolve: Callable[[str, int], Awaitable[Sequence[str]]],
    ) -> None:
        """
        Make it; nothing happens before `run`.

        Args:
            connect: makes the client of a node from its key.
            resolve: addresses of a name, within a limit of its own; raises `OSError`.
        """
        self.fleet = fleet
        self._sources = sources
        self._rhythm = rhythm
        self._connect = connect
        self._resolve = resolve
        self._members: dict[str, tuple[Wanted, asyncio.Task[None]]] = {}
        self._embedded: dict[str, Wanted] = {}
        self._resolved: dict[DnsName, tuple[Wanted, ...]] = {}
        self._found: Wanted | None = None
        self._changed = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self.settled = asyncio.Event()
        """Set once every node of the first round was probed, whatever came of it."""

    def adopt(self, sources: Sources, rhythm: Rhythm) -> None:
        """New settings: nodes that stay keep their state, connections and requests."""
        self._sources = sources
        self._rhythm = rhythm
        self._changed.set()

    def embed(self, node: Node, api_key: str | None) -> None:
        """The embedded engine started, or started again elsewhere."""
        self._embedded[node.name] = Wanted(node=node, api_key=api_key)
        self._changed.set()

    def unembed(self, name: str) -> None:
        """The embedded engine is away."""
        self._embedded.pop(name, None)
        self._changed.set()

    async def probe_all(self) -> None:
        """Probe every node now, within the limit of a probe: models came or went."""
        states = [state for state in self.fleet.states() if state.node.name in self._members]
        await asyncio.gather(*(self._probe(state, self.fleet.client(state.node.name)) for state in states))

    async def run(self) -> None:
        """Keep the pool until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                while True:
                    try:
                        await self._refresh()
                    except Exception:  # the border of one turn: what is wrong now may be right in five seconds
                        log.exception("membership not refreshed")
                    await self._first_round()
                    await self._pause()
        finally:
            self._group = None
            for name in self._members:
                await self.fleet.client(name).close()

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._rhythm.refresh_s):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _first_round(self) -> None:
        if self.settled.is_set():
            return
        while any(state.health is Health.UNKNOWN for state in self.fleet.states()):
            await asyncio.sleep(0.01)
        self.settled.set()

    async def _refresh(self) -> None:
        """Bring the members in line with the sources."""
        self._changed.clear()
        await self._resolve_names()
        await self._look_for_ollama()
        wanted = {entry.node.name: entry for entry in self._all_wanted()}
        for name, (entry, task) in list(self._members.items()):
            present = wanted.get(name)
            if present is None or not _is_same_server(present, entry):
                self._leave(name)
            elif present != entry:
                self.fleet.amend(name, present.node, slots=_slots(present.node))
                self._members[name] = (present, task)
        for name, entry in wanted.items():
            if name not in self._members:
                self._join(entry)

    def _all_wanted(self) -> list[Wanted]:
        found = [self._found] if self._found is not None else []
        resolved = [entry for name in self._sources.dns for entry in self._resolved.get(name, ())]
        return [*self._sources.listed, *resolved, *found, *self._embedded.values()]

    async def _resolve_names(self) -> None:
        for name in self._sources.dns:
            try:
                addresses = await self._resolve(name.name, name.port)
            except (OSError, UnicodeError) as error:  # the latter for names that no DNS could have
                # a resolver that is away must not empty the pool: the addresses of before stay
                log.warning("name not resolved", name=name.name, error=str(error))
                continue
            self._resolved[name] = tuple(_at_address(name, address) for address in sorted(set(addresses)))

    async def _look_for_ollama(self) -> None:
        url = self._sources.ollama
        if url is None or self._sources.listed or self._sources.dns:
            self._found = None
            return
        if self._found is not None:
            return
        node = Node(name="ollama", kind=NodeKind.OLLAMA, url=url, source="found")
        client = self._connect(node, None)
        try:
            async with asyncio.timeout(self._rhythm.probe_limit_s):
                await client.probe()
        except (SutazaiError, TimeoutError):
            return
        except Exception as error:  # the border of one probe: anything may listen there
            log.debug("no ollama", url=url, error=repr(error))
            return
        finally:
            await client.close()
        log.info("ollama found", url=url)
        self._found = Wanted(node=node, api_key=None)

    def _join(self, entry: Wanted) -> None:
        node = entry.node
        client = self._connect(node, entry.api_key)
        state = self.fleet.add(node, client, slots=_slots(node))
        assert self._group is not None, "membership runs"  # noqa: S101 - says so to the type checker
        task = self._group.create_task(self._probe_on(state, client), name=f"probe {node.name}")
        self._members[node.name] = (entry, task)
        log.info("node joined", node=node.name, kind=node.kind.value, url=node.url, source=node.source)

    def _leave(self, name: str) -> None:
        _, task = self._members.pop(name)
        client = self.fleet.client(name)
        task.cancel()
        state = self.fleet.remove(name)
        if state is not None and self._group is not None:
            self._group.create_task(_depart(state, client), name=f"drain {name}")
        log.info("node left", node=name)

    async def _probe_on(self, state: NodeState, client: NodeClient) -> None:
        """Probe one node until it leaves."""
        while True:
            await self._probe(state, client)
            await asyncio.sleep(self._rhythm.probe_s)

    async def _probe(self, state: NodeState, client: NodeClient) -> None:
        limit_s = self._rhythm.probe_limit_s
        try:
            async with asyncio.timeout(limit_s):
                report = await client.probe()
        except TimeoutError:
            message = f"The node {state.node.name} did not answer a probe within {limit_s:g} s."
            self.fleet.failed_probe(state, NodeTimeout(message, node=state.node.name))
        except SutazaiError as error:
            self.fleet.failed_probe(state, error)
        except Exception as error:  # the border of one probe: a node may answer anything
            log.warning("probe not understood", node=state.node.name, error=repr(error))
            self.fleet.failed_probe(state, SutazaiError(f"Its answer to a probe was not understood: {error!r}"))
        else:
            self.fleet.reported(state, report)


def _slots(node: Node) -> int:
    """What is known of its slots before it was asked."""
    return node.slots or DEFAULT_SLOTS[node.kind]


async def _depart(state: NodeState, client: NodeClient) -> None:
    """Close a node's connections once it has finished what it works on."""
    try:
        async with asyncio.timeout(DEPARTURE_S):
            while state.in_flight:
                await asyncio.sleep(0.1)
    except TimeoutError:
        log.warning("node left with requests under way", node=state.node.name, in_flight=state.in_flight)
    finally:
        await client.close()


def _is_same_server(one: Wanted, other: Wanted) -> bool:
    """Whether only what we make of it differs: such a node keeps its connections and requests."""
    nodes = (replace(entry.node, slots=None, is_adaptive=False, models=()) for entry in (one, other))
    return next(nodes) == next(nodes) and one.api_key == other.api_key


def _at_address(name: DnsName, address: str) -> Wanted:
    host = f"[{address}]" if ":" in address else address
    node = Node(
        name=f"{name.name}/{address}:{name.port}",
        kind=name.kind,
        url=f"http://{host}:{name.port}",
        slots=name.slots,
        source=f"dns:{name.name}",
    )
    return Wanted(node=node, api_key=name.api_key)
