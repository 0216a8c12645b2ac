"""Queues on one RabbitMQ node: that falls silent, is killed, fills its disk, or has queues that somebody changed."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs
from tests.rabbit_servers import PASSWORD, QUOTED, USER, Rabbits, eventually, plain_channel
from tests.redis_servers import wall_before

from sutazai.adapters.rabbitmq.queue import RabbitQueue, open_rabbitmq
from sutazai.adapters.rabbitmq.topology import KNOWN, STREAM, definitions, full_name
from sutazai.core.errors import QueueUnavailable
from sutazai.ports.queue import Consumer, Message
from sutazai.settings.model import Rabbitmq
from sutazai.settings.secret import Secret

pytestmark = pytest.mark.xdist_group("rabbitmq")

TASKS = "task_processing"


@pytest.fixture
def settings(rabbit_node: Rabbits) -> Rabbitmq:
    """Queues of this test's own."""
    rabbit_node.restore()
    return rabbit_node.settings(prefix=uuid.uuid4().hex[:12])


@pytest.fixture
async def queue(settings: Rabbitmq) -> AsyncIterator[RabbitQueue]:
    """The same, opened."""
    async with open_rabbitmq(settings) as opened:
        yield opened


def word_of(number: int, *, queue: str = TASKS) -> Message:
    return Message(task=f"task_{number:032x}", queue=queue, tenant="acme", agent="chat")


async def taken_by(consumer: Consumer) -> list[str]:
    taken = await consumer.take(5)
    await consumer.ack(taken)
    return [each.message.task for each in taken]


async def test_a_network_that_falls_silent_is_gone_around(rabbit_node: Rabbits, settings: Rabbitmq) -> None:
    (node,) = rabbit_node.nodes
    async with wall_before(node) as one, wall_before(node) as other:
        two_ways = msgspec.structs.replace(
            settings,
            url=Secret(f"amqp://{USER}:{QUOTED}@127.0.0.1:{one.port},127.0.0.1:{other.port}"),
            heartbeat_s=1,
            connect_timeout_s=0.5,
            confirm_timeout_s=0.5,
        )
        async with open_rabbitmq(two_ways) as queue, queue.consume(TASKS, prefetch=5) as consumer:
            await queue.put([word_of(0)])
            assert await taken_by(consumer) == [word_of(0).task]
            for number, wall in enumerate((one, other), 1):  # each of them may be the one in use
                reading = asyncio.create_task(taken_by(consumer))
                wall.cut()
                assert await queue.put([word_of(number)]) == []
                seen = await reading
                while word_of(number).task not in seen:  # after what came twice
                    seen += await taken_by(consumer)
                wall.heal()


@pytest.mark.deadline(120)
async def test_a_broker_that_was_killed_comes_back_with_all_that_was_confirmed(
    rabbit_node: Rabbits, settings: Rabbitmq
) -> None:
    patient = msgspec.structs.replace(settings, timeout_s=30.0)
    async with open_rabbitmq(patient) as queue, queue.consume(TASKS, prefetch=1) as consumer:
        await queue.put([word_of(number) for number in range(50)])
        (held,) = await consumer.take(1)
        await asyncio.to_thread(rabbit_node.settle)
        await asyncio.to_thread(rabbit_node.nodes[0].kill)

        putting = asyncio.create_task(queue.put([word_of(50)]))
        await consumer.ack([held])  # goes nowhere, and says nothing
        await asyncio.to_thread(rabbit_node.restore)
        assert await putting == []

        seen: set[str] = set()
        while len(seen) < 51:
            seen.update(await taken_by(consumer))


async def test_a_broker_that_is_not_there_is_told_within_the_limit(settings: Rabbitmq) -> None:
    nobody = msgspec.structs.replace(settings, url=Secret(f"amqp://{USER}:{QUOTED}@127.0.0.1:1"), timeout_s=0.5)
    async with open_rabbitmq(nobody) as queue:
        began = time.monotonic()
        with pytest.raises(QueueUnavailable, match=r"127\.0\.0\.1:1 .*rabbitmq\.url"):
            await queue.put([word_of(0)])
        with pytest.raises(QueueUnavailable):
            await queue.depth(TASKS)

        assert time.monotonic() - began < 3.0


async def test_a_wrong_password_is_told_at_once_and_never_shown(settings: Rabbitmq) -> None:
    assert settings.url is not None
    wrong = msgspec.structs.replace(settings, url=Secret(settings.url.reveal().replace(QUOTED, "s3cret")))
    async with open_rabbitmq(wrong) as queue:
        with pytest.raises(QueueUnavailable, match="refused us") as caught:
            await queue.put([word_of(0)])

    assert "s3cret" not in str(caught.value)
    assert PASSWORD not in repr(queue)


async def test_a_full_disk_is_told_and_publishing_goes_on_when_there_is_room(
    rabbit_node: Rabbits, settings: Rabbitmq
) -> None:
    brief = msgspec.structs.replace(settings, timeout_s=1.0, confirm_timeout_s=0.5)
    (node,) = rabbit_node.nodes
    async with open_rabbitmq(brief) as queue:
        assert await queue.put([word_of(0)]) == []
        await asyncio.to_thread(node.control, "set_disk_free_limit", str(10**18))
        try:
            await eventually(lambda: is_refused(queue))
        finally:
            await asyncio.to_thread(node.control, "set_disk_free_limit", "50MB")

        await eventually(lambda: is_put(queue, word_of(2)))
        async with queue.consume(TASKS, prefetch=50) as consumer:
            seen: set[str] = set()
            while not seen >= {word_of(0).task, word_of(2).task}:
                seen.update(await taken_by(consumer))


async def test_what_is_delivered_too_often_becomes_a_dead_letter(settings: Rabbitmq) -> None:
    strict = msgspec.structs.replace(settings, delivery_limit=2)
    async with open_rabbitmq(strict) as queue:
        await queue.put([word_of(7)])
        counts = []
        async with queue.consume(TASKS, prefetch=1) as consumer:
            for _ in range(3):
                (delivery,) = await consumer.take(1)
                counts.append(delivery.count)
                await consumer.hand_back([delivery])
        async with queue.consume("dead_letters", prefetch=1) as consumer:
            (letter,) = await consumer.take(1)
            await consumer.ack([letter])

    assert counts == [0, 1, 2]
    assert letter.message == word_of(7)


async def test_a_queue_that_was_deleted_is_declared_again(queue: RabbitQueue, settings: Rabbitmq) -> None:
    async with queue.consume(TASKS, prefetch=1) as consumer:
        await queue.put([word_of(0)])
        assert await taken_by(consumer) == [word_of(0).task]
        waiting = asyncio.create_task(taken_by(consumer))
        async with plain_channel(settings) as channel:
            await channel.queue_delete(full_name(TASKS, settings))

        assert await queue.put([word_of(1)]) == []
        assert await waiting == [word_of(1).task]


async def test_a_queue_that_was_declared_otherwise_is_used_as_it_is(settings: Rabbitmq) -> None:
    async with open_rabbitmq(settings) as queue:
        await queue.put([word_of(0)])
    changed = msgspec.structs.replace(settings, max_length=5)

    with capture_logs() as said:
        async with open_rabbitmq(changed) as queue:
            assert await queue.put([word_of(1)]) == []
            assert await queue.depth(TASKS) == 2

    named = {line["queue"] for line in said if line["log_level"] == "warning"}
    assert named == {full_name(TASKS, settings), full_name("dead_letters", settings)}


async def test_imported_definitions_are_what_the_queues_would_be_declared_as(
    rabbit_node: Rabbits, settings: Rabbitmq
) -> None:
    (node,) = rabbit_node.nodes
    await asyncio.to_thread(node.import_definitions, definitions(settings))

    with capture_logs() as said:
        async with open_rabbitmq(settings) as queue:
            for name in KNOWN:
                assert await queue.put([word_of(0, queue=name)]) == []
                assert await queue.depth(name) == 1

    assert [line for line in said if line["log_level"] == "warning"] == []
    kinds = await kinds_of_queues(rabbit_node, settings)
    assert kinds == {TASKS: "quorum", "llm_inference": "quorum", "dead_letters": "quorum", STREAM: "stream"}


async def test_inference_may_have_a_classic_queue(rabbit_node: Rabbits, settings: Rabbitmq) -> None:
    chosen = msgspec.structs.replace(settings, llm_inference="classic")
    async with open_rabbitmq(chosen) as queue:
        assert await queue.put([word_of(0, queue="llm_inference")]) == []
        async with queue.consume("llm_inference", prefetch=1) as consumer:
            assert await taken_by(consumer) == [word_of(0).task]

    assert (await kinds_of_queues(rabbit_node, settings))["llm_inference"] == "classic"


async def test_many_who_put_at_once_share_few_connections(rabbit_node: Rabbits, settings: Rabbitmq) -> None:
    few = msgspec.structs.replace(settings, publishers=3, timeout_s=20.0)
    async with open_rabbitmq(few) as queue:
        await asyncio.gather(*(queue.put([word_of(number)]) for number in range(600)))
        said = await asyncio.to_thread(rabbit_node.nodes[0].control, "list_connections", "pid", "--no-table-headers")
        assert await queue.depth(TASKS) == 600

    assert 1 <= len(said.split("\n")) - 1 <= 3


async def kinds_of_queues(rabbits: Rabbits, settings: Rabbitmq) -> dict[str, str]:
    said = await asyncio.to_thread(rabbits.nodes[0].control, "list_queues", "name", "type", "--no-table-headers")
    lines = (line.split("\t") for line in said.splitlines())
    prefix = full_name("", settings)
    return {name.removeprefix(prefix): kind for name, kind in lines if name.startswith(prefix)}


async def is_refused(queue: RabbitQueue) -> bool:
    try:
        await queue.put([word_of(1)])
    except QueueUnavailable:
        return True
    return False


async def is_put(queue: RabbitQueue, message: Message) -> bool:
    return not await is_refused_with(queue, message)


async def is_refused_with(queue: RabbitQueue, message: Message) -> bool:
    try:
        return bool(await queue.put([message]))
    except QueueUnavailable:
        return True


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Of 127.0.0.1, trusted here; and its key."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-nodes"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", *subject, *files]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    return certificate, key


async def test_words_go_both_ways_over_tls(
    rabbit_node: Rabbits, settings: Rabbitmq, certificate: tuple[Path, Path]
) -> None:
    """The broker stands behind an end of TLS, as behind a balancer."""
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(*certificate)
    (node,) = rabbit_node.nodes

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_node = await asyncio.open_connection("127.0.0.1", node.port)
        with suppress(OSError):
            await asyncio.gather(carry(reader, to_node[1]), carry(to_node[0], writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=ours) as server:
        port = server.sockets[0].getsockname()[1]
        safe = msgspec.structs.replace(settings, url=Secret(f"amqps://{USER}:{QUOTED}@127.0.0.1:{port}"))
        async with open_rabbitmq(safe) as queue, queue.consume(TASKS, prefetch=5) as consumer:
            words = [word_of(number) for number in range(3)]

            assert await queue.put(words) == []
            taken = [await consumer.take(1) for _ in words]

    assert [delivery.message for (delivery,) in taken] == words
