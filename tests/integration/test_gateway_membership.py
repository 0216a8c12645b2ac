"""Who is in the pool: listed, resolved, found, and changed while it runs."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

from sutazai.adapters.ollama import OllamaNode
from sutazai.adapters.openai import OpenAINode
from sutazai.bootstrap import Gateway, open_gateway
from sutazai.bootstrap.rules import sources
from sutazai.core.node import Health, Node, NodeKind, NodeState
from sutazai.gateway.fleet import Fleet
from sutazai.gateway.membership import DnsName, Membership, Rhythm, Sources, Wanted
from sutazai.policy.routing import RoutingRules
from sutazai.ports.nodes import NodeClient
from sutazai.settings.load import load
from sutazai.settings.model import Discovery, ModelSettings, Settings
from sutazai.testing import Answer, FakeNode, Fault

if TYPE_CHECKING:
    from tests.conftest import Dial, StartGateway, StartNode, StartProgram

RULES = RoutingRules(head_start=1, slow_start_s=0.0, failure_penalty_s=10.0)
RHYTHM = Rhythm(probe_s=0.05, probe_limit_s=1.0, refresh_s=0.05)
NOTHING = Sources(listed=(), dns=(), ollama=None)
ASKED = {"model": "llama3", "prompt": "hello", "stream": False}


class Dns:
    """Names whose addresses a test changes; a resolver that can be away."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: Sequence[str] = addresses
        self.error: Exception | None = None
        self.asked = 0

    async def resolve(self, name: str, port: int) -> Sequence[str]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.addresses


def connect(node: Node, api_key: str | None) -> NodeClient:
    if node.kind is NodeKind.OLLAMA:
        return OllamaNode(node, api_key=api_key, connect_s=1.0, model_settings=lambda _: ModelSettings())
    return OpenAINode(node, api_key=api_key, connect_s=1.0)


def listed(node: FakeNode, name: str, **fields: object) -> Wanted:
    return Wanted(node=Node(name=name, kind=node.kind, url=node.url, **fields), api_key=None)  # type: ignore[arg-type]


@asynccontextmanager
async def membership(wanted: Sources, dns: Dns | None = None) -> AsyncIterator[Membership]:
    """A membership that runs and has probed everything once."""
    fleet = Fleet(RULES, failures_to_down=3)
    kept = Membership(fleet, wanted, RHYTHM, connect=connect, resolve=(dns or Dns()).resolve)
    task = asyncio.create_task(kept.run(), name="membership")
    try:
        async with asyncio.timeout(5):
            await kept.settled.wait()
        yield kept
    finally:
        task.cancel()
        await asyncio.wait([task])
        for client in fleet.clients():
            await client.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


def names(kept: Membership) -> list[str]:
    return [state.node.name for state in kept.fleet.states()]


def member(kept: Membership | Gateway, name: str) -> NodeState:
    state = kept.fleet.state(name)
    assert state is not None
    return state


async def test_listed_nodes_of_every_kind_are_in_the_pool_with_what_they_have(fake_nodes: StartNode) -> None:
    nodes = {kind.value: await fake_nodes(kind, ("llama3", "qwen3")) for kind in NodeKind}
    async with membership(Sources(listed=[listed(n, name) for name, n in nodes.items()], dns=(), ollama=None)) as kept:
        assert names(kept) == ["llamacpp", "ollama", "openai"]
        assert all(state.health is Health.UP for state in kept.fleet.states())
        assert {state.node.name: state.slots for state in kept.fleet.states()} == {
            "ollama": 1,
            "openai": 64,
            "llamacpp": 4,
        }
        assert len(kept.fleet.candidates("qwen3")) == 3


async def test_a_node_that_is_away_does_not_hold_up_the_others(fake_nodes: StartNode) -> None:
    good, dead = await fake_nodes(), await fake_nodes()
    await dead.stop()
    async with membership(Sources(listed=[listed(good, "good"), listed(dead, "dead")], dns=(), ollama=None)) as kept:
        assert member(kept, "good").health is Health.UP
        assert member(kept, "dead").health is Health.DOWN
        await dead.start()
        await until(lambda: member(kept, "dead").health is Health.UP)


async def test_a_node_that_answers_nonsense_is_down_and_says_why(fake_nodes: StartNode) -> None:
    node = await fake_nodes()
    node.probe_fault = Fault.status(200, b"[1, 2]")
    async with membership(Sources(listed=[listed(node, "odd")], dns=(), ollama=None)) as kept:
        assert member(kept, "odd").health is Health.DOWN
        assert "not understood" in member(kept, "odd").last_error
        node.probe_fault = None
        await until(lambda: member(kept, "odd").health is Health.UP)


async def test_only_the_models_that_the_settings_name_are_offered(fake_nodes: StartNode) -> None:
    node = await fake_nodes(models=("llama3", "qwen3", "phi4"))
    wanted = listed(node, "a", models=("llama3", "phi4:latest"))
    async with membership(Sources(listed=[wanted], dns=(), ollama=None)) as kept:
        assert sorted(kept.fleet.listed_models()) == ["llama3:latest", "phi4:latest"]
        assert not kept.fleet.candidates("qwen3")


async def test_models_can_be_asked_for_with_and_without_latest(fake_nodes: StartNode) -> None:
    """As Ollama does: the tag is `latest` where none is given. Other tags are other models."""
    ollama = await fake_nodes(models=("llama3", "llama3:70b"))
    vllm = await fake_nodes(NodeKind.OPENAI, ("llama3",))
    async with membership(
        Sources(listed=[listed(ollama, "ollama"), listed(vllm, "vllm")], dns=(), ollama=None)
    ) as kept:
        having = {
            model: sorted(state.node.name for state in kept.fleet.candidates(model))
            for model in ("llama3", "llama3:latest", "llama3:70b", "llama3:8b")
        }

    assert having == {
        "llama3": ["ollama", "vllm"],
        "llama3:latest": ["ollama"],
        "llama3:70b": ["ollama"],
        "llama3:8b": [],
    }


async def test_addresses_of_a_name_come_and_go(fake_nodes: StartNode) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    dns = Dns("127.0.0.1")
    name = DnsName(name="tasks.vllm", port=node.port, kind=NodeKind.OPENAI, slots=3, api_key=None)
    async with membership(Sources(listed=(), dns=(name,), ollama=None), dns) as kept:
        first = f"tasks.vllm/127.0.0.1:{node.port}"
        assert names(kept) == [first]
        assert member(kept, first).slots == 3
        assert member(kept, first).node.source == "dns:tasks.vllm"
        stays = member(kept, first)
        dns.addresses = ("127.0.0.1", "127.0.0.2", "127.0.0.1")
        await until(lambda: len(names(kept)) == 2)
        dns.addresses = ("127.0.0.1",)
        await until(lambda: names(kept) == [first])

        assert member(kept, first) is stays, "who stays is not touched"


@pytest.mark.parametrize(
    "error",
    [socket.gaierror(-3, "Temporary failure in name resolution"), TimeoutError(), UnicodeError("label too long")],
    ids=lambda error: type(error).__name__,
)
async def test_a_resolver_that_fails_keeps_the_nodes_it_told_before(error: Exception, fake_nodes: StartNode) -> None:
    node = await fake_nodes(NodeKind.OPENAI)
    other = await fake_nodes()
    dns = Dns("127.0.0.1")
    name = DnsName(name="vllm", port=node.port, kind=NodeKind.OPENAI, slots=None, api_key=None)
    async with membership(Sources(listed=(), dns=(name,), ollama=None), dns) as kept:
        dns.error = error
        asked = dns.asked
        kept.adopt(Sources(listed=(listed(other, "new"),), dns=(name,), ollama=None), RHYTHM)
        await until(lambda: dns.asked > asked + 2)

        assert names(kept) == ["new", f"vllm/127.0.0.1:{node.port}"]
        assert all(state.health is Health.UP for state in kept.fleet.states())


async def test_an_address_of_the_newer_internet_protocol_becomes_a_url(fake_nodes: StartNode) -> None:
    name = DnsName(name="vllm", port=1, kind=NodeKind.OPENAI, slots=None, api_key=None)
    async with membership(Sources(listed=(), dns=(name,), ollama=None), Dns("::1")) as kept:
        assert [state.node.url for state in kept.fleet.states()] == ["http://[::1]:1"]


async def test_an_ollama_that_starts_later_is_found(fake_nodes: StartNode) -> None:
    node = await fake_nodes()
    await node.stop()
    async with membership(Sources(listed=(), dns=(), ollama=node.url)) as kept:
        assert names(kept) == []
        await node.start()
        await until(lambda: names(kept) == ["ollama"])
        await until(lambda: member(kept, "ollama").health is Health.UP)

        assert member(kept, "ollama").node.source == "found"


async def test_something_else_at_ollamas_address_is_no_node_and_harms_nobody(fake_nodes: StartNode) -> None:
    other, node = await fake_nodes(), await fake_nodes(NodeKind.LLAMACPP)
    other.probe_fault = Fault.status(200, b"[]")
    async with membership(Sources(listed=(), dns=(), ollama=other.url)) as kept:
        kept.embed(Node(name="engine", kind=NodeKind.LLAMACPP, url=node.url), None)
        await until(lambda: names(kept) == ["engine"])


async def test_ollama_is_not_looked_for_where_nodes_are_listed(fake_nodes: StartNode) -> None:
    ollama, other = await fake_nodes(), await fake_nodes()
    async with membership(Sources(listed=(listed(other, "a"),), dns=(), ollama=ollama.url)) as kept:
        await until(lambda: len(other.requests) > 6)

        assert names(kept) == ["a"]
        assert ollama.requests == []


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("10.0.0.5", "http://10.0.0.5:11434"),
        ("gpu:8000", "http://gpu:8000"),
        ("https://gpu.example.org", "https://gpu.example.org:443"),
        ("http://gpu:8000/ollama/", "http://gpu:8000/ollama"),
        ("[::1]:9", "http://[::1]:9"),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(host: str, url: str) -> None:
    assert sources(Settings(), {"OLLAMA_HOST": host}).ollama == url


def test_ollama_is_looked_for_only_where_the_settings_allow() -> None:
    assert sources(Settings(discovery=Discovery(ollama=False)), {}).ollama is None


async def test_a_node_that_leaves_while_it_streams_finishes_what_it_has(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, tmp_path: Path, data_dir: Path
) -> None:
    """By a change of the settings file, as an operator does it: nobody who is served notices."""
    leaving, staying = await fake_nodes(), await fake_nodes()
    leaving.default = Answer(tokens=("a",) * 30, between_s=0.05)
    path = tmp_path / "sutazai.toml"
    async with running(path, data_dir, leaving) as gateway:
        wire = await dial(gateway.port)
        wire.post("/api/generate", ASKED | {"stream": True})
        await wire.head()
        await wire.chunk()
        path.write_text(toml(staying))
        gateway.reload()
        await until(lambda: [state.node.url for state in gateway.fleet.states()] == [staying.url])
        await until(lambda: member(gateway, "node-0").health is Health.UP)
        other = await dial(gateway.port)
        other.post("/api/generate", ASKED)
        assert (await other.answer()).status == 200
        parts: list[bytes] = []
        while part := await wire.chunk():
            parts.append(part)
        lines = b"".join(parts).splitlines()

    assert b'"done":true' in lines[-1]
    assert sum(b'"response":"a"' in line for line in lines) >= 28
    assert leaving.inferences[0].finished
    assert len(staying.inferences) == 1


async def test_a_change_of_the_file_is_taken_up_without_being_told(
    fake_nodes: StartNode, tmp_path: Path, data_dir: Path
) -> None:
    first, second = await fake_nodes(), await fake_nodes()
    path = tmp_path / "sutazai.toml"
    async with running(path, data_dir, first) as gateway:
        path.write_text(toml(first, second) + "[queue]\nmax_waiting = 7\n")
        await until(lambda: len(gateway.fleet.states()) == 2)
        await until(lambda: all(state.health is Health.UP for state in gateway.fleet.states()))


async def test_a_hangup_signal_reads_the_settings_again_and_ends_nothing(
    fake_nodes: StartNode, programs: StartProgram, dial: Dial, tmp_path: Path
) -> None:
    first, second = await fake_nodes(models=("llama3",)), await fake_nodes(models=("qwen3",))
    first.default = Answer(tokens=("a",) * 40, between_s=0.05)
    listing = '[[nodes]]\nurl = "{}"\n'
    program = await programs(listing.format(first.url))
    wire = await dial(program.port)
    wire.post("/api/generate", ASKED | {"stream": True})
    await wire.head()
    config = tmp_path / "0.toml"
    text = await asyncio.to_thread(config.read_text)
    await asyncio.to_thread(config.write_text, text.replace(first.url, second.url))
    program.process.send_signal(signal.SIGHUP)
    await second.until(lambda: len(second.requests) >= 3)
    parts: list[bytes] = []
    while part := await wire.chunk():
        parts.append(part)

    assert b'"done":true' in parts[-1]
    assert program.process.returncode is None


async def test_a_change_of_a_nodes_slots_turns_no_client_away(
    fake_nodes: StartNode, dial: Dial, tmp_path: Path, data_dir: Path
) -> None:
    """The only node with the model stays in the pool, with its requests, while its entry changes."""
    node = await fake_nodes(slots=4)
    node.default = Answer(first_token_s=2.0)
    path = tmp_path / "sutazai.toml"
    async with running(path, data_dir, node) as gateway:
        busy = await dial(gateway.port)
        busy.post("/api/generate", ASKED)
        await node.wait_for(1)
        before = member(gateway, "node-0")
        path.write_text(toml(node).replace('name = "node-0"', 'name = "node-0"\nslots = 3'))
        gateway.reload()
        await until(lambda: before.slots == 3)
        other = await dial(gateway.port)
        other.post("/api/generate", ASKED)

        assert member(gateway, "node-0") is before
        assert before.in_flight >= 1
        assert (await other.answer()).status == 200
        assert (await busy.answer()).status == 200


async def test_a_broken_settings_file_changes_nothing_and_says_why(
    fake_nodes: StartNode, dial: Dial, tmp_path: Path, data_dir: Path
) -> None:
    node = await fake_nodes()
    path = tmp_path / "sutazai.toml"
    with structlog.testing.capture_logs() as logs:
        async with running(path, data_dir, node) as gateway:
            path.write_text("[nodes\nurl =")
            gateway.reload()
            await until(lambda: any(entry["event"].startswith("settings refused") for entry in logs))
            wire = await dial(gateway.port)
            wire.post("/api/generate", ASKED)
            assert (await wire.answer()).status == 200

    (refusal,) = [entry for entry in logs if entry["event"].startswith("settings refused")]
    assert "sutazai.toml" in refusal["mistakes"][0]


async def test_a_gateway_that_stops_leaves_no_connection_to_a_node(
    fake_nodes: StartNode, dial: Dial, tmp_path: Path, data_dir: Path
) -> None:
    node = await fake_nodes()
    async with running(tmp_path / "sutazai.toml", data_dir, node) as gateway:
        wire = await dial(gateway.port)
        wire.post("/api/generate", ASKED)
        await wire.answer()
    await node.until(lambda: node.connections == 0, within_s=1.0)

    assert node.connections_made > 0


def toml(*nodes: FakeNode) -> str:
    entries = [
        f'[[nodes]]\nname = "node-{number}"\nurl = "{node.url}"\nkind = "{node.kind.value}"\n'
        for number, node in enumerate(nodes)
    ]
    return "\n".join([*entries, "[server]\nport = 0\n[discovery]\nrefresh_s = 0.1\n[logs]\naccess = false\n"])


@asynccontextmanager
async def running(path: Path, data_dir: Path, *nodes: FakeNode) -> AsyncIterator[Gateway]:
    """A gateway with a settings file."""
    await asyncio.to_thread(path.write_text, toml(*nodes))
    async with open_gateway(
        load(path, {}), data_dir=data_dir, settings_path=path, environ={}, with_engine=False
    ) as gateway:
        yield gateway
