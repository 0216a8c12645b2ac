"""What the doctor says about a cluster, given what its management plugin tells."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sutazai.cli.checks import Finding, Level
from sutazai.cli.checks_broker import ClusterNode, ClusterQueue, node_findings, queue_findings, settings_of
from sutazai.settings.model import Rabbitmq

ALL = ["r1@localhost", "r2@localhost", "r3@localhost"]


def nodes(**third: Any) -> list[ClusterNode]:
    """Three as RabbitMQ 3.10 tells of them, the last as told here."""
    usual = {"running": True, "mem_alarm": False, "disk_free_alarm": False, "partitions": [], "net_ticktime": 10}
    told = [{"name": name, **usual} for name in ALL[:2]] + [{"name": ALL[2], **(third or usual)}]
    return msgspec.json.decode(msgspec.json.encode(told), type=list[ClusterNode])


def queue(name: str = "task_processing", **told: Any) -> ClusterQueue:
    usual = {"name": name, "type": "quorum", "members": ALL, "online": ALL, "leader": ALL[1]}
    return msgspec.json.decode(msgspec.json.encode({**usual, **told}), type=ClusterQueue)


def levels(findings: list[Finding]) -> list[Level]:
    return [finding.level for finding in findings]


def test_a_cluster_that_is_whole_is_fine_but_for_what_nobody_can_see() -> None:
    (finding,) = node_findings(nodes())

    assert finding.level is Level.OK
    assert "pause_minority" in finding.remedy


@pytest.mark.parametrize(
    ("third", "level", "words"),
    [
        ({"running": False}, Level.FAIL, "does not run"),
        ({"running": True, "mem_alarm": True}, Level.FAIL, "memory is short"),
        ({"running": True, "disk_free_alarm": True}, Level.FAIL, "disk is short"),
        ({"running": True, "partitions": ["r1@localhost"]}, Level.FAIL, "parted from r1@localhost"),
        ({"running": True, "net_ticktime": 60}, Level.WARN, "60 s"),
    ],
)
def test_what_is_wrong_with_a_node_is_said_with_its_name(third: dict[str, Any], level: Level, words: str) -> None:
    (finding,) = node_findings(nodes(**third))

    assert (finding.level, finding.check) == (level, "rabbitmq r3@localhost")
    assert words in finding.message
    assert finding.remedy


def test_a_node_alone_may_tick_as_it_likes() -> None:
    assert levels(node_findings([ClusterNode(name="r1", running=True, net_ticktime=60)])) == [Level.OK]


@pytest.mark.parametrize(
    ("told", "level", "words"),
    [
        ({"online": ALL[:2]}, Level.WARN, "one more"),
        ({"online": ALL[:1]}, Level.FAIL, "no majority"),
        ({"online": []}, Level.FAIL, "no majority"),
        ({"members": ALL[:1], "online": ALL[:1]}, Level.WARN, "rabbitmq-queues grow"),
        ({"type": "stream", "members": ALL[:1], "online": ALL[:1]}, Level.WARN, "rabbitmq-streams add_replica"),
        ({"type": "classic", "members": [], "online": [], "state": "down"}, Level.FAIL, "down"),
        ({"members": ALL[:2], "online": ALL[:1]}, Level.FAIL, "no majority"),
    ],
)
def test_a_queue_without_a_majority_or_with_too_few_copies_is_named(
    told: dict[str, Any], level: Level, words: str
) -> None:
    (finding,) = queue_findings([queue(**told), queue("dead_letters")], Rabbitmq())

    assert (finding.level, finding.check) == (level, "queue task_processing")
    assert words in finding.message + finding.remedy


def test_queues_that_are_whole_or_somebody_else_s_are_fine() -> None:
    others = [queue("theirs", online=[]), queue("llm_inference", type="classic", members=[], online=[])]
    (finding,) = queue_findings([queue(), *others], Rabbitmq())

    assert finding.level is Level.OK
    assert "2 queues" in finding.message


def test_a_prefix_tells_which_queues_are_ours() -> None:
    found = queue_findings([queue("one.task_processing", online=[]), queue(online=[])], Rabbitmq(prefix="one"))

    assert [finding.check for finding in found] == ["queue one.task_processing"]


@pytest.mark.parametrize(("heartbeat_s", "count"), [(60, 1), (10, 0), (5, 0), (1, 1)])
def test_a_heartbeat_that_is_too_long_or_too_short_is_said(heartbeat_s: int, count: int) -> None:
    assert levels(settings_of(Rabbitmq(heartbeat_s=heartbeat_s), 3)) == [Level.WARN] * count


def test_two_nodes_are_no_cluster_to_rely_on() -> None:
    assert levels(settings_of(Rabbitmq(), 2)) == [Level.WARN]
    assert levels(settings_of(Rabbitmq(), 1)) == []
