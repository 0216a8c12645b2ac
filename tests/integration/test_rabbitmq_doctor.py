"""What the doctor finds at real brokers, over AMQP and through the management plugin."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import msgspec
import pytest
from tests.rabbit_servers import PASSWORD, QUOTED, USER, RabbitNode, Rabbits, eventually, rabbits

from sutazai.adapters.rabbitmq.queue import open_rabbitmq
from sutazai.cli.checks import Finding, Level
from sutazai.cli.checks_broker import broker
from sutazai.settings.model import Rabbitmq
from sutazai.settings.secret import Secret

pytestmark = [pytest.mark.xdist_group("rabbitmq_managed"), pytest.mark.deadline(120)]


@pytest.fixture(scope="module")
def managed() -> Iterator[Rabbits]:
    """One node with the management plugin."""
    with rabbits(1, has_management=True) as servers:
        yield servers


@pytest.fixture
def node(managed: Rabbits) -> RabbitNode:
    return managed.nodes[0]


@pytest.fixture
def settings(managed: Rabbits, node: RabbitNode) -> Rabbitmq:
    url = Secret(f"http://{USER}:{QUOTED}@127.0.0.1:{node.management_port}")
    return managed.settings(management_url=url, replicas=1, confirm_timeout_s=1.0)


async def levels(settings: Rabbitmq) -> dict[str, Level]:
    return {finding.check: finding.level for finding in await broker(settings)}


def amqp(settings: Rabbitmq, findings: list[Finding]) -> Finding:
    """What was found of the node over AMQP."""
    assert settings.url is not None
    return next(finding for finding in findings if finding.check.startswith("rabbitmq 127.0.0.1"))


async def test_a_broker_with_its_queues_is_fine(settings: Rabbitmq, node: RabbitNode) -> None:
    async with open_rabbitmq(settings) as queue:
        await queue.depth("task_processing")
        await queue.events.append([b"{}"])

    async def are_told() -> bool:
        found = await broker(settings)
        return any("3 queues" in finding.message for finding in found)

    await eventually(are_told)
    found = await broker(settings)
    assert {finding.level for finding in found} == {Level.OK}
    assert amqp(settings, found).message.startswith("RabbitMQ 3.")


async def test_without_management_majorities_are_said_to_be_unseen(settings: Rabbitmq) -> None:
    found = await broker(msgspec.structs.replace(settings, management_url=None))

    assert {finding.level for finding in found} == {Level.OK}
    assert "management_url" in found[-1].remedy


async def test_no_broker_has_no_findings() -> None:
    assert await broker(Rabbitmq()) == []


async def test_an_alarm_is_found_in_both_ways(settings: Rabbitmq, node: RabbitNode) -> None:
    await asyncio.to_thread(node.control, "set_disk_free_limit", str(10**18))
    try:

        async def is_told() -> bool:
            return (await levels(settings)).get(f"rabbitmq {node.name}") is Level.FAIL

        await eventually(is_told)
        finding = amqp(settings, await broker(settings))
    finally:
        await asyncio.to_thread(node.control, "set_disk_free_limit", "50MB")

    assert finding.level is Level.FAIL
    assert "takes no messages" in finding.message


async def test_a_node_that_is_away_is_named_and_its_password_is_not(settings: Rabbitmq) -> None:
    nobody = Secret(f"amqp://{USER}:{QUOTED}@127.0.0.1:1/")
    away = msgspec.structs.replace(settings, url=nobody, connect_timeout_s=0.2, management_url=None)
    finding = amqp(away, await broker(away))

    assert (finding.check, finding.level) == ("rabbitmq 127.0.0.1:1", Level.FAIL)
    assert "0.2 s" in finding.message
    assert PASSWORD not in finding.message


@pytest.mark.parametrize("url", ["http://sutazai:wrong@127.0.0.1:{port}", "http://127.0.0.1:1"])
async def test_a_plugin_that_tells_nothing_is_a_warning_without_the_password(
    settings: Rabbitmq, node: RabbitNode, url: str
) -> None:
    changed = msgspec.structs.replace(settings, management_url=Secret(url.format(port=node.management_port)))
    finding = (await broker(changed))[-1]

    assert (finding.check, finding.level) == ("rabbitmq management", Level.WARN)
    assert "wrong" not in finding.message
    assert "rabbitmq-plugins enable" in finding.remedy


async def test_queues_that_are_not_what_the_settings_say_are_named(settings: Rabbitmq) -> None:
    mine = msgspec.structs.replace(settings, prefix="other")
    async with open_rabbitmq(mine) as queue:
        await queue.depth("task_processing")
    changed = msgspec.structs.replace(mine, max_length=5)
    finding = amqp(changed, await broker(changed))

    assert finding.level is Level.WARN
    assert "task_processing" in finding.message
