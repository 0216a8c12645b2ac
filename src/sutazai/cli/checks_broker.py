"""What `sutazai doctor` finds at RabbitMQ: over AMQP, and, where it is named, through its management plugin."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from urllib.parse import quote, unquote, urlsplit

import msgspec

from sutazai.adapters.http.address import parse_address
from sutazai.adapters.http.client import HttpClient
from sutazai.adapters.http.connection import ConnectionPool
from sutazai.adapters.rabbitmq.address import Node, parse
from sutazai.adapters.rabbitmq.looking import look_at
from sutazai.adapters.rabbitmq.topology import KNOWN, STREAM, full_name
from sutazai.cli.checks import Finding, Level
from sutazai.core.errors import QueueUnavailable, SutazaiError
from sutazai.settings.model import Rabbitmq
from sutazai.settings.secret import Secret

LOOK_S = 5.0
"""For one question to the management plugin."""
LONG_HEARTBEAT_S, SHORT_HEARTBEAT_S = 20, 5
LONG_TICKTIME_S = 20
HOWTO = "docs/howto/rabbitmq.md"


class ClusterNode(msgspec.Struct, kw_only=True, frozen=True):
    """What the management plugin tells of a node; one that does not run tells nothing more."""

    name: str
    running: bool = False
    mem_alarm: bool = False
    disk_free_alarm: bool = False
    partitions: list[str] = []
    net_ticktime: int | None = None


class ClusterQueue(msgspec.Struct, kw_only=True, frozen=True):
    """What it tells of a queue."""

    name: str
    type: str = "classic"
    members: list[str] = []
    """Nodes with a copy."""
    online: list[str] = []
    """Of these, those that are there."""
    state: str = ""


async def broker(settings: Rabbitmq) -> list[Finding]:
    """All findings; none where no RabbitMQ is named."""
    if settings.url is None:
        return []
    address = parse(settings.url, heartbeat_s=settings.heartbeat_s)
    found = await asyncio.gather(*(_node(node, address.vhost, settings) for node in address.nodes))
    findings = [*found, *settings_of(settings, len(address.nodes))]
    if settings.management_url is None:
        remedy = f"Name `rabbitmq.management_url` to have majorities, alarms and partitions looked at: {HOWTO}."
        return [*findings, Finding("rabbitmq queues", Level.OK, "Majorities cannot be seen over AMQP.", remedy)]
    return findings + await _management(settings.management_url, address.vhost, settings)


async def _node(node: Node, vhost: str, settings: Rabbitmq) -> Finding:
    check = f"rabbitmq {node.name}"
    try:
        look = await look_at(node, vhost, settings, {*KNOWN, STREAM})
    except QueueUnavailable as error:
        return Finding(check, Level.FAIL, error.message)
    if not look.takes_messages:
        return Finding(
            check,
            Level.FAIL,
            f"{look.version} answers, and takes no messages: an alarm of memory or disk.",
            "`rabbitmq-diagnostics alarms` says on which node; make room there. Tasks wait in the database meanwhile.",
        )
    if look.lost_queues:
        return Finding(
            check,
            Level.FAIL,
            f"{look.version} answers, but not for {', '.join(look.lost_queues)}.",
            "Start the nodes that hold them: `rabbitmq-queues quorum_status NAME`.",
        )
    if look.other_queues:
        return Finding(
            check,
            Level.WARN,
            f"{look.version}; {', '.join(look.other_queues)} are not what the settings say, and are used as they are.",
            "Delete them when they are empty: they are declared anew.",
        )
    return Finding(check, Level.OK, f"{look.version}, takes messages")


def settings_of(settings: Rabbitmq, nodes: int) -> list[Finding]:
    """What our own settings have to do with the cluster."""
    findings = []
    if settings.heartbeat_s > LONG_HEARTBEAT_S:
        findings.append(
            Finding(
                "rabbitmq heartbeat",
                Level.WARN,
                f"A host that vanishes without a word is noticed after {2 * settings.heartbeat_s} s or more.",
                "Set `rabbitmq.heartbeat_s` to 10.",
            )
        )
    elif settings.heartbeat_s < SHORT_HEARTBEAT_S:
        findings.append(
            Finding(
                "rabbitmq heartbeat",
                Level.WARN,
                f"{settings.heartbeat_s} s is so short that a busy node can be taken for a dead one.",
                "Set `rabbitmq.heartbeat_s` to 10.",
            )
        )
    if nodes == 2:
        findings.append(
            Finding(
                "rabbitmq nodes",
                Level.WARN,
                "Of two nodes neither has a majority without the other: two are no safer than one.",
                f"Name three: {HOWTO}.",
            )
        )
    return findings


async def _management(url: Secret, vhost: str, settings: Rabbitmq) -> list[Finding]:
    parts = urlsplit(url.reveal())
    plain = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
    who = f"{unquote(parts.username or 'guest')}:{unquote(parts.password or 'guest')}"
    authorization = b"authorization: Basic " + base64.b64encode(who.encode())
    pool = ConnectionPool(plain, parse_address(plain), connect_s=LOOK_S)
    try:
        async with asyncio.timeout(LOOK_S):
            client = HttpClient(pool)
            nodes = await _asked(client, "/api/nodes", authorization)
            queues = await _asked(client, f"/api/queues/{quote(vhost, safe='')}", authorization)
        return [
            *node_findings(msgspec.json.decode(nodes, type=list[ClusterNode])),
            *queue_findings(msgspec.json.decode(queues, type=list[ClusterQueue]), settings),
        ]
    except (SutazaiError, TimeoutError, msgspec.MsgspecError) as error:
        why = str(error) or f"no answer within {LOOK_S:g} s"
        remedy = "Enable it with `rabbitmq-plugins enable rabbitmq_management`, for a user with the tag `monitoring`."
        return [Finding("rabbitmq management", Level.WARN, f"{plain} told nothing: {why}", remedy)]
    finally:
        pool.close()


async def _asked(client: HttpClient, path: str, authorization: bytes) -> bytes:
    answer = await client.fetch("GET", path, headers=(authorization,))
    if answer.status != 200:
        raise SutazaiError(f"it answered {path} with {answer.status}")
    return answer.body


def node_findings(nodes: Sequence[ClusterNode]) -> list[Finding]:
    """Alarms, partitions, nodes that are away, and how soon a node is given up."""
    findings = []
    running = [node for node in nodes if node.running]
    for node in nodes:
        check = f"rabbitmq {node.name}"
        if not node.running:
            findings.append(Finding(check, Level.FAIL, "It does not run, or has paused itself.", "Start it."))
        elif node.partitions:
            findings.append(
                Finding(
                    check,
                    Level.FAIL,
                    f"It is parted from {', '.join(node.partitions)}.",
                    "Restart the smaller part, and set `cluster_partition_handling = pause_minority`.",
                )
            )
        elif node.mem_alarm or node.disk_free_alarm:
            what = "memory" if node.mem_alarm else "disk"
            message = f"Its {what} is short, and the whole cluster takes no messages."
            findings.append(Finding(check, Level.FAIL, message, "Make room there; tasks wait in the database."))
        elif node.net_ticktime is not None and node.net_ticktime > LONG_TICKTIME_S and len(nodes) > 1:
            message = f"It takes {node.net_ticktime} s and more to give up a node whose host vanished."
            findings.append(Finding(check, Level.WARN, message, "Set `net_ticktime = 10` on all nodes."))
    if not findings:
        unseen = "`cluster_partition_handling` cannot be seen from here; let it be pause_minority."
        remedy = unseen if len(nodes) > 1 else ""
        findings.append(Finding("rabbitmq cluster", Level.OK, f"{len(running)} nodes run, without alarms", remedy))
    return findings


def queue_findings(queues: Sequence[ClusterQueue], settings: Rabbitmq) -> list[Finding]:
    """Whether each of our queues has a majority of its nodes, and as many copies as the settings want."""
    ours = {full_name(name, settings) for name in (*KNOWN, STREAM)}
    mine = [queue for queue in queues if queue.name in ours]
    findings = []
    for queue in mine:
        check = f"queue {queue.name}"
        there, copies = len(queue.online), len(queue.members)
        if queue.state == "down":
            findings.append(Finding(check, Level.FAIL, "It is down, with its node.", "Start that node."))
        elif not queue.members:  # a classic queue, which is on one node
            continue
        elif 2 * there <= copies:
            message = f"{there} of the {copies} nodes with a copy are there: no majority, so nothing is taken."
            findings.append(Finding(check, Level.FAIL, message, "Start the others: what was confirmed is on them."))
        elif there < copies:
            message = f"{there} of the {copies} nodes with a copy are there: one more, and it stands still."
            level = Level.WARN
            findings.append(Finding(check, level, message, "Start the others."))
        elif copies < settings.replicas:
            grow = f"rabbitmq-queues grow NODE all --queue-pattern '{queue.name}'"
            if queue.type == "stream":
                grow = f"rabbitmq-streams add_replica {queue.name} NODE"
            message = f"It has a copy on {copies} nodes, and `rabbitmq.replicas` is {settings.replicas}."
            findings.append(Finding(check, Level.WARN, message, f"Run `{grow}` for each node without."))
    if not findings:
        findings.append(Finding("rabbitmq queues", Level.OK, f"{len(mine)} queues, each with all its copies"))
    return findings
