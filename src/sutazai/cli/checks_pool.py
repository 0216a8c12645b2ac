"""What `sutazai doctor` finds on the network: the gateway's address, the database, the keys, the nodes."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

import msgspec

from sutazai.adapters.http.address import parse_address
from sutazai.adapters.http.client import Answer, HttpClient
from sutazai.adapters.http.connection import ConnectionPool
from sutazai.adapters.http.resolve import resolve
from sutazai.adapters.postgres.database import Database as Postgres
from sutazai.adapters.postgres.servers import ServerState
from sutazai.adapters.postgres.stores import connected, open_stores
from sutazai.bootstrap import connector
from sutazai.bootstrap.rules import Live, sources
from sutazai.cli.checks import Finding, Level, port_fault
from sutazai.core.errors import NodeFault, NodeRejected, StoreUnavailable, SutazaiError
from sutazai.core.node import Node, NodeKind, NodeReport
from sutazai.edge.auth import is_loopback
from sutazai.gateway.membership import DnsName, Sources, Wanted
from sutazai.settings.model import Database, Settings
from sutazai.settings.secret import Secret

LOOK_S = 3.0
"""For one question that is not a probe."""
LOOK_AGAIN_S = 0.1
AT_ONCE = 16
"""Nodes looked at side by side."""


async def gateway(url: str) -> Finding | None:
    """What answers at the gateway's address; None where nobody does."""
    answer = await _look(url, "/healthz")
    if answer is None:
        return None
    if answer.headers.get(b"server") != b"sutazai":
        return Finding(
            "gateway",
            Level.FAIL,
            f"Something answers at {url}, but it is no gateway.",
            "Stop it or set `server.port` to another one; where you gave the address, correct it.",
        )
    ready = await _look(url, "/readyz")
    if ready is None or ready.status != 200:
        return Finding("gateway", Level.WARN, f"A gateway answers at {url}, but takes no requests now.", "See its log.")
    return Finding("gateway", Level.OK, f"A gateway answers at {url}.")


def address(host: str, port: int) -> Finding:
    """Whether a gateway could listen there."""
    try:
        family, kind, protocol, _, spot = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with closing(socket.socket(family, kind, protocol)) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(spot)
    except OSError as error:
        return port_fault(error, host, port)
    return Finding("gateway", Level.OK, f"None runs; port {port} of {host} is free.", "`sutazai up` starts one.")


async def databases(settings: Settings) -> Sequence[Finding]:
    """Whether the databases that are named answer: that of `[database]`, and the shards of this region."""
    own = settings.database
    found = [] if own.url is None else list(await database(own.url, own))
    for shard in settings.shards:
        if shard.url is not None and shard.region == own.region:
            there = msgspec.structs.replace(own, replicas=shard.replicas)
            found += await database(shard.url, there, check=f"shard {shard.name}")
    return found


async def database(url: Secret, settings: Database, *, check: str = "database") -> Sequence[Finding]:
    """Whether a database answers, and each of its servers where it has several."""
    try:
        async with connected(url, settings) as opened:
            servers = await _settled(opened, settings)
            if servers is not None:
                each = [_server(check, server, settings.replica_max_lag_s) for server in servers]
                return [_primary(check, servers), *each]
            async with opened.transaction():
                return [Finding(check, Level.OK, "It answers.")]
    except StoreUnavailable as error:
        return [Finding(check, Level.FAIL, error.message)]


async def _settled(opened: Postgres, settings: Database) -> Sequence[ServerState] | None:
    """What is known of several servers, once replicas had the time to show that they are not late."""
    if opened.servers() is None:
        return None
    with suppress(StoreUnavailable):
        async with opened.transaction():
            pass
    began = time.monotonic()
    while True:
        state = opened.servers()
        servers = () if state is None else state.servers
        if (
            all(one.is_primary or one.is_fresh for one in servers)
            or time.monotonic() - began > 2 * settings.replica_max_lag_s
        ):
            return servers
        await asyncio.sleep(LOOK_AGAIN_S)


def _primary(check: str, servers: Sequence[ServerState]) -> Finding:
    if any(server.is_primary for server in servers):
        return Finding(check, Level.OK, f"{len(servers)} servers, and one of them is the primary")
    remedy = "Start it, or promote a replica; until then nothing can be written."
    return Finding(check, Level.FAIL, f"None of its {len(servers)} servers is a primary.", remedy)


def _server(database: str, server: ServerState, max_lag_s: float) -> Finding:
    check = f"{database} {server.name}"
    if server.is_primary is None:
        remedy = "Start it, or take it out of `database.url` and `database.replicas`."
        return Finding(check, Level.WARN, server.fault or "It did not answer.", remedy)
    if server.is_primary:
        return Finding(check, Level.OK, "the primary")
    if server.lag_s is None or server.behind_bytes is None:
        return Finding(check, Level.WARN, "a replica; how late cannot be told without a primary")
    told = f"a replica, {server.behind_bytes:,} bytes behind"
    if server.is_fresh:
        return Finding(check, Level.OK, told)
    remedy = (
        f"It is not read from before it is at most {max_lag_s:g} s late; its log may tell why. Soon after a failover, "
        "`GRANT pg_monitor` to our role lets us see whom it follows."
    )
    return Finding(check, Level.WARN, f"{told}, and late by {server.lag_s:.1f} s or more", remedy)


async def keys(settings: Settings, folder: Path) -> Finding:
    """Whether there is a key where one is needed; `folder` as in `database.data_dir`."""
    is_local = is_loopback(settings.server.host)
    if is_local and not settings.auth.required:
        return Finding("keys", Level.OK, f"{settings.server.host} is this machine alone: no key is needed.")
    live = 0
    # an embedded database that was never started holds no key, and need not be made to find that out
    if settings.database.url is not None or (folder / "postgres").exists():
        try:
            async with open_stores(settings.database, folder, shards=settings.shards) as stores:
                live = sum(key.revoked_at is None for key in await stores.keys.all())
        except StoreUnavailable as error:
            return Finding("keys", Level.FAIL, f"They could not be read. {error.message}")
    if live:
        return Finding("keys", Level.OK, f"{live} in use")
    why = "`auth.required` is set" if is_local else f"Other machines reach {settings.server.host}"
    return Finding(
        "keys",
        Level.WARN if is_local else Level.FAIL,
        f"{why}, and there is no key yet.",
        "Make one with `sutazai keys create NAME`.",
    )


async def nodes(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """A finding for each node of the settings and of their names, or for an Ollama that was not named."""
    known = sources(settings, environ)
    if not (known.listed or known.dns):
        return [await _found_ollama(settings, known)]
    findings: list[Finding] = []
    wanted = list(known.listed)
    for name in known.dns:
        try:
            addresses = await resolve(name.name, name.port)
        except OSError as error:
            findings.append(_unresolved(name, error))
        else:
            wanted += [_at_address(name, found) for found in sorted(set(addresses))]
    at_once = asyncio.Semaphore(AT_ONCE)

    async def examined(entry: Wanted) -> Finding:
        async with at_once:
            return await _node(settings, entry)

    return [*findings, *await asyncio.gather(*map(examined, wanted))]


async def _found_ollama(settings: Settings, known: Sources) -> Finding:
    """Where no node is named: is there an Ollama to be found?"""
    rest = (
        "Name nodes under [[nodes]]."
        if settings.engine.enabled == "never"
        else "Start Ollama or name nodes under [[nodes]]; until then `sutazai up` serves what [engine] says."
    )
    if known.ollama is None:
        return Finding("nodes", Level.WARN, "No node is named.", rest)
    node = Node(name="ollama", kind=NodeKind.OLLAMA, url=known.ollama, source="found")
    finding = await _node(settings, Wanted(node=node, api_key=None))
    if finding.level is Level.FAIL:
        return Finding("nodes", Level.WARN, f"No node is named, and no Ollama answers at {known.ollama}.", rest)
    return finding


async def _node(settings: Settings, entry: Wanted) -> Finding:
    """Probe a node as the gateway would; where that fails, find out what it is."""
    check = f"node {entry.node.name}"
    limit_s = settings.health.timeout_s
    client = connector(Live(settings))(entry.node, entry.api_key)
    try:
        async with asyncio.timeout(limit_s):
            report = await client.probe()
    except TimeoutError:
        message = f"It did not answer within {limit_s:g} s at {entry.node.url}."
        return Finding(check, Level.FAIL, message, "See whether it is overloaded, or a firewall is between.")
    except SutazaiError as error:
        return await _sick(check, entry, error)
    except Exception as error:  # the border of one probe: a node may answer anything
        return await _sick(check, entry, SutazaiError(f"Its answer was not understood: {error!r}."))
    finally:
        await client.close()
    return await _healthy(check, entry, report)


async def _sick(check: str, entry: Wanted, error: SutazaiError) -> Finding:
    node = entry.node
    if isinstance(error, NodeRejected) and error.status in {401, 403}:
        remedy = "Give the key it asks for as the node's `api_key`."
        return Finding(check, Level.FAIL, f"It did not let us in ({error.status}).", remedy)
    kind = await _kind(entry)
    if kind is not None and kind is not node.kind:
        return Finding(
            check,
            Level.FAIL,
            f'It does not answer as kind = "{node.kind.value}", but as "{kind.value}" would.',
            f'Set kind = "{kind.value}" for {node.url}.',
        )
    return Finding(check, Level.FAIL, error.message, f"See that it runs, and that {node.url} is its address.")


async def _healthy(check: str, entry: Wanted, report: NodeReport) -> Finding:
    node = entry.node
    kind = node.kind if node.kind is NodeKind.OLLAMA else await _kind(entry)
    if kind is not None and kind is not node.kind:
        return Finding(
            check,
            Level.WARN,
            f'It answers as kind = "{node.kind.value}", but seems to be "{kind.value}".',
            f'Set kind = "{kind.value}" for {node.url}: the gateway then knows its slots and loaded models.',
        )
    if not report.models:
        mend = "`sutazai models pull llama3.2` fetches one." if kind is NodeKind.OLLAMA else "Load one there."
        return Finding(check, Level.WARN, "It answers, and has no model.", mend)
    names = {name.removesuffix(":latest") for name in report.models}
    if missing := [name for name in node.models if name.removesuffix(":latest") not in names]:
        remedy = "Correct its `models`, or fetch them."
        return Finding(check, Level.WARN, f"It does not have {', '.join(missing)}.", remedy)
    slots = node.slots or report.slots
    count = len(report.models)
    words = f"{node.kind.value}, {count} model{'s' if count > 1 else ''}"
    if slots is None and node.kind is NodeKind.OLLAMA:
        hint = (
            "Taken to have 1 slot; if its OLLAMA_NUM_PARALLEL is higher, give that as the node's `slots`. "
            f"`sutazai nodes tune {node.name}` measures it."
        )
        return Finding(check, Level.OK, words, hint)
    return Finding(check, Level.OK, words if slots is None else f"{words}, {slots} slots")


async def _kind(entry: Wanted) -> NodeKind | None:
    """
    What a server is, whatever the settings say; None where it answers to nothing that we know.

    llama.cpp comes first: it answers to some of Ollama's addresses, too.
    """
    listed = await _look(entry.node.url, "/v1/models", entry.api_key)
    if listed is not None and listed.headers.get(b"server") == b"llama.cpp":
        return NodeKind.LLAMACPP
    version = await _look(entry.node.url, "/api/version", entry.api_key)
    if version is not None and version.status == 200 and b'"version"' in version.body:
        return NodeKind.OLLAMA
    return NodeKind.OPENAI if listed is not None and _lists_models(listed) else None


def _lists_models(answer: Answer) -> bool:
    try:
        return answer.status == 200 and "data" in msgspec.json.decode(answer.body, type=dict[str, object])
    except msgspec.DecodeError:
        return False


async def _look(url: str, path: str, api_key: str | None = None) -> Answer | None:
    """One answer, whatever its status; None where none came in time."""
    pool = ConnectionPool(url, parse_address(url), connect_s=LOOK_S)
    try:
        async with asyncio.timeout(LOOK_S):
            return await HttpClient(pool, bearer=api_key).fetch("GET", path)
    except (NodeFault, TimeoutError):
        return None
    finally:
        pool.close()


def _unresolved(name: DnsName, error: OSError) -> Finding:
    reason = error.strerror or str(error) or "no answer in time"
    remedy = "Correct it under [[discovery.dns]], or see that its service runs."
    return Finding(f"name {name.name}", Level.FAIL, f"It has no address: {reason}.", remedy)


def _at_address(name: DnsName, found: str) -> Wanted:
    host = f"[{found}]" if ":" in found else found
    node = Node(
        name=f"{name.name}/{found}:{name.port}",
        kind=name.kind,
        url=f"http://{host}:{name.port}",
        slots=name.slots,
        source=f"dns:{name.name}",
    )
    return Wanted(node=node, api_key=name.api_key)
